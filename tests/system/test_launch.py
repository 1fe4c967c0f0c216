"""What the environment says about a launch: what is left from another one is named instead of waited for."""

import os

import pytest

from pipeline.system.device import LAUNCH, MPI_SIZES, check_launch
from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCH, *MPI_SIZES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set and WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, "unset WORLD_SIZE, RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', which is not a number"),
        (WHOLE | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is '2', as mpirun and srun set it.* unset PMI_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE is 'many'"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is 'maybe'; it must be true or false"),
        ({"ACCELERATE_USE_FSDP": "perhaps"}, "ACCELERATE_USE_FSDP is 'perhaps'"),
        ({"ACCELERATE_TORCH_DEVICE": "gpu"}, "ACCELERATE_TORCH_DEVICE is 'gpu'"),
    ],
)
def test_a_launch_that_is_not_one_is_refused(environment, variables, message):
    environment(**variables)
    with pytest.raises(UserError, match=message):
        check_launch("auto")


@pytest.mark.parametrize(
    "variables", [{}, {"PMI_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "node", "MASTER_PORT": "1"}]
)
def test_what_does_no_harm_is_accepted(environment, variables, capsys):
    """Schedulers set some of it for single processes too."""
    environment(**variables)
    check_launch("auto")
    assert capsys.readouterr().err == ""


def test_waiting_for_processes_that_may_not_come_is_said(environment, capsys):
    environment(**WHOLE)
    check_launch("auto")
    assert "waiting for the other processes: WORLD_SIZE is 2, and this is number 1." in capsys.readouterr().err
    environment(TORCHELASTIC_RUN_ID="of torchrun")
    check_launch("auto")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda:0", "there is no CUDA GPU"),
        (1, "cuda:1", "there is cuda:0 alone"),
        (2, "cuda:2", "there are cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_does_not_exist_is_refused(environment, monkeypatch, count, device, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(UserError, match=f"--device {device} does not exist: {message}"):
        check_launch(device)


def test_one_gpu_of_several_is_taken_by_a_single_process(environment, monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")
    check_launch("cuda:1")
    assert (taken, os.environ["ACCELERATE_TORCH_DEVICE"]) == ([1], "cuda:1")
    environment(**WHOLE)
    with pytest.raises(UserError, match="--device cuda:1 is for one process"):
        check_launch("cuda:1")


@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:", "cuda:-1", "cuda:x", "mps", ""])
def test_another_device_is_refused(device):
    with pytest.raises(UserError, match="is none of auto, cpu, and a GPU such as cuda:1"):
        DeviceOptions(device=device)
