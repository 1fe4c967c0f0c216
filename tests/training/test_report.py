"""Generated images and the report: independent of the batch size, self-contained, and shown by a real browser."""

import base64
import mmap
import os
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from support.stages import metrics, run_distill, run_encode, run_teacher_cache
from support.tiny import tiny_pipeline, write_images

from pipeline.demo.oracle import score_scenes
from pipeline.demo.scenes import make_scene
from pipeline.sampling.generate import GeneratedImages, Sampler, generate, load_images, save_images
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.system.memory import peak_memory
from pipeline.system.page import curves
from pipeline.training.report import Report, write_report

pytestmark = pytest.mark.usefixtures("few_steps")

PROMPTS = [f"image {i}" for i in range(5)]
METRICS = [
    {"step": s, "loss": 1 / s, "task": 0.5 / s, "output": 0.1 / s, "feature/mid_block": 0.2 / s, "epoch": s / 10}
    for s in (1, 2, 5)
]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def write(out, title="title", metrics=METRICS, rows=None, **more):
    report = {"about": {}, "settings": {}, "validation": {}, "passes": {}, "scorer": score_scenes, **more}
    write_report(out, Report(title=title, metrics=metrics, rows=rows or {}, **report))
    return (out / "report.html").read_text()


def pixels(samples):
    return np.stack([np.asarray(image, int) for image in samples.images])


def test_an_image_depends_on_its_prompt_and_seed_but_not_on_the_batch():
    pipe = tiny_pipeline()
    one, three = (generate(pipe, PROMPTS, Sampler(steps=3, batch_size=size), "samples") for size in (1, 3))
    assert np.abs(pixels(one) - pixels(three)).max() <= 1
    assert np.abs(pixels(one)[0] - pixels(one)[1]).mean() > 1


def test_images_match_the_diffusers_pipeline():
    pipe = tiny_pipeline()
    samples = generate(pipe, PROMPTS[:1], Sampler(steps=4, guidance_scale=3.0), "samples")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    expected = pipe(PROMPTS[0], num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.asarray(samples.images[0]), np.asarray(expected.images[0]))


def test_generating_leaves_the_pipelines_scheduler():
    pipe = tiny_pipeline()
    before = pipe.scheduler
    generate(pipe, PROMPTS[:1], Sampler(steps=2), "samples")
    assert pipe.scheduler is before


def test_saved_images_are_read_back_unchanged(tmp_path):
    sampler = Sampler(steps=2, guidance_scale=2.5, batch_size=2)
    samples = generate(tiny_pipeline(), PROMPTS, sampler, "samples")
    save_images(samples, sampler, tmp_path / "samples")
    loaded, loaded_sampler = load_images(tmp_path / "samples")
    assert loaded_sampler == sampler
    assert replace(loaded, images=[]) == replace(samples, images=[])
    assert np.array_equal(pixels(loaded), pixels(samples))


def test_the_oracle_scores_only_scenes():
    scenes = [make_scene(5, i) for i in range(6)]
    images, captions = [Image.fromarray(s.image) for s in scenes], [s.caption for s in scenes]
    assert score_scenes(images, captions) == 1.0
    assert score_scenes(images, captions[1:] + captions[:1]) < 0.6
    assert score_scenes(images, ["a photo of a cat", *captions[1:]]) is None


@pytest.fixture(scope="module")
def student(teacher, latents, cache_of_one_round, tmp_path_factory):
    """A student distilled with a report, from a cache with images of the teacher."""
    work = tmp_path_factory.mktemp("reported")
    cache = shutil.copytree(cache_of_one_round, work / "cache")
    run_teacher_cache(teacher, latents, cache, rounds=1, samples=3)
    return run_distill(cache, work / "student", report=True)


def test_the_cache_holds_images_of_the_teacher(student, teacher):
    stored, sampler = load_images(student.parent / "cache" / "samples")
    assert stored.prompts == ["picture 0", "picture 6", "picture 12"]
    expected = generate(DiffusionPipeline.from_pretrained(teacher), stored.prompts, sampler, "expected")
    assert np.abs(pixels(stored) - pixels(expected)).max() <= 1
    assert stored.parameters == sum(p.numel() for p in DiffusionPipeline.from_pretrained(teacher).unet.parameters())


