"""Running the stages in this process, and reading what they wrote."""

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from pipeline.commands import distill, encode, teacher_cache
from pipeline.distill import DistillSettings
from pipeline.encode import EncodeSettings
from pipeline.models.students import student_config, student_weights
from pipeline.teacher_cache import TeacherCacheSettings
from shards import codec, rotated_codec
from shards.cache import Cache
from shards.calibration import Calibration
from shards.manifest import Manifest, write_manifest
from shards.reader import ShardSet, StoredEntry
from shards.schema import BLOCK
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard
from support.tiny import tiny_pipeline


def reset_accelerate() -> None:
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def run_encode(teacher: Path | str, data: Path | str, out: Path, **changes) -> Path:
    settings = {"resolution": 32, "batch_size": 4, "entries_per_shard": 5, "device": "cpu", **changes}
    encode.run(EncodeSettings(teacher=str(teacher), data=str(data), out=out, **settings))
    reset_accelerate()
    return out


def run_teacher_cache(teacher: Path | str, latents: Path, out: Path, **changes) -> Path:
    settings = {
        "rounds": 2,
        "tokens": 16,
        "batch_size": 6,
        "entries_per_shard": 6,
        "device": "cpu",
        "samples": 0,
        **changes,
    }
    teacher_cache.run(TeacherCacheSettings(teacher=str(teacher), latents=latents, out=out, **settings))
    reset_accelerate()
    return out


def run_distill(cache: Path, out: Path, **changes) -> Path:
    quick = {"max_train_steps": 4, "train_batch_size": 3, "dataloader_num_workers": 0, "logging_steps": 1}
    settings = {"level": "sd_small", "learning_rate": 1e-3, "device": "cpu", "report": False, **quick, **changes}
    distill.run(DistillSettings(cache=cache, out=out, **settings))
    reset_accelerate()
    return out


def pruned_pipeline(level: str, **unet_changes) -> StableDiffusionPipeline:
    """The tiny teacher with the untrained student of a level in its U-Net's place."""
    pipe = tiny_pipeline(**unet_changes)
    student = UNet2DConditionModel.from_config(student_config(dict(pipe.unet.config), level))
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    student.load_state_dict(student_weights(shapes, pipe.unet.state_dict(), level))
    pipe.register_modules(unet=student.eval())
    return pipe


def prepared(cache: Path, out: Path, **changes) -> tuple[DistillSettings, distill.Training]:
    """A training about to take its first step, in this process."""
    settings = DistillSettings(cache=cache, out=out, device="cpu", dataloader_num_workers=0, **changes)
    return settings, distill.prepare(settings, distill.open_cache(settings), Accelerator(cpu=True))


def read_entries(directory: Path, stage: str, tensors: list[str]):
    shards = Cache(open_store(directory)) if stage == "cache" else ShardSet(open_store(directory), stage)
    return [shards.read(i, tensors) for i in range(len(shards))]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def shard_files(directory: Path) -> dict[str, bytes]:
    """The tars and their sidecars."""
    return {
        name: data
        for name, data in tree(directory).items()
        if name.endswith((".tar", ".index")) or name.startswith(("s0", "r0"))
    }


def bytes_per_entry(directory: Path, shards: list[str]) -> float:
    """The mean bytes on disk of the entries of some shards: their members in the tars, their rows in the sidecars.

    A tar is filled up to 10 KB, which is much beside entries as small as those of tests.
    """
    size, count = 0, 0
    for name in shards:
        head, _, table = (directory / f"{name}.index").read_bytes().partition(b"\n")
        with tarfile.open(directory / f"{name}.tar") as tar:
            size += sum(BLOCK + -(-member.size // BLOCK) * BLOCK for member in tar) + len(table)
        count += json.loads(head)["count"]
    return size / count


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_dict_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def first(iterable, count: int) -> list:
    return list(itertools.islice(iterable, count))


def as_an_earlier_version_wrote_it(cache: Path) -> None:
    """Rewrite a cache in format 1, with a manifest that states nothing of base/ and students/ and has no hash."""
    opened = Cache(open_store(cache))
    known, old = opened.calibrations(), Manifest(opened.manifest.spec, opened.manifest.rounds, version=1)
    index = 0
    for shard in opened.manifest.plan:
        entries = [format_1_entry(opened.read(index + i, opened.tensors), known) for i in range(len(shard.indices))]
        index += len(entries)
        write_shard(open_store(cache), shard.name, old, entries, [])
        (cache / opened.manifest.sidecar_name(shard.name)).unlink()
    write_manifest(open_store(cache), old)
    content = json.loads((cache / "manifest.json").read_text())
    del content["sha256"]
    (cache / "manifest.json").write_text(json.dumps(content))
    shutil.rmtree(cache / "images")
    (cache / "calibration.safetensors").unlink()


def format_1_entry(entry: StoredEntry, known: dict[str, Calibration]) -> EntryBuilder:
    """An entry that holds its image, and taps that are quantised about their own means."""
    written = EntryBuilder(entry.key, entry.meta)
    for name, tensor in entry.tensors.items():
        tap = name.removeprefix("tap.")
        if tap not in known:
            written.add_array(name, tensor.values)
            continue
        record = entry.meta["taps"][tap]
        values = rotated_codec.dequantise(tensor.values, known[tap], record["step"], record["dither"])
        q, mu, step = codec.quantise(values, 20.0, record["dither"])
        record["step"] = float(step)
        written.add_compressed(name, *codec.pack_quantised(q, mu))
    return written
