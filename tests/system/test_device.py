"""Devices and precisions: the choice, its reason, and what is refused."""

import pytest
import torch

from kdcli.errors import RecipeError
from kdcli.system import device as devices

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CPU only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", [None, "auto", "cpu"])
def test_a_cpu_is_always_there(name: str | None) -> None:
    assert devices.pick(name).type == "cpu"


def test_the_best_device_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick(None).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick("auto").type == "mps"


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda", "no CUDA device"),
        ("cuda:1", "no CUDA device"),
        ("mps", "no Apple GPU"),
        ("gpu", "no such device"),
        ("meta", "cpu, cuda and mps"),
    ],
)
def test_a_device_that_the_machine_lacks_is_refused(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"--device {name}: .*{says}") as caught:
        devices.pick(name)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_number_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick("cuda:1").index == 1
    with pytest.raises(RecipeError, match="only 2 CUDA devices"):
        devices.pick("cuda:2")


@pytest.mark.parametrize(
    ("units", "device", "frozen", "expected"),
    [
        (True, CPU, True, "bf16"),
        (True, CPU, False, "fp32"),
        (False, CPU, True, "fp32"),
        (False, CPU, False, "fp32"),
        (True, CUDA, True, "bf16"),
        (True, CUDA, False, "bf16"),
        (False, CUDA, True, "fp32"),
        (False, CUDA, False, "fp32"),
        (False, MPS, True, "fp32"),
    ],
)
def test_auto_takes_bf16_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, units: bool, device: torch.device, frozen: bool, expected: str
) -> None:
    monkeypatch.setattr(devices, "has_bf16_units", lambda _: units)
    found, why = devices.precision("auto", device, frozen=frozen)
    assert found == expected
    assert why


@pytest.mark.parametrize("frozen", [True, False])
def test_a_named_precision_is_used(frozen: bool) -> None:
    for name in ("fp32", "bf16"):
        assert devices.precision(name, CPU, frozen=frozen) == (name, "as the recipe says")
    assert devices.precision("fp16", CUDA, frozen=frozen)[0] == "fp16"
    with pytest.raises(RecipeError, match="fp16 on a CPU") as caught:
        devices.precision("fp16", CPU, frozen=frozen)
    assert "bf16" in caught.value.hint


def test_bf16_units_are_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has[0], raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has[1], raising=False)
        assert devices.has_bf16_units(CPU) == any(has)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not devices.has_bf16_units(CPU)  # other versions of torch lack the probes
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert devices.has_bf16_units(CUDA) == has
    assert not devices.has_bf16_units(MPS)


def test_devices_are_described() -> None:
    assert f"{torch.get_num_threads()} threads" in devices.describe(CPU)
    assert devices.describe(MPS) == "mps"
    assert devices.dtype_of("bf16") is torch.bfloat16
