"""--out of every command: new, empty, or made by the same command; never an input, in one, or around one."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.stages import reset_accelerate, run_distill, run_encode, run_teacher_cache, tree

from pipeline.cli import main
from pipeline.system.errors import UserError
from pipeline.system.output import check_new, check_output, writer_of
from pipeline.training.transform import Transform


@pytest.fixture(scope="module")
def work(teacher, images, tmp_path_factory):
    """One output of each kind: latents, cache, student; and the inputs, teacher and images."""
    place = tmp_path_factory.mktemp("outputs")
    shutil.copytree(teacher, place / "teacher")
    shutil.copytree(images, place / "images")
    run_encode(place / "teacher", place / "images", place / "latents")
    run_teacher_cache(place / "teacher", place / "latents", place / "cache", rounds=1)
    run_distill(place / "cache", place / "student", max_train_steps=1)
    (place / "prompts.txt").write_text("a tree\n")
    (place / "notes").mkdir()
    (place / "notes" / "thesis.txt").write_text("a user's own")
    (place / "cut").mkdir()
    (place / "cut" / "spec.json").write_text('{"seed"')
    (place / "cut" / "finished.json").write_text('{"step": 1}')
    return place


COMMANDS = {
    "encode": "encode --teacher {w}/teacher --data {w}/images --resolution 32",
    "teacher-cache": "teacher-cache --teacher {w}/teacher --latents {w}/latents",
    "distill": "distill --cache {w}/cache --level sd_small --max-train-steps 1 --learning-rate 1e-3 "
    "--train-batch-size 3",
    "finetune": "finetune --model {w}/student --latents {w}/latents --max-train-steps 1",
    "evaluate": "evaluate --student {w}/student --teacher {w}/teacher",
    "sample": "sample --model {w}/student --prompts tree",
    "export": "export --model {w}/student --format int8",
    "download": "download --urls {w}/list.parquet --img2dataset true",
    "demo-scenes": "demo-scenes --count 1",
    "demo-teacher": "demo-teacher --work {w}/new-work",
}
# Directories that none of them may write, by what is said of them.
FOREIGN = {
    "notes": "thesis.txt",
    "images": "",
    "teacher": "",
    "cache/base": "",
    "cache/students/sd_small": "",
    "cache/new": "lies in",
    "images/new": "lies in",
    "student/unet": "",
    "student/new": "lies in",
    "prompts.txt": "",
    "prompts.txt/below": "prompts.txt",
    ".": "",
}
OWN = {"encode": "latents", "teacher-cache": "cache", "distill": "student"}


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    return result


def refused(work, command, out):
    """Run a command with that --out; returns its message. Nothing may have changed."""
    before = tree(work)
    result = invoke(*COMMANDS[command].format(w=work).split(), "--out", out)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert tree(work) == before
    return result.output


@pytest.mark.parametrize("place", FOREIGN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_of_something_else_is_refused_and_left_as_it_is(command, place, work):
    message = refused(work, command, work / place)
    assert "--out" in message
    assert FOREIGN[place] in message or "already exists" in message
    assert "hoose" in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("owner", OWN)
def test_the_output_of_another_command_is_refused(command, owner, work):
    if command != owner:
        message = refused(work, command, work / OWN[owner])
        said = ("the output of", "is the same directory as", "already exists", "tars that this command did not create")
        assert any(words in message for words in said)


def test_other_spellings_of_the_same_place_are_seen_through(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work / "cache")
    (tmp_path / "link").symlink_to(work)
    for spelling in ("../student", "./../latents/../student", tmp_path / "link" / "student", "../student/"):
        assert "is the same directory as --model" in refused(work, "finetune", spelling)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a link to" in refused(work, "encode", tmp_path / "dangling")


def test_an_output_around_an_input_is_refused(work, tmp_path):
    shutil.copytree(work / "latents", tmp_path / "out")
    shutil.copytree(work / "images", tmp_path / "out" / "images")
    arguments = ["--teacher", work / "teacher", "--data", tmp_path / "out" / "images", "--resolution", 32]
    result = invoke("encode", *arguments, "--out", tmp_path / "out")
    assert (result.exit_code, "contains --data" in result.output) == (2, True)


@pytest.mark.parametrize("place", ["cache", "cache/base", "student", "student/unet", "latents", "images"])
def test_a_single_file_goes_into_nobodys_output(place, work):
    before = tree(work)
    out = work / place / "new.safetensors"
    result = invoke("export", "--model", work / "student", "--format", "single-file", "--out", out)
    assert (result.exit_code, "lies in" in result.output) == (2, True), result.output
    assert tree(work) == before


@pytest.mark.parametrize("command", ["encode", "teacher-cache", "distill", "finetune", "evaluate"])
def test_a_dry_run_refuses_what_the_run_refuses(command, work):
    result = invoke(*COMMANDS[command].format(w=work).split(), "--out", work / "notes", "--dry-run")
    assert (result.exit_code, "thesis.txt" in result.output) == (2, True)


def test_an_empty_directory_will_do_whatever_a_system_put_there(work, tmp_path):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    (out / ".DS_Store").write_bytes(b"")
    link = tmp_path / "link"
    link.symlink_to(out)
    assert invoke(*COMMANDS["encode"].format(w=work).split(), "--out", link, "--device", "cpu").exit_code == 0
    assert (out / "manifest.json").is_file()
    check_new(tmp_path / "new", "sample", {})
    (tmp_path / "new").mkdir()
    check_new(tmp_path / "new", "sample", {})


def test_latents_that_were_begun_before_their_manifest_are_the_commands_own(work, tmp_path):
    (tmp_path / "empty_prompt_embeds.npy").write_bytes(b"begun")
    assert invoke(*COMMANDS["encode"].format(w=work).split(), "--out", tmp_path, "--device", "cpu").exit_code == 0


def test_a_directory_of_an_earlier_version_is_known_by_what_it_holds(work):
    assert [writer_of(work / name) for name in ("latents", "cache", "student")] == [
        "encode",
        "teacher-cache",
        "distill",
    ]
    assert writer_of(work / "notes") is None


def test_a_hub_name_or_demo_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    check_output(Path("demo"), "encode", {"--teacher": "demo", "--data": "owner/name"})
    with pytest.raises(UserError, match="is the same directory as --data"):
        check_output(Path("demo"), "encode", {"--data": "demo"})


@pytest.mark.parametrize("name", ["spec.json", "finished.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_record_of_a_training_is_named(name, content, work, tmp_path):
    out = shutil.copytree(work / "student", tmp_path / "student")
    (out / name).write_text(content)
    result = invoke(*COMMANDS["distill"].format(w=work).split(), "--out", out, "--device", "cpu", "--no-report")
    assert result.exit_code == 2, result.output
    assert f"{out / name} is corrupt" in result.output.splitlines()[-1]


def test_an_impossible_step_is_named(work, tmp_path):
    out = shutil.copytree(work / "student", tmp_path / "student")
    (out / "finished.json").write_text('{"step": "many"}')
    with pytest.raises(UserError, match="finished.json states the step 'many'. Delete it"):
        run_distill(work / "cache", out, max_train_steps=1)
    (out / "finished.json").unlink()
    run_distill(work / "cache", out, max_train_steps=1)
    assert json.loads((out / "finished.json").read_text())["step"] == 1


def test_a_student_that_is_being_replaced_is_not_finished(work, tmp_path, monkeypatch):
    out = shutil.copytree(work / "student", tmp_path / "student")

    def killed(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Transform, "convert", killed)
        with pytest.raises(MemoryError):
            run_distill(work / "cache", out, max_train_steps=2)
    reset_accelerate()
    run_distill(work / "cache", out, max_train_steps=1)
    assert json.loads((out / "finished.json").read_text())["step"] == 2
    assert (out / "model_index.json").is_file()


def test_a_training_without_its_spec_is_refused(work, tmp_path):
    out = shutil.copytree(work / "student", tmp_path / "student")
    (out / "spec.json").unlink()
    with pytest.raises(UserError, match="holds a training without its spec.json"):
        run_distill(work / "cache", out, max_train_steps=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_named(work, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "closed" in refused(work, "encode", tmp_path / "closed" / "out")


def test_the_record_of_an_evaluation_makes_it_evaluates_own(tmp_path):
    (tmp_path / "evaluate.json").write_text(json.dumps({"student": "s"}))
    assert writer_of(tmp_path) == "evaluate"
