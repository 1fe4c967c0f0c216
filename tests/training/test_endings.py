"""The end of a training: memory is given back, what fails there keeps the student, and no path is published."""

import gc
import json
import re
import shutil
import sys
import weakref

import huggingface_hub.utils
import pytest
import torch
from support.stages import as_an_earlier_version_wrote_it, run_distill, run_teacher_cache
from support.tiny import tiny_pipeline

from pipeline.commands import distill, finetune, teacher_cache
from pipeline.commands.finetune import FinetuneSettings
from pipeline.sampling.process import generating_process
from pipeline.system.errors import UserError
from pipeline.training.objective import Objective

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def work(latents, cache_of_one_round, tmp_path_factory):
    """Latents, and a cache with the teacher's images."""
    place = tmp_path_factory.mktemp("endings")
    (place / "latents").symlink_to(latents)
    shutil.copytree(cache_of_one_round, place / "cache")
    pictures = tiny_images(1)
    teacher_cache.save_images(pictures, teacher_cache.Sampler(), place / "cache" / "samples")
    return place


def tiny_images(count):
    from pipeline.sampling.generate import Sampler, generate

    return generate(tiny_pipeline(), ["a cat"] * count, Sampler(steps=1), None)


def watched(monkeypatch, module, found):
    """`generate_in_process` that notes whether the tensors in `found` live where a process for images would start."""
    alive = []

    def note(model, prompts, sampler, description):
        # What the new process does first in this one.
        with generating_process(model):
            alive.append([name for name, reference in found.items() if reference() is not None])
        return tiny_images(len(prompts))

    monkeypatch.setattr(module, "generate_in_process", note)
    return alive


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_students_memory_is_free_when_the_report_is_drawn(work, tmp_path, monkeypatch, mixed_precision):
    found = {}
    real = distill.prepare

    def prepare(*arguments):
        training = real(*arguments)
        found["student"] = weakref.ref(training.student)
        found["weights"] = weakref.ref(next(training.student.parameters()))
        found["average"] = weakref.ref(training.ema.shadow_params[0])
        found["optimizer"] = weakref.ref(training.optimizer.optimizer)
        return training

    monkeypatch.setattr(distill, "prepare", prepare)
    alive = watched(monkeypatch, distill, found)
    gc.disable()
    try:
        run_distill(
            work / "cache",
            tmp_path / "out",
            report=True,
            use_ema=True,
            mixed_precision=mixed_precision,
            max_train_steps=2,
        )
    finally:
        gc.enable()
    assert len(found) == 4
    assert alive == [[], []]


def test_the_teachers_memory_is_free_when_its_images_are_drawn(work, teacher, tmp_path, monkeypatch):
    found = {}
    real = teacher_cache.load_unet

    def load_unet(*arguments, **options):
        unet = real(*arguments, **options)
        found["weights"] = weakref.ref(next(unet.parameters()))
        found["teacher"] = weakref.ref(unet)
        return unet

    monkeypatch.setattr(teacher_cache, "load_unet", load_unet)
    alive = watched(monkeypatch, teacher_cache, found)
    gc.disable()
    try:
        run_teacher_cache(teacher, work / "latents", tmp_path / "cache", rounds=1, samples=1)
    finally:
        gc.enable()
    assert alive == [[]]


FAILURES = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "disk": OSError(28, "No space left on device"),
    "killed": RuntimeError("A process in the process pool was terminated abruptly"),
}


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_a_report_that_fails_keeps_the_student_and_is_written_by_the_same_command(
    work, tmp_path, monkeypatch, error, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(distill, "generate_in_process", failing(error))
        with pytest.raises(UserError, match="holds the finished student, but its report could not be .*same command"):
            run_distill(work / "cache", out, report=True, max_train_steps=1)
    assert "student of 1 step " in capsys.readouterr().out
    assert json.loads((out / "finished.json").read_text())["step"] == 1
    monkeypatch.setattr(distill, "generate_in_process", lambda *arguments: tiny_images(1))
    run_distill(work / "cache", out, report=True, max_train_steps=1)
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("use_ema", [False, True])
def test_validation_images_that_fail_do_not_end_the_training(work, tmp_path, monkeypatch, use_ema):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    settings = {"use_ema": use_ema, "max_train_steps": 2}
    whole = run_distill(work / "cache", tmp_path / "whole", **settings)
    monkeypatch.setattr("pipeline.training.validation.generate", failing(FAILURES["memory"]))
    with pytest.raises(UserError, match="validation images of step 1 failed .CUDA out of memory.*distill-sd sample"):
        run_distill(work / "cache", tmp_path / "out", validation_prompts=prompts, validation_steps=1, **settings)
    assert weights(tmp_path / "out") == weights(whole)


def weights(out):
    return (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_scheduler_that_cannot_generate_is_refused_before_training(work, tmp_path):
    cache = shutil.copytree(work / "cache", tmp_path / "cache")
    path = cache / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "unknown"}))
    (cache / "base" / "checksums.json").unlink()
    as_an_earlier_version_wrote_it(cache)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    with pytest.raises(UserError, match="unknown"):
        run_distill(cache, tmp_path / "out", validation_prompts=prompts)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "told"), [("origin.json", "origin.json"), ("samples/samples.json", "samples cannot")])
