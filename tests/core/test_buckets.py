"""The list of buckets, and the one that fits an image best."""

import pytest

from pipeline.core.buckets import bucket_sizes, nearest


def test_the_buckets_of_the_usual_resolutions():
    tall = [(704, 384), (576, 448)]
    assert bucket_sizes(512) == [*tall, (512, 512), (448, 576), (384, 704)]
    assert bucket_sizes(1024)[:5] == [(1344, 768), (1280, 832), (1152, 896), (1088, 960), (1024, 1024)]
    assert bucket_sizes(64) == [(64, 64)]
    with pytest.raises(ValueError, match="500 is not a multiple of 64"):
        bucket_sizes(500)


@pytest.mark.parametrize("resolution", range(128, 2049, 64))
def test_buckets_have_about_the_area_of_the_square_and_sides_that_the_networks_can_halve(resolution):
    sizes = bucket_sizes(resolution)
    assert len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert max(height, width) <= 2 * min(height, width)
        assert 0.85 < height * width / resolution**2 < 1.15
    assert sizes == sorted(sizes, key=lambda size: size[1] / size[0])


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (4000, 3000, (576, 448)),
        (3000, 4000, (448, 576)),
        (1080, 1920, (384, 704)),
        (100, 100, (512, 512)),
        (3000, 1, (704, 384)),
        # As far from the square as from the next one, up to a pixel.
        (1135, 1000, (576, 448)),
        (1133, 1000, (512, 512)),
    ],
)
def test_an_image_goes_to_the_bucket_that_cuts_the_least_off_it(height, width, bucket):
    sizes = bucket_sizes(512)
    assert sizes[nearest((height, width), sizes)] == bucket


def test_of_two_buckets_that_fit_equally_well_the_first_is_taken():
    assert nearest((6, 6), [(3, 2), (2, 3)]) == nearest((6, 6), [(2, 3), (3, 2)]) == 0
