"""What an actor of `--engine ray` does first: load the networks and check that they, and the output, are the run's.

It gets settings and names, and never a tensor. A node may have another teacher under the same name, other versions of
the libraries, or another disk, so everything that the manifest states is compared, as a job of --shard-range does.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any, TypeVar

import torch

from pipeline.cache.cache_spec import cache_spec
from pipeline.cache.calibrate import calibrations_on, learn
from pipeline.cache.latents_spec import in_buckets, latents_spec, settled
from pipeline.cache.latents_writer import LatentsWriter, encoders_on
from pipeline.cache.output import existing_manifest
from pipeline.cache.targets import Teacher
from pipeline.cache.targets_writer import TargetsWriter, teacher_on
from pipeline.data.source import open_source
from pipeline.models.load import family_of, find_pipeline, load_base, load_unet
from pipeline.models.schedule import load_noise_scheduler
from pipeline.settings.encode import EncodeSettings
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.compiling import compile_failures
from pipeline.system.device import process_state
from pipeline.system.errors import UserError
from pipeline.system.options import ENGINES
from pipeline.system.ray_cluster import Cluster
from shards.cache import open_images
from shards.calibration import Calibration
from shards.location import Location
from shards.manifest import Manifest, refuse_other_spec
from shards.reader import ShardSet
from shards.schema import MANIFEST
from shards.store import open_store

Stage = TypeVar("Stage", EncodeSettings, TeacherCacheSettings)


def for_actors(settings: Stage, cluster: Cluster, **changes: Any) -> Stage:
    """The settings of a command as its actors get them."""
    device: dict[str, Any] = {} if cluster.gpus else {"device": "cpu"}
    own: dict[str, Any] = {"engine": ENGINES[0], "ray_address": None, "gpus_per_actor": None, "cpus_per_actor": 1}
    return replace(settings, **own, **device, **changes)


def open_latents_writer(settings: EncodeSettings, spec_sha256: str) -> LatentsWriter:
    """What an actor of `encode` holds. Raises UserError if the node does not fit the output."""
    device = device_of(settings.device)
    manifest = manifest_here(settings.out, "latents", spec_sha256)
    source = open_source(settings)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    family, base = family_of(folder), load_base(folder, settings.variant)
    source, spec, _ = in_buckets(settings, source, latents_spec(settings, source, folder, base), base)
    refuse_other_spec(settings.out, manifest.spec, settled(settings, source, spec))
    with compile_failures(settings.compile):
        encoders_on(device, base, family, settings)
    return LatentsWriter(settings, manifest, source, base, family)


def open_targets_writer(settings: TeacherCacheSettings, spec_sha256: str) -> TargetsWriter:
    """What an actor of `teacher-cache` holds. Raises UserError if the node does not fit the output."""
    manifest, images, teacher = teacher_here(settings, spec_sha256)
    calibrations = calibrations_on(teacher.unet.device, settings.out, manifest)
    return TargetsWriter(settings, manifest, images, replace(teacher, calibrations=calibrations))


def learned_here(settings: TeacherCacheSettings, spec_sha256: str) -> dict[str, Calibration]:
    """The calibrations of the taps, learned on this node."""
    manifest, images, teacher = teacher_here(settings, spec_sha256)
    with compile_failures(settings.compile):
        return learn(images, manifest.spec, teacher, settings.batch_size)


def teacher_here(settings: TeacherCacheSettings, spec_sha256: str) -> tuple[Manifest, ShardSet, Teacher]:
    """The cache's manifest and images, and the teacher on this process's device, without calibrations."""
    device = device_of(settings.device)
    manifest = manifest_here(settings.out, "cache", spec_sha256)
    images = open_images(open_store(settings.out), manifest)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    unet = load_unet(folder, settings.variant, as_stored=True)
    noise_scheduler = load_noise_scheduler(folder, settings.prediction_type)
    spec = cache_spec(settings, images, unet, noise_scheduler, device)
    refuse_other_spec(settings.out, manifest.spec, spec)
    return manifest, images, teacher_on(device, unet, noise_scheduler, spec, images, compile=settings.compile)


def device_of(device: str) -> torch.device:
    """The device of this process, which ray gave a GPU unless `device` is the CPU."""
    found = process_state(device).device
    if device != "cpu" and found.type == "cpu":
        raise UserError(
            f"torch finds no GPU on the node {socket.gethostname()}, though ray gives one to each actor. Install a "
            "torch that fits its driver, or run with --gpus-per-actor 0."
        )
    return found


def manifest_here(out: Location, stage: str, spec_sha256: str) -> Manifest:
    """The manifest of the output as this node sees it. Raises UserError if it is not the one of this run."""
    found = existing_manifest(out, stage)
    if found is None or found.spec_sha256 != spec_sha256:
        seen = "does not see" if found is None else "sees another file as"
        raise UserError(
            f"the node {socket.gethostname()} {seen} {out / MANIFEST}. All nodes of the cluster must share the disk of "
            "--out, under the same path; or write to a bucket, such as s3://bucket/name."
        )
    return found
