"""distill-sd evaluate: one table of cost, fidelity and quality; resuming a stopped run; and what it refuses."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from support import sidecars
from support.stages import reset_accelerate, run_distill, run_teacher_cache, tree
from support.tiny import tiny_pipeline

from pipeline.cli import main
from pipeline.commands import evaluate
from pipeline.demo.evaluate import judge
from pipeline.demo.oracle import score_scenes
from pipeline.demo.scenes import make_scene
from pipeline.evaluation import measure
from pipeline.evaluation.report import write_evaluation
from pipeline.evaluation.table import COSTS, HEAD, WIDTH, Row, as_html, markdown, plain_text, quality_rows, rows_of
from pipeline.models.students import student_config, student_weights
from pipeline.sampling import folder
from pipeline.sampling.generate import Sampler, generate

pytestmark = pytest.mark.usefixtures("few_steps", "remembered_evaluations")

PROMPTS = ["a red cat", "a dog", "three birds", "a house", "the sea"]


@pytest.fixture(scope="module")
def place(teacher, latents, tmp_path_factory):
    """A folder with a student, its teacher, held-out latents and prompts."""
    work = tmp_path_factory.mktemp("evaluate")
    pipe = tiny_pipeline()
    student = UNet2DConditionModel.from_config(student_config(dict(pipe.unet.config), "sd_small"))
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    student.load_state_dict(student_weights(shapes, pipe.unet.state_dict(), "sd_small"))
    pipe.unet = student
    pipe.save_pretrained(work / "student")
    (work / "teacher").symlink_to(teacher)
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    (work / "latents").symlink_to(latents)
    return work


def invoke(place, out, *options):
    arguments = ["evaluate", "--student", place / "student", "--teacher", place / "teacher", "--out", out]
    arguments += ["--device", "cpu", "--num-inference-steps", 2, "--batch-size", 2, "--repeats", 1]
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, *options)])
    reset_accelerate()
    return result


def evaluate_all(place, out, *options):
    inputs = ["--latents", place / "latents", "--entries", 4, "--bins", 5, "--prompts", place / "prompts.txt"]
    return invoke(place, out, *inputs, *options)


@pytest.fixture(scope="module")
def done(place):
    """A run with everything except Inception and CLIP."""
    result = evaluate_all(place, place / "out")
    assert result.exit_code == 0, result.output
    return place / "out", result.stdout


def test_nothing_that_is_shown_holds_a_path(done, place):
    """Other than evaluate.json, which a rerun compares."""
    for file in [done[0] / "evaluation.json", done[0] / "report.html", *done[0].rglob("pictures.json")]:
        assert str(place) not in file.read_text(), file
    assert results(done[0])["teacher"] == {"model": "teacher"}
    assert results(done[0])["settings"]["prompts"] == "prompts.txt"


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(done[0], tmp_path / "out")


def results(out):
    return json.loads((out / "evaluation.json").read_text())


def cells(output, name):
    """The cells of the row with a name, in the printed table; a long note goes on in the lines below."""
    lines = output.splitlines()
    head = next(line for line in lines if re.fullmatch(r" +teacher +student +student / teacher", line))
    ends = [len(name), head.index("teacher ") + 7, head.index(" student ") + 8, len(head)]
    (first,) = [i for i, line in enumerate(lines) if line.startswith((f"{name}  ", f"{name}: "))]
    below = itertools.takewhile(lambda line: line.startswith("    "), lines[first + 1 :])
    if lines[first][len(name)] == ":":
        return [name, "", "", "", " ".join([lines[first][len(name) + 2 :], *map(str.strip, below)])]
    columns = [lines[first][start:end].strip() for start, end in itertools.pairwise(ends)]
    return [name, *columns, " ".join([lines[first][len(head) :].strip(), *map(str.strip, below)]).strip()]


def test_the_table_compares_the_costs_of_student_and_teacher(done, place):
    out, output = done
    counts = {
        name: sum(t.numel() for t in DiffusionPipeline.from_pretrained(place / name).unet.state_dict().values())
        for name in ("teacher", "student")
    }
    ratio = f"{counts['student'] / counts['teacher']:.3f}"
    assert cells(output, "U-Net parameters")[1:4] == [f"{counts['teacher']:,}", f"{counts['student']:,}", ratio]
    cost = results(out)["cost"]
    for name in ("teacher", "student"):
        assert cost[name]["unet_parameters"] == counts[name]
        assert 0 < cost[name]["forward_seconds"] < cost[name]["picture_seconds"]
        assert 1e6 < cost[name]["peak_memory"] < 2e9
        weights = place / name / "unet" / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_size < cost[name]["unet_bytes"] < cost[name]["pipeline_bytes"]
    assert cells(output, "U-Net files")[4] == "fp32"
    for key in ("unet_parameters", "pipeline_parameters", "macs", "unet_bytes", "pipeline_bytes"):
        assert cost["student"][key] < cost["teacher"][key], key


def test_the_table_has_the_errors_over_timesteps_and_per_tap(done):
    out, output = done
    found = results(out)
    assert found["student"]["level"] == "sd_small"
    assert [part["first"] for part in found["fidelity"]["bins"]] == [0, 200, 400, 600, 800]
    for part in found["fidelity"]["bins"]:
        mse = part["output"]["mse"]
        assert mse > 0
        assert cells(output, f"output, timesteps {part['first']} to {part['last']}")[2] == f"{mse:.4g}"
    error = found["fidelity"]["all"]["taps"]["mid_block"]
    expected = [f"{error['mse']:.4g}", "", f"{error['relative']:.2%} of the teacher's mean square"]
    assert cells(output, "mid_block, all timesteps")[2:] == expected


def test_missing_inputs_are_named_with_the_remedy_and_the_rest_runs(done, place, tmp_path):
    assert "--clip FOLDER" in cells(done[1], "CLIP score, 100 cos")[4]
    shutil.copytree(done[0], tmp_path / "out", ignore=shutil.ignore_patterns("pictures", "fidelity.json"))
    result = invoke(place, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "output and taps")[4].startswith("not measured: needs --latents DIR")
    assert cells(result.stdout, "FID, IS, CLIP score")[4].startswith("not measured: needs --prompts FILE")
    assert cells(result.stdout, "U-Net parameters") == cells(done[1], "U-Net parameters")
    assert not (tmp_path / "out" / "pictures").exists()


@pytest.fixture(scope="module")
def int8(place):
    """The student with int8 weights."""
    options = ["--model", place / "student", "--format", "int8", "--out", place / "int8"]
    assert CliRunner().invoke(main, ["export", *map(str, options)]).exit_code == 0
    return place / "int8"


def test_a_student_with_int8_weights_is_evaluated_like_any_other(done, place, int8, tmp_path):
    result = evaluate_all(place, tmp_path / "out", "--student", int8)
    assert result.exit_code == 0, result.output
    exact, found = results(done[0]), results(tmp_path / "out")
    assert found["student"]["level"] == "sd_small"
    for key in ("unet_parameters", "macs"):
        assert found["cost"]["student"][key] == exact["cost"]["student"][key]
    assert found["cost"]["student"]["forward_seconds"] > 0
    errors = [evaluation["fidelity"]["all"]["output"]["mse"] for evaluation in (exact, found)]
    assert errors[0] != errors[1]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_quantised_weights_can_generate_but_not_train_or_teach(place, int8, tmp_path):
    for command in (
        ["finetune", "--model", int8, "--latents", place / "latents", "--out", tmp_path / "out"],
        ["teacher-cache", "--teacher", int8, "--latents", place / "latents", "--out", tmp_path / "out"],
    ):
        result = CliRunner().invoke(main, list(map(str, [*command, "--device", "cpu"])))
        reset_accelerate()
        assert result.exit_code == 2
        assert "has quantised weights, which can be neither trained nor exported. Use the" in result.output
    sample = ["sample", "--model", int8, "--prompts", "a cat", "--out", tmp_path / "images"]
    result = CliRunner().invoke(main, list(map(str, [*sample, "--num-inference-steps", 1, "--device", "cpu"])))
    assert result.exit_code == 0, result.output


def test_the_report_shows_the_table_the_curves_and_the_images(done):
    page = (done[0] / "report.html").read_text()
    assert page.count("<img") == 2 + 2 * len(PROMPTS)
    assert 'alt="errors over timesteps: output"' in page
    for name in ("U-Net parameters", "mid_block, all timesteps", "CLIP score, 100 cos", "num_inference_steps"):
        assert name in page
    assert set(re.findall(r"""(?:src|href)=["']?(.{5})""", page)) == {"data:"}


