"""The device that a command runs on, its precision, and the process's place among the launched processes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env

from pipeline.system.echo import say
from pipeline.system.errors import UserError, first_line
from pipeline.system.memory import keep_freed_memory

# How long processes wait while one of them works alone, for its shards, a checkpoint or validation images. The default
# of ten minutes would end the run.
PATIENCE = timedelta(days=2)
# What `accelerate launch` may ask for: networks in pieces, over several devices.
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# What torchrun and `accelerate launch` set.
LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What mpirun and srun set, and accelerate reads in place of WORLD_SIZE.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def use_cpu(device: str) -> bool:
    """Whether `--device` resolves to the CPU.

    This must be passed to accelerate, which otherwise ignores the other processes of a launch on the CPU.
    """
    return device == "cpu" or is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def is_set(variable: str) -> bool:
    """Whether a flag of accelerate's environment is on. Raises UserError for a value that is none."""
    try:
        return parse_flag_from_env(variable)
    except ValueError:
        raise UserError(f"{variable} is {os.environ[variable]!r}; it must be true or false. Unset it.") from None


def process_state(device: str) -> PartialState:
    """This process's rank and device under `accelerate launch` or torchrun, or as the only process without them.

    Raises UserError for a launch that asks for something else.
    """
    check_launch(device)
    if use_cpu(device):
        keep_freed_memory()
    state = PartialState(cpu=use_cpu(device), timeout=PATIENCE)
    refuse_other_device(device, state.device)
    return state


def check_launch(device: str) -> None:
    """Check what the environment says about the launch, which may be left from another one, and take --device.

    Raises UserError.
    """
    is_set("ACCELERATE_USE_CPU")
    refuse_sharding()
    refuse_incomplete_launch()
    refuse_mpi_launch()
    if device.startswith("cuda:"):
        take_gpu(device)
    wanted = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if wanted is not None:
        try:
            torch.empty(0, device=wanted)
        except Exception as error:
            raise UserError(f"ACCELERATE_TORCH_DEVICE is {wanted!r}: {first_line(error)}. Unset it.") from None


def take_gpu(device: str) -> None:
    """Make one GPU of several the one that this process runs on. Raises UserError if there is no such GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"--device {device} is for one process. The processes of a launch have a GPU each: leave it out."
        )
    index, count = int(device.removeprefix("cuda:")), torch.cuda.device_count()
    if index >= count:
        there = f"are cuda:0 to cuda:{count - 1}" if count > 1 else "is cuda:0 alone" if count else "is no CUDA GPU"
        raise UserError(f"--device {device} does not exist: there {there}.")
    torch.cuda.set_device(index)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device


def refuse_sharding() -> None:
    """Raise UserError if `accelerate launch` was told to split networks over devices: each process needs all of it."""
    for variable, name in SHARDED.items():
        if is_set(variable):
            raise UserError(
                f"accelerate is set up for {name} ({variable} is set), but every process here holds complete networks. "
                "Use `accelerate launch --multi_gpu`, or choose a plain multi-GPU set-up with `accelerate config`."
            )


def refuse_incomplete_launch() -> None:
    """Raise UserError if only some of a launcher's variables are set, or not to numbers.

    Without torchrun, whose processes come together, say that the others are waited for.
    """
    found = {name: os.environ[name] for name in LAUNCH if name in os.environ}
    remedy = f"Start the processes with torchrun or `accelerate launch`, or unset {', '.join(found)}."
    for name, value in found.items():
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise UserError(f"{name} is {value!r}, which is not a number. {remedy}")
    missing = [name for name in LAUNCH if name not in found]
    if missing and ("LOCAL_RANK" in found or int(found.get("WORLD_SIZE", 1)) > 1):
        raise UserError(
            f"of what a launch of several processes sets, {', '.join(found)} is set and {', '.join(missing)} is not. "
            f"{remedy}"
        )
    if missing:
        return
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}. {remedy}")
    if size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and not torch.distributed.is_initialized():
        say(f"waiting for the other processes: WORLD_SIZE is {size}, and this is number {rank}. {remedy}", err=True)


def refuse_mpi_launch() -> None:
    """Raise UserError if mpirun or srun started several processes without saying where they meet."""
    if "WORLD_SIZE" in os.environ:
        return
    for name in MPI_SIZES:
        size = os.environ.get(name, "1")
        if size.isdecimal() and int(size) <= 1:
            continue
        raise UserError(
            f"{name} is {size!r}, as mpirun and srun set it, but the processes do not know where to meet. Start them "
            f"with torchrun or `accelerate launch`. For jobs that each do a --shard-range, unset {name}."
        )


def refuse_other_device(asked: str, device: torch.device) -> None:
    """Raise UserError if accelerate's environment chose another `device` than --device `cpu`."""
    if asked == "cpu" and device.type != "cpu":
        variable = os.environ.get("ACCELERATE_TORCH_DEVICE", device)
        raise UserError(f"--device cpu was asked for, but ACCELERATE_TORCH_DEVICE is {variable}. Use only one of them.")


def leave_processes(state: PartialState | Accelerator) -> None:
    """Wait for the other processes at the end of a stage. What the main process does afterwards, it does alone.

    On GPUs the group ends here, while all are here to end it: NCCL may hang if they leave it one by one. gloo's group
    needs no end, and serves the next stage in the same process.
    """
    if not torch.distributed.is_initialized():
        return
    state.wait_for_everyone()
    if torch.distributed.get_backend() != "gloo":
        PartialState().destroy_process_group()


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Resolve `auto`: fp16 on a CUDA GPU, fp32 elsewhere."""
    return ("fp16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype


def device_name(device: torch.device) -> str:
    """The device's name in reports: a GPU's model name, or else the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_accelerator(device: torch.device) -> bool:
    """Whether the CPU's cores are free for other threads while the device computes."""
    return device.type != "cpu"