def test_the_report_shows_teacher_untrained_student_and_student(student):
    page = (student / "report.html").read_text()
    rows = re.findall(r"<tr><th>([^<]+)</th><td><img", page)
    assert rows == ["teacher", "untrained student", "student"]
    assert page.count("<img") == 3 * 3 + 2
    assert "4 steps" in page
    assert "learning_rate" in page
    assert "facts that hold" not in page


def test_a_student_that_started_from_a_saved_one_is_shown_next_to_that(student, tmp_path):
    cache = student.parent / "cache"
    out = run_distill(cache, tmp_path / "out", report=True, init_from=student, max_train_steps=1)
    page = (out / "report.html").read_text()
    assert re.findall(r"<tr><th>([^<]+)</th><td><img", page) == ["teacher", "student of --init-from", "student"]
    shown = re.findall(r'<img alt="student: [^"]*" src="([^"]+)"', (student / "report.html").read_text())
    assert re.findall(r'<img alt="student of --init-from: [^"]*" src="([^"]+)"', page) == shown
    assert "1 step, " in page


def test_the_first_step_is_logged_too(student, tmp_path):
    out = run_distill(student.parent / "cache", tmp_path / "out", max_train_steps=3, logging_steps=10)
    assert [line["step"] for line in metrics(out)] == [1, 3]


def test_the_points_of_a_short_curve_are_marked(monkeypatch):
    def marks():
        uri = re.search(r'base64,([^"]+)', curves({"loss": {"task": ([1, 2], [3.0, 2.0])}}, "step", "loss"))[1]
        return base64.b64decode(uri).decode().count("<use ")

    marked = marks()
    monkeypatch.setattr("pipeline.system.page.FEW_POINTS", 1)
    assert marked >= marks() + 2


def test_the_report_says_what_it_is_about(student):
    page = (student / "report.html").read_text()
    told = dict(re.findall(r"<tr><td>([^<]+)</td><td>([^<]+)</td></tr>", page))
    assert told["teacher"].startswith("teacher")
    assert told["data"].endswith(": 13 images at 32 px")
    assert told["student"] == "sd_small: it has one layer per block instead of two"
    assert told["device"] == "cpu, mixed precision no"
    assert re.fullmatch(r"[\d.]+ seconds", told["duration"])
    assert told["finished"] == date.today().isoformat()
    assert "error against the teacher" in told["output"]


def test_passes_of_a_network_like_the_teachers_are_timed_in_turns(student, tmp_path):
    page = (student / "report.html").read_text()
    columns = re.findall(r"<th class=number>([^<]*)</th>", page)
    rows = re.findall(r"<tr><th>([^<]+)</th>((?:<td class=number>[^<]*</td>)+)</tr>", page)
    cells = {name: re.findall(r">([^<]*)</td>", row)[columns.index("seconds per U-Net pass") - 1] for name, row in rows}
    assert cells["teacher"].endswith(" (100%)")
    assert cells["untrained student"] == ""
    assert float(cells["student"].split()[0]) > 0
    # A cache of an earlier version does not say what its teacher was like.
    cache = tmp_path / "cache"
    shutil.copytree(student.parent / "cache", cache, ignore=shutil.ignore_patterns("samples", "teacher.json"))
    out = run_distill(cache, tmp_path / "out", report=True, max_train_steps=1)
    assert "seconds per U-Net pass" not in (out / "report.html").read_text()


def test_validation_is_shown(student, tmp_path, teacher):
    cache, prompts = tmp_path / "cache", tmp_path / "prompts.txt"
    shutil.copytree(student.parent / "cache", cache, ignore=shutil.ignore_patterns("samples"))
    prompts.write_text("a cat\na dog\n")
    held_out = run_encode(teacher, write_images(tmp_path / "images", 5, seed=3), tmp_path / "latents")
    more = {"validation_prompts": prompts, "validation_latents": held_out, "validation_steps": 1}
    out = run_distill(cache, tmp_path / "out", report=True, max_train_steps=2, **more)
    page = (out / "report.html").read_text()
    assert re.findall(r"<tr><th>(step \d)</th><td><img", page) == ["step 1", "step 2"]
    assert 'alt="loss curves: held-out error"' in page
    first, last = ([m for m in metrics(out) if "held_out/task" in m][i]["held_out/task"] for i in (0, -1))
    told = f"Error against the added noise on images that were held out: {last:.4g}, {first:.4g} before the training."
    assert told in page