def test_the_page_has_no_marks_of_markdown_and_of_the_shell(tmp_path):
    result = {"missing": "needs --latents DIR, images encoded with `distill-sd encode`"}
    numbers = dict.fromkeys(COSTS, 1)
    cost = {"device": "cpu", "batch_size": 1, "teacher": numbers, "student": {**numbers, "precision": "fp16"}}
    evaluation = {
        "teacher": {"model": "some/teacher/"},
        "student": {"model": "student/", "level": "sd_small"},
        "cost": cost,
        "fidelity": result,
        "quality": result,
        "settings": {},
    }
    write_evaluation(tmp_path, evaluation, [], {})
    page = (tmp_path / "report.html").read_text()
    assert "<h1>student compared with some/teacher</h1>" in page
    assert "encoded with <code>distill-sd encode</code>" in page
    assert "`" not in page


def test_a_score_of_few_images_says_how_many_it_needs():
    scores = {"fid": {"teacher": 1.0, "student": 2.0}, "facts": {"teacher": 1.0, "student": 0.5}}

    def notes(pictures):
        quality = {"pictures": pictures, "protocol": "p", "scores": scores}
        return [row.note for row in quality_rows(quality)[1:]]

    assert notes(2) == [
        "lower is better; of 2 images, but it takes 10,000 to be reliable",
        "judged by the scenes' oracle; of 2 images, but it takes 100 to be reliable",
    ]
    assert notes(500)[1] == "judged by the scenes' oracle"
    assert notes(10_000)[0] == "lower is better"