def test_what_only_the_end_needs_is_read_at_the_start(work, tmp_path, name, told):
    cache = shutil.copytree(work / "cache", tmp_path / "cache")
    (cache / name).write_bytes((cache / name).read_bytes()[:20])
    with pytest.raises(UserError, match=told):
        run_distill(cache, tmp_path / "out", report=True)
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_start_is_refused_before_training(work, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", failing(ValueError("no API key")))
    with pytest.raises(UserError, match="--report-to tensorboard could not be started .no API key"):
        run_distill(work / "cache", tmp_path / "out", report_to="tensorboard")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


class Hub:
    """Stands in for huggingface_hub's HfApi, and keeps what is uploaded."""

    def __init__(self, kept, create=None, upload=None):
        self.kept, self.create, self.upload = kept, create, upload

    def create_repo(self, *arguments, **options):
        if self.create:
            raise self.create

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        from huggingface_hub.utils import filter_repo_objects

        if self.upload:
            raise self.upload
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            self.kept[name] = (folder_path / name).read_bytes()
        return "https://hub/commit/1"


# The library that huggingface_hub asks with.
HTTP = sys.modules[type(huggingface_hub.utils.get_session()).__module__.partition(".")[0]]


@pytest.mark.parametrize("error", [HTTP.ConnectError("no route"), HTTP.ReadTimeout("slow"), OSError("reset")])
def test_a_network_that_fails_is_told_before_and_after_training(work, tmp_path, monkeypatch, error):
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub({}, create=error))
    with pytest.raises(UserError, match=f"--push-to-hub me/student cannot be written .{error}"):
        run_distill(work / "cache", tmp_path / "out", push_to_hub="me/student", max_train_steps=1)
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub({}, upload=error))
    with pytest.raises(UserError, match=f"is finished but was not uploaded .{error}"):
        run_distill(work / "cache", tmp_path / "out", push_to_hub="me/student", max_train_steps=1)
    assert json.loads((tmp_path / "out" / "finished.json").read_text())["step"] == 1


def test_a_student_is_uploaded_though_its_report_failed(work, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub(kept))
    monkeypatch.setattr(distill, "generate_in_process", failing(FAILURES["disk"]))
    with pytest.raises(UserError, match="its report could not be written"):
        run_distill(work / "cache", tmp_path / "out", push_to_hub="me/student", report=True, max_train_steps=1)
    assert "unet/diffusion_pytorch_model.safetensors" in kept


def named_here(kept, folders):
    """The uploaded files that name one of the folders."""
    return sorted(name for name, data in kept.items() if any(str(folder).encode() in data for folder in folders))


def test_no_path_of_this_machine_is_uploaded(work, teacher, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub(kept))
    monkeypatch.setattr(distill, "generate_in_process", lambda *arguments: tiny_images(1))
    prompts = tmp_path / "customer.txt"
    prompts.write_text("a red cat")
    options = {"report": True, "report_to": "tensorboard", "validation_prompts": prompts, "validation_steps": 1}
    init_from = run_distill(work / "cache", tmp_path / "first", max_train_steps=1)
    run_distill(work / "cache", tmp_path / "out", push_to_hub="me/s", max_train_steps=1, init_from=init_from, **options)
    assert {"README.md", "report.html", "model_index.json"} <= kept.keys()
    assert named_here(kept, [tmp_path, work, teacher]) == []
    assert not [name for name in kept if name.startswith(("checkpoints", "logs", "validation"))]
    kept.clear()
    settings = {"max_train_steps": 1, "device": "cpu", "push_to_hub": "me/s", "report": False}
    finetune.run(FinetuneSettings(model=str(init_from), latents=work / "latents", out=tmp_path / "tuned", **settings))
    assert "model_index.json" in kept
    assert named_here(kept, [tmp_path, work, teacher]) == []


def poisoned(at):
    real, calls = Objective.losses, []

    def losses(self, batch, *others):
        calls.append(batch.keys)
        terms = real(self, batch, *others)
        return {**terms, "task": terms["task"] * float("nan")} if len(calls) == at else terms

    return losses, calls


def test_a_loss_that_is_not_finite_from_the_start_is_not_the_learning_rates(work, tmp_path, monkeypatch):
    losses, calls = poisoned(1)
    monkeypatch.setattr(Objective, "losses", losses)
    with pytest.raises(UserError) as caught:
        run_distill(work / "cache", tmp_path / "out", train_batch_size=5, logging_steps=3, max_train_steps=3)
    message = str(caught.value)
    assert f"first with the entries {', '.join(calls[0][:3])} and 2 more. " in message
    assert f"before the first step: check the entries with `distill-sd verify --full {work / 'cache'}`" in message
    assert "learning-rate" not in message


@pytest.mark.parametrize(
    ("precision", "remedy"),
    [("no", "Lower --learning-rate."), ("bf16", "Lower --learning-rate, or use --mixed-precision no.")],
)
def test_a_loss_that_is_not_finite_later_may_be(work, tmp_path, monkeypatch, precision, remedy):
    losses, calls = poisoned(3)
    monkeypatch.setattr(Objective, "losses", losses)
    with pytest.raises(UserError) as caught:
        run_distill(work / "cache", tmp_path / "out", mixed_precision=precision)
    assert re.search(rf"by step 3 .*first with the entries {', '.join(calls[2])}\. ", str(caught.value))
    assert str(caught.value).endswith(remedy)
