"""From records to pixels: which failures to read an image skip it, and which stop the run."""

import errno
import os

import pytest
from support.tiny import write_images

from pipeline.data import loading
from pipeline.data.loading import Framing, load_images
from pipeline.data.source import DataSettings, open_source
from pipeline.system.errors import UserError

FRAMING = Framing(size=(16, 16), center_crop=True, random_flip=False, seed=0)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A function that loads three images, where reading the second one fails with `number`, so many times."""
    source = open_source(DataSettings(data=str(write_images(tmp_path / "images", 3))))
    monkeypatch.setattr(loading, "PAUSES", (0.0, 0.0))

    def load(number, times):
        left, read = [number] * times, source.source.read

        def failing(location):
            if location == "001.png" and left:
                raise OSError(left.pop(), os.strerror(number), str(tmp_path / location))
            return read(location)

        with monkeypatch.context() as patch:
            patch.setattr(source.source, "read", failing)
            return list(load_images(source, FRAMING, list(enumerate(source.records)), 1, 1))

    return load


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_failure_that_passes_skips_nothing(loaded, number):
    assert [image.problem for image in loaded(number, 2)] == [None] * 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_failure_that_stays_stops_the_run_and_names_the_image(loaded, number):
    with pytest.raises(UserError, match=rf"001.png cannot be read: {os.strerror(number)}\. .* Rerun the same command"):
        loaded(number, 3)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_an_image_that_is_not_there_or_not_to_be_read_is_skipped(loaded, number):
    assert [image.problem for image in loaded(number, 1)] == [None, os.strerror(number), None]