def test_the_images_are_those_of_the_pipelines(done, place):
    sampler = Sampler(steps=2, guidance_scale=7.5, batch_size=2, scheduler="pndm")
    for name in ("teacher", "student"):
        expected = generate(DiffusionPipeline.from_pretrained(place / name), PROMPTS, sampler, None).images
        for i, image in enumerate(expected):
            stored = Image.open(done[0] / "pictures" / name / f"{i:06d}.png")
            np.testing.assert_allclose(np.asarray(stored, int), np.asarray(image, int), atol=1)


def test_a_stopped_run_keeps_its_images_and_ends_with_the_same_bytes(done, copied, place, monkeypatch):
    shutil.rmtree(copied / "pictures")
    save, saved = folder.save_image, []

    def stop_at_the_seventh(image, file):
        if len(saved) == 6:
            raise KeyboardInterrupt
        save(image, file)
        saved.append(file)

    monkeypatch.setattr(folder, "save_image", stop_at_the_seventh)
    assert evaluate_all(place, copied).exit_code == 130
    assert sorted(copied.glob("pictures/*/*.png")) == sorted(saved)
    # An image in the middle of a batch is lost as well.
    saved[2].unlink()
    times = {file: file.stat().st_mtime_ns for file in saved if file.exists()}
    monkeypatch.setattr(folder, "save_image", save)
    assert evaluate_all(place, copied).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert tree(copied / "pictures") == tree(done[0] / "pictures")
    assert results(copied)["quality"] == results(done[0])["quality"]


def test_a_rerun_measures_and_generates_nothing(done, copied, place, monkeypatch):
    for name in ("measure_cost", "measure_fidelity", "load_pipeline"):
        monkeypatch.setattr(evaluate, name, lambda *_: pytest.fail("this was already done"))
    result = evaluate_all(place, copied)
    assert result.exit_code == 0, result.output
    before, after = results(done[0]), results(copied)
    assert [after[part] for part in ("cost", "fidelity", "quality")] == [
        before[part] for part in ("cost", "fidelity", "quality")
    ]
    assert cells(result.stdout, "seconds per image") == cells(done[1], "seconds per image")