def test_few_of_many_validations_are_shown(tmp_path):
    images = GeneratedImages([Image.new("RGB", (8, 8))], ["a cat"], 0.5, 1000, "cpu")
    page = write(tmp_path, validation=dict.fromkeys(range(100, 2100, 100), images))
    shown = [int(step.replace(",", "")) for step in re.findall(r"<th>step ([\d,]+)</th>", page)]
    assert (len(shown), shown[0], shown[-1]) == (6, 100, 2000)
    assert shown == sorted(set(shown))


def test_the_cost_of_all_three_is_measured_and_compared_with_the_teachers(student):
    page = (student / "report.html").read_text()
    memory = re.findall(r"<td class=number>([\d,]+) \((\d+)%\)</td><td class=number>cpu, fp32</td>", page)
    assert len(memory) == 3
    assert memory[0][1] == "100"
    assert all(1 <= int(megabytes.replace(",", "")) < 2000 for megabytes, _ in memory)


def test_peak_memory_is_that_of_the_generation_alone(teacher):
    model = PipelineRef(teacher, teacher / "unet", torch.device("cpu"), torch.float32)
    first = generate_in_process(model, PROMPTS[:2], Sampler(steps=2), "samples")
    held = np.ones(500_000_000, np.uint8)
    second = generate_in_process(model, PROMPTS[:2], Sampler(steps=2), "samples")
    assert np.array_equal(pixels(first), pixels(second))
    assert second.peak_memory < first.peak_memory + held.nbytes / 2


def test_peak_memory_grows_with_what_a_process_holds():
    before, resident = peak_memory(torch.device("cpu")), int(Path("/proc/self/statm").read_text().split()[1]) << 12
    # Pages that malloc has not kept from earlier.
    with mmap.mmap(-1, before - resident + 100_000_000) as held:
        np.frombuffer(held, np.uint8)[:] = 1
        assert peak_memory(torch.device("cpu")) - before > 50_000_000


def test_the_report_is_self_contained(student):
    page = (student / "report.html").read_text()
    assert set(re.findall(r"""(?:src|href)=["']?(.{5})""", page)) == {"data:"}
    assert not re.search(r"https?://", re.sub(r"data:[^\"']+", "", page))


def test_scenes_are_scored_in_the_report(tmp_path):
    scenes = [make_scene(5, i) for i in range(4)]
    samples = GeneratedImages([Image.fromarray(s.image) for s in scenes], [s.caption for s in scenes], 0.5, 1000, "cpu")
    page = write(tmp_path, rows={"teacher": samples, "student": samples})
    assert "facts that hold" in page
    assert "100.0% over 4 images" in page


def test_a_report_without_images_has_only_the_curves(tmp_path):
    page = write(tmp_path, "<script>", settings={"level": "<b>"}, about={"teacher": "<i>"})
    assert "<h2>Images" not in page
    assert 'alt="loss curves: loss and its terms"' in page
    assert not re.search("<script>|<b>|<i>", page)


@pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="no Chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_every_image_and_logs_nothing(student, tmp_path, theme):
    page = student / "report.html"
    # The page itself has no script; this copy reports how the browser rendered it.
    probe = (
        "<script>addEventListener('load', () => document.title = JSON.stringify([[...document.images].map(i => "
        "i.complete && i.naturalWidth > 0), getComputedStyle(document.body).backgroundColor]))</script></body>"
    )
    probed = tmp_path / "report.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
        "--dump-dom",
        f"file://{probed}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    title = re.search(r"<title>(.*?)</title>", result.stdout)[1].replace("&quot;", '"')
    assert title == f'[[{",".join(["true"] * 11)}],"rgb({"255, 255, 255" if theme == "light" else "22, 24, 27"})"]'
