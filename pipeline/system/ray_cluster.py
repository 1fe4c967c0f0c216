"""A ray cluster: connecting to one or starting it on this machine, and what each of its processes gets.

ray is imported here alone, when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from pipeline.system.errors import UserError, failing_with
from pipeline.system.extras import install_command
from pipeline.system.options import RAY, EngineOptions
from shards.schema import ShardError

# Errors that another process would meet too.
FINAL = (UserError, ShardError)
# How often something is tried in the cluster before the run ends.
TRIES = 3
SHOWN = 400


def ray_library() -> ModuleType:
    """The module `ray`. Raises UserError if it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError(f"--engine ray needs the package ray. Run: {install_command('ray')}") from None
    return ray


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to, and the share of it that each actor gets.

    It is `elastic` if nodes may join it: not if it was started here, for this run.
    """

    ray: ModuleType
    gpus: float
    cpus: int
    elastic: bool

    @property
    def device(self) -> torch.device:
        """What the actors run on."""
        return torch.device("cuda" if self.gpus else "cpu")

    @property
    def share(self) -> dict[str, Any]:
        """What ray is asked for, for each process."""
        return {"num_gpus": self.gpus, "num_cpus": self.cpus}

    def places(self) -> int:
        """How many actors fit into the nodes that are there now, were they all free."""
        return sum(self._places(node["Resources"]) for node in self.ray.nodes() if node["Alive"])

    def _places(self, resources: dict[str, float]) -> int:
        of_cpus = int(resources.get("CPU", 0) // self.cpus)
        if not self.gpus:
            return of_cpus
        return min(of_cpus, int(resources.get("GPU", 0) // self.gpus))

    def need(self) -> str:
        """What an actor needs, in words."""
        gpus = f"{self.gpus:g} GPU and " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU{'s' if self.cpus > 1 else ''}"

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one call in a process of its own, somewhere in the cluster. If the process dies, another one
        takes its place, at most twice."""
        self.refuse_no_place()
        # After one call, the process ends and gives its memory back.
        remote = self.ray.remote(max_retries=TRIES - 1, max_calls=1, **self.share)(function)
        return self.result(remote.remote(*arguments))

    def result(self, reference: Any) -> Any:
        """What a call returned. Raises what it raised, and UserError if its process died."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            # Not ray's error with the traceback of another process as its text.
            raise (error.cause or error) from None
        except self.ray.exceptions.RayError as error:
            raise Died(" ".join(str(error).split())[:SHOWN]) from None

    def refuse_no_place(self) -> None:
        """Raise UserError if no actor will ever fit."""
        if not self.elastic and not self.places():
            raise UserError(
                f"an actor needs {self.need()}, which this machine does not have. Lower --cpus-per-actor or "
                "--gpus-per-actor, or give the --ray-address of a cluster that has them."
            )


class Died(UserError):
    """A process of the cluster that is gone: killed, out of memory, or with its node."""


@contextmanager
def cluster_of(settings: EngineOptions) -> Iterator[Cluster | None]:
    """The cluster that a command runs on with --engine ray; None with another engine.

    Raises UserError if there is no such cluster, if ray is missing, or under `accelerate launch`.
    """
    if settings.engine != RAY:
        yield None
        return
    if "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "--engine ray starts the processes itself and cannot run under `accelerate launch` or torchrun. Start the "
            "command once, without a launcher."
        )
    ray = ray_library()
    with failing_with(f"no ray cluster at --ray-address {settings.ray_address}", "Start it, or leave the option out."):
        _connect(ray, settings.ray_address)
    try:
        gpus = settings.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0.0
        yield Cluster(ray, gpus, settings.cpus_per_actor, elastic=settings.ray_address is not None)
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str | None) -> None:
    """Connect to a cluster, or start one on this machine that ends with this process."""
    # Nothing is reported to anybody unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Processes that get no GPU run on the CPU anyway. Without this, ray warns that they will see all GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Not the one that RAY_ADDRESS names.
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
