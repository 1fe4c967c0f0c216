"""What `--engine ray` refuses before it connects."""

import sys

import pytest

from pipeline.cache.ray_nodes import manifest_here
from pipeline.encode import EncodeSettings
from pipeline.system.errors import UserError
from pipeline.system.ray_cluster import cluster_of
from pipeline.teacher_cache import TeacherCacheSettings


def settings(**changes):
    return EncodeSettings(teacher="demo", data="images", out="latents", **changes)


def connect(chosen) -> None:
    with cluster_of(chosen):
        pytest.fail("it connected")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray_address": "auto"}, "--ray-address need --engine ray. Add it"),
        ({"cpus_per_actor": 2, "gpus_per_actor": 0.0}, "--gpus-per-actor and --cpus-per-actor need --engine ray"),
        ({"engine": "ray", "device": "cuda:1"}, "--device cuda:1 does not work with --engine ray"),
        ({"engine": "ray", "ray_address": "ray://head:10001"}, "Run the command on a node of the cluster, as by `ray"),
        ({"engine": "ray", "device": "cpu", "gpus_per_actor": 1.0}, "--gpus-per-actor 1 contradicts --device cpu"),
        ({"engine": "ray", "gpus_per_actor": 2.0}, "--gpus-per-actor is 2.0; it must be at most 1"),
    ],
)
def test_options_that_contradict_are_refused(changes, message):
    for stage in (settings, lambda **given: TeacherCacheSettings(teacher="demo", latents="l", out="o", **given)):
        with pytest.raises(UserError, match=message):
            stage(**changes)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray needs the package ray. Run: pip install"):
        connect(settings(engine="ray"))


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")])
def test_a_launch_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cannot run under `accelerate launch` or torchrun"):
        connect(settings(engine="ray"))


def test_without_the_engine_there_is_no_cluster():
    with cluster_of(settings()) as cluster:
        assert cluster is None


def test_a_node_that_does_not_see_the_output_says_so(latents, tmp_path):
    with pytest.raises(UserError, match=r"the node .* does not see .*manifest.json. All nodes .* must share the disk"):
        manifest_here(tmp_path / "latents", "latents", "0" * 64)
    with pytest.raises(UserError, match=r"the node .* sees another file as .*manifest.json"):
        manifest_here(latents, "latents", "0" * 64)
