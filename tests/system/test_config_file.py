"""--config and --preset: what a dry run prints is read back; the command line wins; mistakes are named."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support.fake_command import command_doing

from pipeline.cli import main
from pipeline.distill import DistillSettings
from pipeline.encode import EncodeSettings
from pipeline.settings.sample import SampleSettings
from pipeline.system.config_file import PRESETS
from pipeline.teacher_cache import TeacherCacheSettings

STAGES = {"encode": EncodeSettings, "teacher-cache": TeacherCacheSettings, "distill": DistillSettings}
COMMANDS = {**STAGES, "sample": SampleSettings}
GIVEN = {
    "encode": EncodeSettings(teacher="demo", data="d", out="o", center_crop=True, seed=3, dtype="bf16"),
    "teacher-cache": TeacherCacheSettings(teacher="demo", latents="l", out="o", students=("sd_tiny", "bk_base")),
    "distill": DistillSettings(cache="c", out="o", level="sd_tiny", learning_rate=1e-5, use_ema=True, snr_gamma=5.0),
}


def run(stage, *arguments):
    """(exit status, output, the settings that arrive)."""
    arrived = []
    command = command_doing(arrived.append, lambda settings: [f"a plan of {settings.out}"], COMMANDS[stage])
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    return result.exit_code, result.output, arrived[0] if arrived else None


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_dry_run_prints_is_read_back(stage, tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(GIVEN[stage].as_json()))
    _, printed, _ = run(stage, "--config", tmp_path / "first.yaml", "--dry-run")
    assert "# a plan of o" in printed
    (tmp_path / "run.yaml").write_text(printed)
    status, output, arrived = run(stage, "--config", tmp_path / "run.yaml")
    assert status == 0, output
    assert arrived.as_json() == GIVEN[stage].as_json()


def test_sections_hold_the_options_of_several_commands(tmp_path):
    text = (
        "encode: {teacher: demo, data: d, out: latents, batch-size: 3}\ndistill: {cache: c, out: s, level: sd_tiny}\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    assert run("encode", "--config", tmp_path / "run.yaml")[2].batch_size == 3
    assert run("distill", "--config", tmp_path / "run.yaml")[2].level == "sd_tiny"
    status, output, _ = run("teacher-cache", "--config", tmp_path / "run.yaml")
    assert status == 2
    assert "has no section teacher-cache. It has encode, distill." in output


def test_the_command_line_wins_then_the_file_then_the_preset(tmp_path):
    (tmp_path / "run.yaml").write_text("cache: c\nout: o\nmax_train_steps: 7\nlevel: sd_tiny\n")
    both = ("--preset", "distill-sd", "--config", tmp_path / "run.yaml")
    _, output, arrived = run("distill", *both, "--level", "bk_base")
    assert (arrived.level, arrived.max_train_steps, arrived.lr_scheduler) == ("bk_base", 7, "cosine"), output
    _, _, arrived = run("distill", "--config", tmp_path / "run.yaml", "--preset", "distill-sd")
    assert (arrived.level, arrived.max_train_steps, arrived.lr_scheduler) == ("sd_tiny", 7, "cosine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chache: c", "distill has no option 'chache'. Did you mean cache?"),
        ("seed: [", "cannot be read"),
        ("- seed", "is not a list of options. Write lines such as `seed: 0`."),
        ("seed: many", "seed is 'many'; write a whole number."),
        ("seed: {a: 1}\nlevel: sd_tiny", "seed is {'a': 1}; write a whole number."),
        ("seed: 010", "seed is '010'; write a whole number."),
        ("seed: 1:30", "seed is '1:30'; write a whole number."),
        ("seed: 2024-01-01", "seed is '2024-01-01'; write a whole number."),
        ("seed: [1, 2]", "seed is [1, 2]; write a whole number."),
        ("train_batch_size: 1.9", "train_batch_size is 1.9; write a whole number."),
        ("train_batch_size: true", "train_batch_size is True; write a whole number."),
        ("learning_rate: yes", "learning_rate is 'yes'; write a number."),
        ("use_ema: 3", "use_ema is 3; write true or false."),
        ("use_ema: yes", "use_ema is 'yes'; write true or false."),
        ("use_ema: [no]", "use_ema is ['no']; write true or false."),
        ("push_to_hub: 123", "push_to_hub is 123; write text, in quotes."),
        ("validation_prompts: 5", "validation_prompts is 5; write text, in quotes."),
        ("init_from: true", "init_from is True; write text, in quotes."),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("[" * 5000, "it is nested too deeply"),
        ("seed: !!timestamp x", "a value does not fit its tag"),
        ("seed: !!bool x", "a value does not fit its tag"),
        ("seed: !!int ''", "a value does not fit its tag"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nlevel: [*c, *c]", "has no option 'a'"),
        ("cache: c\nout: o\nlevel: sd_huge", "'sd_huge' is not one of"),
        ("learning_rate: -1\ncache: c\nout: o\nlevel: sd_tiny", "--learning-rate is -1.0; it must be more than 0.0"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    status, output, _ = run("distill", "--config", tmp_path / "run.yaml")
    assert status == 2
    assert message in " ".join(output.split())


def test_a_section_may_be_empty(tmp_path):
    (tmp_path / "run.yaml").write_text("encode: {seed: 3}\ndistill:\n")
    _, output, arrived = run(
        "distill", "--config", tmp_path / "run.yaml", "--cache", "c", "--out", "o", "--level", "sd_tiny"
    )
    assert arrived.seed == 0, output


@pytest.mark.parametrize("text", ["prompts: a red bicycle", "prompts: [a red bicycle]"])
def test_one_text_is_a_list_of_one(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"{text}\nmodel: demo\nout: {tmp_path / 'images'}\n")
    _, output, arrived = run("sample", "--config", tmp_path / "run.yaml")
    assert arrived.prompts == ("a red bicycle",), output


def test_a_value_that_unfolds_to_millions_is_shown_in_short(tmp_path):
    bomb = "x"
    for name in "abcdefghijklmnopqrstuvwxyz":
        bomb = f"[&{name} {bomb}, *{name}]"
    (tmp_path / "run.yaml").write_text(f"level: {bomb}")
    status, output, _ = run("distill", "--config", tmp_path / "run.yaml")
    assert status == 2
    assert "level is [[" in output
    assert len(output) < 1000


def test_plain_words_stay_what_they_are(tmp_path):
    """YAML 1.1 reads them as false, 8 and a number of seconds."""
    (tmp_path / "run.yaml").write_text(
        "cache: 010\nout: 1:30\nlevel: sd_tiny\nmixed_precision: no\nlearning_rate: 1e-5\n"
    )
    _, output, arrived = run("distill", "--config", tmp_path / "run.yaml")
    assert arrived.mixed_precision == "no", output
    assert (str(arrived.cache), str(arrived.out), arrived.learning_rate) == ("010", "1:30", 1e-5)


def test_a_file_that_is_not_there_is_named(tmp_path):
    status, output, _ = run("distill", "--config", tmp_path / "none.yaml")
    assert status == 2
    assert "none.yaml cannot be read" in " ".join(output.split())


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_every_preset_is_taken_by_its_commands(preset):
    sections = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    assert set(sections) == set(STAGES)
    required = {"encode": ["--teacher", "t", "--data", "d"], "teacher-cache": ["--teacher", "t", "--latents", "l"]}
    for stage, section in sections.items():
        arguments = [*required.get(stage, ["--cache", "c"]), "--out", "o", "--preset", preset]
        status, output, arrived = run(stage, *arguments)
        assert status == 0, output
        written = arrived.as_json()
        assert {name: written[name] for name in section if name != "teacher"} == {
            name: value for name, value in section.items() if name != "teacher"
        }


def test_the_demos_preset_is_what_make_gives():
    """The Makefile states the same values; both are compared by the settings that arrive."""
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        ["make", "-n", "distill", "VENV=v", "-o", "v/.ready"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for module, arguments in re.findall(r"-m pipeline\.(\w+) (.*)", re.sub(r"\s*\\\n\s*", " ", shown)):
        stage = module.replace("_", "-")
        _, _, made = run(stage, *shlex.split(arguments))
        paths = [word for word in shlex.split(arguments) if word.startswith("work/")]
        flags = {
            "encode": ("--data", "--out"),
            "teacher-cache": ("--latents", "--out"),
            "distill": ("--cache", "--out"),
        }
        given = [word for pair in zip(flags[stage], paths, strict=True) for word in pair]
        assert run(stage, "--preset", "demo", *given)[2].as_json() == made.as_json()


def test_every_command_takes_a_file():
    for name in set(main.list_commands(None)) - {"demo-scenes"}:
        result = CliRunner().invoke(main, [name, "--help"])
        assert "--config FILE" in result.output, name