@pytest.mark.parametrize(
    ("option", "file", "difference"),
    [
        (["--guidance-scale", 3], "cost.json", "sampler.guidance_scale: 7.5 -> 3.0"),
        (["--bins", 4], "fidelity.json", "bins: 5 -> 4"),
        (["--batch-size", 3], "pictures/teacher/pictures.json", "sampler.batch_size: 2 -> 3"),
        (["--level", "bk_base"], "fidelity.json", 'level: "sd_small" -> "bk_base"'),
    ],
)
def test_other_settings_on_the_same_output_are_refused(copied, place, option, file, difference):
    before = tree(copied)
    result = evaluate_all(place, copied, *option)
    assert result.exit_code == 2
    assert f"{copied / file} was made with other settings" in result.output
    assert difference in result.output
    assert tree(copied) == before


def test_other_prompts_latents_or_another_student_are_refused(copied, place, tmp_path):
    (tmp_path / "other.txt").write_text("a cat\n" * len(PROMPTS))
    result = evaluate_all(place, copied, "--prompts", tmp_path / "other.txt")
    assert result.exit_code == 2
    assert "prompts_sha256" in result.output
    result = evaluate_all(place, copied, "--student", place / "teacher")
    assert result.exit_code == 2
    assert "student.unet" in result.output
    others = shutil.copytree(place / "latents", tmp_path / "latents")
    sidecars.of_another_writing(others / "s00000.index")
    result = evaluate_all(place, copied, "--latents", others)
    assert result.exit_code == 2
    assert "shards_sha256" in result.output


def test_fid_inception_and_clip_score_are_in_the_table(done, copied, place, tmp_path, monkeypatch):
    """With a random network as Inception, and the amount of red in an image as its CLIP score."""
    weights = torch.randn(3 * 16, 6, generator=torch.Generator().manual_seed(0))

    def inception(batch):
        features = torch.nn.functional.adaptive_avg_pool2d(batch.float() / 255, 4).flatten(1) @ weights
        return features, features[:, :4]

    monkeypatch.setattr(evaluate, "load_inception", lambda *_: inception)
    monkeypatch.setattr(measure, "clip_score", lambda batches, *_: sum(b[:, 0].float().sum() for b in batches).item())
    monkeypatch.setattr(evaluate, "load_clip", lambda *_: "a CLIP")
    shutil.copytree(copied / "pictures" / "teacher", tmp_path / "real")
    options = ["--reference", tmp_path / "real", "--clip", place, "--picture-size", 16]
    result = evaluate_all(place, copied, *options)
    assert result.exit_code == 0, result.output
    scores = results(copied)["quality"]["scores"]
    assert scores["fid"]["teacher"] == pytest.approx(0, abs=1e-4)
    assert scores["fid"]["student"] > 1e-3
    assert cells(result.stdout, "FID")[2] == f"{scores['fid']['student']:.2f}"
    assert cells(result.stdout, "Inception score")[4] == "not measured: needs at least 20 images; pass more prompts"
    red = [
        np.asarray(Image.open(f).resize((16, 16), Image.Resampling.BICUBIC), float)[..., 0].sum()
        for f in sorted((copied / "pictures" / "student").glob("*.png"))
    ]
    assert scores["clip_score"]["student"] == pytest.approx(sum(red))
    assert "2 PNDM steps, guidance 7.5, measured at 16 px (bicubic)" in result.output


def test_the_inception_score_of_enough_images_is_measured(place, copied, tmp_path, monkeypatch):
    """With images from an earlier run, of two kinds that the network tells apart with certainty."""
    for name in ("teacher", "student"):
        for i in range(20):
            Image.new("RGB", (8, 8), "red" if i % 2 and name == "teacher" else "blue").save(
                copied / "pictures" / name / f"{i:06d}.png"
            )
            (copied / "pictures" / name / "pictures.json").unlink(missing_ok=True)
    (tmp_path / "many.txt").write_text("an image\n" * 20)
    inception = lambda batch: (batch.float().flatten(1), batch[:, [0, 2], 0, 0].float())  # noqa: E731
    monkeypatch.setattr(evaluate, "load_inception", lambda *_: inception)
    result = evaluate_all(place, copied, "--prompts", tmp_path / "many.txt", "--picture-size", 8)
    assert result.exit_code == 0, result.output
    scores = results(copied)["quality"]["scores"]["inception_score"]
    assert scores["student"] == pytest.approx(1)
    assert 1.1 < scores["teacher"] < 2
    assert cells(result.stdout, "Inception score")[1] == f"{scores['teacher']:.2f}"
    assert "needs --reference, a folder of images" in cells(result.stdout, "FID")[4]


