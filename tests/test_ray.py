"""`--engine ray`: the same bytes as one process's, whatever happens to the nodes."""

import pytest
from support.stages import run_encode, run_teacher_cache, shard_files, tree

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


def test_a_cluster_of_its_own(teacher, images, tmp_path):
    """On a laptop, with nothing running."""
    alone = run_encode(teacher, images, tmp_path / "alone")
    latents = run_encode(teacher, images, tmp_path / "latents", engine="ray")
    assert shard_files(latents) == shard_files(alone)
    one = run_teacher_cache(teacher, latents, tmp_path / "one", samples=1)
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", samples=1, engine="ray")
    assert shard_files(cache) == shard_files(one)
    for name in ("calibration.safetensors", "samples/0000.png"):
        assert (cache / name).read_bytes() == (one / name).read_bytes()
    assert tree(one).keys() == tree(cache).keys()
