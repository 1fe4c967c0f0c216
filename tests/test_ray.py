"""`--engine ray`: the same bytes as one process's, whatever happens to the nodes."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.stages import run_encode, run_teacher_cache, shard_files, tree

from pipeline.cache.ray_actors import _Run
from pipeline.system.errors import UserError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

OWN = {"encode.json", "teacher-cache.json"}


@pytest.fixture
def cluster():
    """A head without work, and two nodes with a CPU each, all on this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def nodes_changing(monkeypatch, cluster, out: Path, shards: int):
    """Within the block, once so many shards are finished, a node that is writing is killed, and another one added."""
    real, changed = _Run.take, []

    def take(run, member):
        real(run, member)
        run.hand_out()
        if not changed and len(list(out.glob("[sr]0*.index"))) >= shards:
            cluster.remove_node(cluster.workers.pop(0), allow_graceful=False)
            cluster.workers.append(cluster.add_node(num_cpus=1))
            changed.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "take", take)
        yield
    assert changed


def test_ray_starts_on_this_machine(teacher, images, tmp_path):
    alone = run_encode(teacher, images, tmp_path / "alone")
    latents = run_encode(teacher, images, tmp_path / "latents", engine="ray")
    assert shard_files(latents) == shard_files(alone)
    one = run_teacher_cache(teacher, latents, tmp_path / "one", samples=1)
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", samples=1, engine="ray")
    files, expected = tree(cache), tree(one)
    assert files.keys() == expected.keys()
    assert {name for name in files if files[name] != expected[name]} <= OWN | {"samples/samples.json"}


def test_a_node_is_killed_and_another_one_joins(teacher, images, tmp_path, cluster, monkeypatch, capsys):
    many = {"entries_per_shard": 1, "batch_size": 1}
    views = {"views": 2, "random_flip": True, **many}
    on_cluster = {"engine": "ray", "ray_address": cluster.address}
    alone, out = run_encode(teacher, images, tmp_path / "alone", **views), tmp_path / "latents"
    with nodes_changing(monkeypatch, cluster, out, 3):
        run_encode(teacher, images, out, **views, **on_cluster)
    files, expected = tree(out), tree(alone)
    assert files.keys() == expected.keys()
    assert {name for name in files if files[name] != expected[name]} <= OWN
    assert "and is tried again (its process died: " in capsys.readouterr().err

    one, cache = run_teacher_cache(teacher, alone, tmp_path / "one", **many), tmp_path / "cache"
    with nodes_changing(monkeypatch, cluster, cache, 5):
        run_teacher_cache(teacher, alone, cache, **many, **on_cluster)
    files, expected = tree(cache), tree(one)
    assert files.keys() == expected.keys()
    assert shard_files(cache) == shard_files(one)
    assert "and is tried again (its process died: " in capsys.readouterr().err


def test_an_error_of_a_node_is_that_of_the_command(teacher, images, tmp_path, cluster):
    """Nothing of ray is in it. The rerun goes on with the shards that were left."""
    data = shutil.copytree(images, tmp_path / "data")
    broken = sorted(data.glob("*.png"))[-1]
    good = broken.read_bytes()
    broken.write_bytes(b"no image")
    settings = {"entries_per_shard": 5, "max_skipped": 0.0, "engine": "ray", "ray_address": cluster.address}
    with pytest.raises(UserError, match="1 of the first .* images of a shard cannot be used, more than --max-skipped"):
        run_encode(teacher, data, tmp_path / "latents", **settings)
    broken.write_bytes(good)
    run_encode(teacher, data, tmp_path / "latents", **settings)
    assert shard_files(tmp_path / "latents") == shard_files(run_encode(teacher, data, tmp_path / "alone"))
