"""The manifest: an immutable spec of what the shards of a set contain, with its own hash."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shards.buckets import BUCKETS, bucket_at, counts, image_ends, of_bucket
from shards.plan import MAX_ENTRIES, ShardPlan, counts_problem
from shards.regular import NotRegularError
from shards.schema import (
    CALIBRATION,
    FORMAT_VERSION,
    MANIFEST,
    READABLE_VERSIONS,
    SHAPE_SUFFIX,
    SIDECAR_ENDINGS,
    ShardError,
    json_bytes,
    sidecar_name,
)
from shards.store import LocalStore, Store

# What a set can hold, and the command that writes it.
STAGE_COMMANDS = {"latents": "encode", "cache": "teacher-cache"}
# Fields of specs that earlier versions did not state.
ADDED_LATER = ("configs", "tokenizer_sha256", "teacher_config", "model_config", "noise_scheduler", "shards_sha256")
RESTORE = "Restore it from a backup or regenerate the directory"


@dataclass(frozen=True)
class Manifest:
    """`spec` never changes once written. `rounds` (None for latents) may grow, which changes no existing shard.

    `files` gives the sha256 of the files next to the shards, by name; of a folder, that of its list of checksums. The
    manifest of a cache is `sealed` by a hash of all its fields, unless an earlier version wrote it. `version` is the
    format's. `in_cache` says that the set is the images of a cache. A cache with a `window` is a rolling one: of its
    rounds about so many are there at a time (see `readers`).
    """

    spec: dict[str, Any]
    rounds: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    sealed: bool = True
    version: int = FORMAT_VERSION
    in_cache: bool = False
    window: int | None = None

    @functools.cached_property
    def spec_sha256(self) -> str:
        return sha256_of_json(self.spec)

    @property
    def seal(self) -> str:
        """The sha256 of everything that the manifest states."""
        stated = {"format": self.version, "spec_sha256": self.spec_sha256, "rounds": self.rounds, "files": self.files}
        return sha256_of_json(stated | ({} if self.window is None else {"window": self.window}))

    @functools.cached_property
    def plan(self) -> ShardPlan:
        spec = self.spec
        return ShardPlan(spec["entries"], spec["entries_per_shard"], self.rounds, self.version, counts(spec))

    @functools.cached_property
    def image_ends(self) -> list[int]:
        return image_ends(self.spec)

    def bucket_of(self, image: int) -> int:
        """The bucket of the image at a place in the input; 0 without buckets. Raises ShardError if there is none."""
        return bucket_at(self.image_ends, image)

    @property
    def is_cache(self) -> bool:
        return self.spec["stage"] == "cache"

    @property
    def has_own_images(self) -> bool:
        """Whether the entries hold the tensors of their images: those of latents, and of a cache of format 1."""
        return not self.is_cache or self.version == 1

    @property
    def calibration_sha256(self) -> str | None:
        """The hash of the calibrations that the taps of a cache are stored with; None if there are none."""
        return self.files.get(CALIBRATION)

    @property
    def command(self) -> str:
        """The command that writes what is missing."""
        return STAGE_COMMANDS["cache" if self.in_cache else self.spec["stage"]]

    def sidecar_name(self, shard: str) -> str:
        return sidecar_name(shard, self.version)

    def files_of(self, shards: Iterable[str]) -> str:
        """The files of shards, for a message that says what to delete."""
        return ", ".join(f"{name} and {self.sidecar_name(name)}" for name in shards)

    @property
    def rewrite(self) -> str:
        """How a user gets a damaged shard back."""
        if self.is_cache and self.version == 1:
            return "Restore its files from a backup; this version does not write caches of format 1."
        ending = SIDECAR_ENDINGS[self.version]
        if self.in_cache:
            return (
                f"Restore it from a backup, or delete its .tar and {ending} and rerun `distill-sd teacher-cache` with "
                "the latents that the cache was made from."
            )
        return f"Delete this shard's .tar and {ending} and rerun the stage, which rewrites only them."


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(store: Store, manifest: Manifest) -> None:
    content = {
        "format": manifest.version,
        "spec_sha256": manifest.spec_sha256,
        "rounds": manifest.rounds,
        **({} if manifest.window is None else {"window": manifest.window}),
        "files": manifest.files if manifest.version == 1 else dict(sorted(manifest.files.items())),
        **({} if manifest.rounds is None else {"sha256": manifest.seal}),
        "spec": manifest.spec,
    }
    with store.write(MANIFEST) as stream:
        stream.write(json_bytes(content))


def read_manifest(store: Store, stage: str | None = None) -> Manifest:
    """The manifest of a set of `stage` (latents or cache; None accepts either).

    Raises ShardError if there is none, if it was edited, or if it is of another stage or version.
    """
    path = f"{store}/{MANIFEST}"
    wanted = [stage] if stage else list(STAGE_COMMANDS)
    commands = " or ".join(f"`distill-sd {STAGE_COMMANDS[s]}`" for s in wanted)
    try:
        content = json.loads(store.read(MANIFEST).decode("utf-8"))
        version, stated = content["format"], content["spec_sha256"]
        seal, window = content.get("sha256"), content.get("window")
        spec, files = dict(content["spec"]), dict(content["files"])
        manifest = Manifest(spec, content["rounds"], files, seal is not None, version, window=window)
    except NotRegularError:
        raise ShardError(f"{path} is not a regular file. {RESTORE}.") from None
    except NotADirectoryError:
        raise ShardError(f"{store} is a file, not a directory. Check the path.") from None
    except FileNotFoundError:
        if isinstance(store, LocalStore) and not store.directory.exists():
            raise ShardError(f"{store} does not exist. Check the path, or make it with {commands}.") from None
        raise ShardError(
            f"{store} has no {MANIFEST}, so it is not a {' or '.join(wanted)} directory. Make one with {commands}."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{path} is corrupt ({error!r}). {RESTORE}.") from None
    if version not in READABLE_VERSIONS or type(version) is not int:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ShardError(f"{path} has format {version}; this version reads formats {readable}")
    if manifest.spec_sha256 != stated:
        raise ShardError(f"{path} was edited: its spec does not match its own hash. {RESTORE}.")
    found = manifest.spec.get("stage")
    if found not in wanted:
        raise ShardError(f"{path} describes {found}, not {' or '.join(wanted)}. Use a directory written by {commands}.")
    rounds = manifest.rounds
    if not (rounds is None if found == "latents" else type(rounds) is int and rounds >= 1):
        raise ShardError(f"{path} has an invalid number of rounds, {rounds!r}. {RESTORE}.")
    if window is not None and (version == 1 or type(window) is not int or not 1 <= window < (rounds or 0)):
        raise ShardError(f"{path} has an invalid window, {window!r:.40}, of {rounds} rounds. {RESTORE}.")
    if problem := _spec_problem(manifest.spec, rounds):
        raise ShardError(f"{path} cannot be used: {problem}. {RESTORE}.")
    if seal not in (None, manifest.seal) or (seal is None and found == "cache" and version > 1):
        raise ShardError(f"{path} was edited: its rounds or files do not match its own hash. {RESTORE}.")
    return manifest


def _spec_problem(spec: dict[str, Any], rounds: int | None) -> str | None:
    """Why no command can have written a spec: counts and shapes that cannot be. None if one can."""
    latents = spec.get("latents", spec)
    if not isinstance(latents, dict):
        return "its latents are not described"
    if problem := _buckets_problem(spec, latents):
        return problem
    buckets = counts(spec) if BUCKETS in spec else None
    if problem := counts_problem(spec.get("entries"), spec.get("entries_per_shard"), rounds, buckets):
        return problem
    if BUCKETS in latents:
        described = range(len(latents[BUCKETS]))
        return next(filter(None, (_entries_problem(of_bucket(spec, bucket)) for bucket in described)), None)
    return _entries_problem(spec)


def _buckets_problem(spec: dict[str, Any], latents: dict[str, Any]) -> str | None:
    """Why no command can have written the buckets of a spec. None if one can, or if there are none."""
    if BUCKETS not in latents:
        return f"it has {BUCKETS}, but its latents have none" if BUCKETS in spec else None
    taps = spec.get("taps", {})
    lists = [latents[BUCKETS], spec.get(BUCKETS), *(taps.values() if isinstance(taps, dict) else [taps])]
    for stated in lists:
        alike = isinstance(stated, list) and stated and len(stated) == len(lists[0])
        if not alike or not all(isinstance(item, dict) for item in stated):
            return f"its buckets are described by {stated!r:.80}"
    for images, own in zip(latents[BUCKETS], spec[BUCKETS], strict=True):
        size, numbers = images.get("size"), (images.get("entries"), own.get("entries"))
        if (
            not (isinstance(size, list) and len(size) == 2 and all(map(_is_side, size)))
            or "latents_shape" not in images
        ):
            return f"one of its buckets is {images!r:.80}"
        if any(type(number) is not int for number in numbers) or not 0 <= numbers[1] <= numbers[0]:
            return f"one of its buckets has {numbers[1]!r:.40} entries of {numbers[0]!r:.40} images"
    return None if sum(counts(latents)) == latents.get("entries") else "its buckets have not all of its images"


def _entries_problem(spec: dict[str, Any]) -> str | None:
    """Why no command can have written what a spec without buckets says of its entries. None if one can."""
    latents = spec.get("latents", spec)
    images = latents.get("entries", spec["entries"])
    if type(images) is not int or not spec["entries"] <= images <= MAX_ENTRIES:
        return f"it has {spec['entries']} entries of {images!r:.40} images"
    for name, shape in latents.items():
        if name.endswith(SHAPE_SUFFIX) and not (isinstance(shape, list) and all(map(_is_side, shape))):
            return f"its {name} is {shape!r:.80}"
    try:
        for tap, stated in spec.get("taps", {}).items():
            if len(stated["shape"]) != 3 or not all(map(_is_side, [*stated["shape"], stated["stride"]])):
                return f"its tap {tap} is {stated!r:.80}"
        if not _is_side(spec.get("noise_scheduler", {}).get("num_train_timesteps", 1)):
            return "its noise scheduler has no number of timesteps"
    except (AttributeError, KeyError, TypeError) as error:
        return f"its taps or its noise scheduler are not described ({error!r})"
    if "taps" in spec and ("latents_shape" not in latents or not isinstance(spec.get("codec"), dict)):
        return "its latents_shape or its codec is not stated"
    return None


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_ENTRIES


def read_file(store: Store, manifest: Manifest, name: str) -> bytes:
    """One of the manifest's files, exactly as it was when the manifest was written. Raises ShardError otherwise."""
    data = store.read(name) if store.exists(name) else b""
    if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
        raise ShardError(f"{store}/{name} is missing or was changed. Restore it from a backup or regenerate {store}.")
    return data


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, a line per field: `codec.snr_db: 15.0 -> 10.0`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        return [
            line for key in names for line in difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {json.dumps(old)} -> {json.dumps(new)}"]


def known_to(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` without the fields that the version which wrote `old` did not know. What `old` has there is unknown."""
    return {
        key: known_to(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
        if key in old or key not in ADDED_LATER
    }


def refuse_other_spec(place: object, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ShardError with the difference if `place`, written for spec `old`, is to be used with spec `new`.

    Both are compared as JSON, in which a tuple is a list, and without what an earlier version did not state in `old`.
    """
    lines = difference(old, json.loads(json.dumps(known_to(old, new))))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ShardError(
            f"{place} was made with other settings (existing -> requested):\n{shown}\n"
            "Run with the settings it was made with, or choose another output directory."
            + remedy_for_libraries(old, new)
        )


def remedy_for_libraries(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How to get the versions of the libraries that `old` was made with, if `new` has others; else an empty string."""
    versions, installed = old.get("libraries"), new.get("libraries")
    if not isinstance(versions, dict) or not isinstance(installed, dict) or versions == installed:
        return ""
    # The local part of a version, as in 2.6.0+cu124, names a build that the package index does not have.
    pinned = " ".join(f"{name}=={str(version).split('+')[0]}" for name, version in versions.items())
    return f" To continue it with the libraries it was made with: pip install {pinned}"
