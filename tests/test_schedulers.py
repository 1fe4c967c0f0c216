"""The examples for schedulers: their commands, with the variables that a scheduler sets, write a cache together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support.stages import reset_accelerate, run_teacher_cache, shard_files

from pipeline.cli import main

EXAMPLES = Path(__file__).parent.parent / "pipeline" / "docs" / "examples"
RECORD = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def of_slurm(task: int) -> tuple[list[str], dict[str, str]]:
    script = (EXAMPLES / "teacher_cache.sbatch").read_text().replace("SHARDS=50\n", "SHARDS=2\n")
    return ["bash", "-c", script], {"SLURM_ARRAY_TASK_ID": str(task)}


def of_kubernetes(task: int) -> tuple[list[str], dict[str, str]]:
    (container,) = yaml.safe_load((EXAMPLES / "teacher_cache_job.yaml").read_text())["spec"]["template"]["spec"][
        "containers"
    ]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert given == {"SHARDS": "50"}
    # Kubernetes replaces references to variables that it knows, such as $(SHARDS).
    assert not re.search(r"\$\(\w", container["command"][-1])
    return container["command"], {"SHARDS": "2", "JOB_COMPLETION_INDEX": str(task)}


@pytest.fixture
def arguments_of(tmp_path):
    """What a task's shell passes to `distill-sd`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "distill-sd").write_text(RECORD)
    (tmp_path / "bin" / "distill-sd").chmod(0o755)

    def run(command: list[str], variables: dict[str, str]) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)

    return run


def test_the_tasks_of_an_array_write_a_cache_together(teacher, latents, tmp_path, arguments_of, monkeypatch):
    """Four shards: two tasks write two each, and the third has nothing to do."""
    (tmp_path / "checkpoint").symlink_to(teacher)
    (tmp_path / "latents").symlink_to(latents)
    monkeypatch.chdir(tmp_path)
    for task in (1, 0, 2):
        arguments = arguments_of(*of_slurm(task))
        assert arguments == arguments_of(*of_kubernetes(task))
        assert arguments[-2:] == ["--shard-range", f"{2 * task}:{2 * task + 2}"]
        result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
        reset_accelerate()
        assert result.exit_code == 0, result.output
        assert ("already finished, nothing to do" in result.output) == (task == 2)
    settings = {"tokens": 64, "batch_size": 8, "entries_per_shard": 250, "rounds": 4, "uncond_fraction": 0.1}
    once = run_teacher_cache(teacher, latents, tmp_path / "once", **settings)
    assert shard_files(tmp_path / "cache") == shard_files(once)
