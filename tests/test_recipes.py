"""The figures on the page of recipes follow from the presets, `plan` and the benchmarks."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline.commands.plan import cost_of
from pipeline.evaluation.training_cost import training_cost
from pipeline.models.families.sd_configs import VERSIONS
from pipeline.models.shapes import teacher_shapes
from pipeline.models.students import teacher_taps
from pipeline.settings.plan import PlanSettings
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.config_file import PRESETS
from pipeline.system.disk import format_bytes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "pipeline" / "docs" / "recipes.md").read_text(encoding="utf-8")
BENCHMARKS = ROOT / "tests" / "benchmarks"
STAGES = ("encode", "teacher-cache", "distill")


def rows(text, heading):
    """The rows below the table head that starts with `heading`, as lists of cells without backticks."""
    _, found, rest = text.partition(f"\n| {heading}")
    assert found, heading
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def number(text):
    return int(text.split()[0].replace(",", ""))


def preset(name):
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text())


def samples(name):
    training = preset(name)["distill"]
    return training["max_train_steps"] * training["train_batch_size"] * training.get("gradient_accumulation_steps", 1)


TAKEN = {row[0].split(",")[0]: row for row in rows(PAGE, "recipe | images")}
HOURS = {tuple(row[:2]): row[2:] for row in rows(PAGE, "recipe | stage")}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """The configs of SD-1.x."""
    folder = tmp_path_factory.mktemp("sd15")
    (version,) = (version for version in VERSIONS if version.title == "SD-1.x")
    for name, config in version.configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return folder


def test_every_published_preset_is_in_the_tables():
    published = {file.stem for file in PRESETS.iterdir()} - {"demo"}
    assert TAKEN.keys() == published
    assert HOURS.keys() == {(name, stage) for name in published for stage in STAGES}


@pytest.mark.parametrize("name", TAKEN)
def test_the_counts_are_those_of_the_preset(name):
    _, images, rounds, _, passes, trained, _ = TAKEN[name]
    assert number(rounds) == preset(name)["teacher-cache"].get("rounds", TeacherCacheSettings.rounds)
    assert passes == f"{number(images) * number(rounds) / 1e6:.1f} M"
    assert trained == f"{samples(name) / 1e6:.1f} M"


@pytest.mark.usefixtures("remembered_evaluations")
@pytest.mark.parametrize("name", TAKEN)
def test_the_bytes_and_the_arithmetic_are_those_of_plan(name, sd15):
    recipe, images, rounds, size, _, _, share = TAKEN[name]
    options = preset(name)
    students = tuple(options["teacher-cache"]["students"])
    images, rounds, resolution = number(images), number(rounds), options["encode"]["resolution"]
    settings = PlanSettings(teacher=str(sd15), images=images, rounds=rounds, resolution=resolution, students=students)
    shapes = teacher_shapes(sd15, resolution, teacher_taps(students))
    total = cost_of(settings, shapes).total(images, rounds)
    assert size == format_bytes(total)
    assert "disk of 180 GB" not in recipe or 179e9 < total < 180e9
    visits = samples(name) / (images * rounds)
    assert share == f"{training_cost(sd15, resolution, shapes, students).share_of_online(rounds, visits):.2f}"


def benchmark_rates():
    """What each stage did in a second at the SD-1.x architecture on two CPU cores, in fp32."""
    one, two = (BENCHMARKS / f"{name}.md" for name in ("stage_one", "stage_two"))
    encode, cache = (row[1] for row in rows(one.read_text(encoding="utf-8"), "stage |"))
    first, *_ = rows(two.read_text(encoding="utf-8"), "source of the batches")
    assert first[0] == "cache"
    return dict(zip(STAGES, (encode, cache, first[1]), strict=True))


def as_written(hours):
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


@pytest.mark.parametrize(("name", "stage"), HOURS)
def test_the_hours_are_the_counts_over_the_rates(name, stage):
    images, rounds = (number(cell) for cell in TAKEN[name][1:3])
    counts = dict(zip(STAGES, (images, images * rounds, samples(name)), strict=True))
    count, *hours = HOURS[name, stage]
    assert number(count) == counts[stage]
    rates = [1, 10, 100, float(benchmark_rates()[stage])]
    assert hours == [as_written(counts[stage] / rate / 3600) for rate in rates]


def test_the_rates_on_the_page_are_those_of_the_benchmarks():
    told = re.findall(r"(0\.\d+) (?:images|passes|samples)", " ".join(PAGE.split()))
    assert told == list(benchmark_rates().values())
    road = " ".join((BENCHMARKS / "demo_road.md").read_text(encoding="utf-8").split())
    assert "on an idle machine of the same kind, it took 6 min" in road