def test_scenes_are_judged_by_the_oracle(done, copied, place, tmp_path):
    """With images from an earlier run: scenes, in the wrong order for the student."""
    scenes = [make_scene(5, i) for i in range(6)]
    captions = [scene.caption for scene in scenes]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    shutil.rmtree(copied / "pictures")
    generated = {"teacher": scenes, "student": scenes[1:] + scenes[:1]}
    for name, images in generated.items():
        (copied / "pictures" / name).mkdir(parents=True)
        for i, scene in enumerate(images):
            Image.fromarray(scene.image).save(copied / "pictures" / name / f"{i:06d}.png")
    result = evaluate_all(place, copied, "--prompts", tmp_path / "captions.txt")
    assert result.exit_code == 0, result.output
    expected = {n: judge([Image.fromarray(s.image) for s in images], captions).score for n, images in generated.items()}
    assert results(copied)["quality"]["scores"]["facts"] == pytest.approx(expected)
    assert expected["student"] < expected["teacher"] == 1
    assert cells(result.stdout, "caption facts that hold")[1] == "100.0%"
    assert score_scenes([Image.fromarray(scenes[0].image)], ["a photo"]) is None
    assert "facts" not in results(done[0])["quality"]["scores"]


def test_a_dry_run_shows_what_is_left_and_writes_nothing(copied, place, tmp_path):
    result = evaluate_all(place, tmp_path / "new", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "fidelity: 40 U-Net forward passes" in result.output
    assert "images: 10, 10 still to generate" in result.output
    assert not (tmp_path / "new").exists()
    (copied / "pictures" / "student" / "000001.png").unlink()
    before = tree(copied)
    result = evaluate_all(place, copied, "--dry-run")
    assert "images: 10, 1 still to generate" in result.output
    assert "cost: already measured" in result.output
    assert tree(copied) == before


@pytest.fixture
def bad(place, tmp_path):
    """A folder with inputs that cannot be used."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Märchen".encode("latin-1"))
    pipe = tiny_pipeline(block_out_channels=(8, 8, 16, 16))
    pipe.save_pretrained(tmp_path / "stranger")
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    shutil.copytree(place / "student", tmp_path / "cut")
    (tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    shutil.copytree(place / "student", tmp_path / "torn")
    (tmp_path / "torn" / "model_index.json").write_text("{")
    return tmp_path


def test_bad_input_ends_in_one_message(bad, place):
    cases = {
        "--student {bad}/nowhere": "--student {bad}/nowhere is not a folder",
        "--student {bad}/folder": "has no model_index.json. Use a checkpoint in diffusers layout",
        "--student {bad}/stranger": "is not a student of --teacher",
        "--student {bad}/v": "predicts v_prediction, but --teacher",
        "--student {bad}/cut": "{bad}/cut/unet cannot be loaded",
        "--student {bad}/torn": "{bad}/torn/model_index.json is corrupt",
        "--level sd_tiny": "--level sd_tiny is not the level of --student",
        "--prompts {bad}/empty.txt": "{bad}/empty.txt holds no prompts. Write one prompt per line.",
        "--prompts {bad}/latin.txt": "{bad}/latin.txt is not UTF-8",
        "--prompts {bad}/none.txt": "{bad}/none.txt cannot be read",
        "--latents {bad}/folder": "{bad}/folder has no manifest.json",
        "--clip {bad}/folder": "--clip scores images, and without --prompts there are none",
        "--prompts {place}/prompts.txt --reference {bad}/no.npz": "--reference {bad}/no.npz does not exist",
        "--prompts {place}/prompts.txt --reference {bad}/folder": "--reference {bad}/folder holds 0 images",
        "--prompts {place}/prompts.txt --clip {bad}/folder": "--clip {bad}/folder cannot be loaded",
    }
    for options, message in cases.items():
        result = invoke(place, bad / "out", *options.format(bad=bad, place=place).split())
        assert result.exit_code == 2, (options, result.output)
        assert message.format(bad=bad) in result.output, options
        assert "Traceback" not in result.output
        assert not (bad / "out").exists()


def test_a_disk_without_space_for_the_images_is_reported_before_they_are_generated(copied, place, monkeypatch):
    shutil.rmtree(copied / "pictures")
    monkeypatch.setattr("pipeline.system.disk.free_bytes", lambda _: 10)
    result = evaluate_all(place, copied)
    assert result.exit_code == 2
    assert (
        "its disk has only 10 bytes free. Free some space, choose an --out on another disk, or pass fewer prompts"
        in result.output
    )
    assert not list(copied.glob("pictures/*/*.png"))


def test_a_corrupt_result_is_named(copied, place):
    (copied / "cost.json").write_text("{")
    result = evaluate_all(place, copied)
    assert result.exit_code == 2
    assert f"{copied / 'cost.json'} is corrupt" in result.output
    assert "Delete it to measure it again." in result.output


def test_a_table_has_aligned_columns_and_escapes_markup():
    rows = [Row("a heading"), Row("a|b <i>", "1", "2", "2.000", "note")]
    lines = markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[2].strip() == HEAD[1]
    assert "**a heading**" in lines[2]
    assert "a\\|b <i>" in lines[3]
    assert "<i>" not in as_html(rows)


def test_the_table_fits_a_terminal():
    rows = [
        Row("a heading " * 20),
        Row("seconds", "1.5", "0.75", "0.500", "one batch"),
        Row("output", student="2", note="a long note " * 12),
        Row("FID", note="not measured: " + "needs this " * 15),
    ]
    lines = plain_text(rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "seconds      1.5     0.75              0.500  one batch" in lines
    words = " ".join(" ".join(lines).split())
    assert all(" ".join(row.note.split()) in words for row in rows)


def test_the_results_are_added_to_the_card_of_a_distilled_student(place, teacher, tmp_path):
    cache = run_teacher_cache(teacher, place / "latents", tmp_path / "cache", rounds=1)
    student = run_distill(cache, tmp_path / "student", max_train_steps=1)
    readme = student / "README.md"
    by_hand = "## Notes\n\nMine.\n"
    readme.write_text(readme.read_text() + f"\n{by_hand}")
    before = readme.read_text()
    result = invoke(place, tmp_path / "out", "--student", student)
    assert result.exit_code == 0, result.output
    assert readme.read_text() == before
    # The figures are all that it needs.
    shutil.rmtree(cache)
    (student / "distill.json").write_text("{")
    result = invoke(place, tmp_path / "out", "--student", student, "--update-card")
    assert result.exit_code == 0, result.output
    assert f"Added the results to the model card {student / 'README.md'}." in result.output
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    card = (student / "README.md").read_text()
    assert markdown(rows_of(evaluation)) in card
    assert "Training losses at step 1" in card
    assert card.startswith(before.partition("## Results")[0])
    assert card.endswith(before[before.index("## Licence") :])
    invoke(place, tmp_path / "out", "--student", student, "--update-card")
    assert readme.read_text() == card
    readme.write_text(card.replace("## Results", "## Figures"))
    result = invoke(place, tmp_path / "second", "--student", student, "--update-card")
    assert result.exit_code == 2
    assert f"{readme} has no section Results. Add a line `## Results` to it" in result.output
    assert not (tmp_path / "second").exists()
    assert str(tmp_path) not in card
    assert str(place) not in card + (student / "evaluation.json").read_text()


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_results_are_not_written_over_a_pipeline(place, name):
    result = invoke(place, place / name)
    assert result.exit_code == 2
    assert f"--out {place / name} is the same directory as --{name}. Choose another one." in result.output
