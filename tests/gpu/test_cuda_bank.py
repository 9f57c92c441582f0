"""Banks on CUDA: resident or read from the host, the same answers, and a warm one never waits for the device."""

from pathlib import Path

import engine_kit as kit
import pytest
import torch

from kdcli.data import Stream
from kdcli.mentors import bank_build, bank_files
from kdcli.mentors.bank import Bank
from kdcli.mentors.mentors import Mentors
from kdcli.workflows import groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "zoo").symlink_to(kit.home() / "zoo", target_is_directory=True)
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path / "home"))


def opened(**over: object) -> tuple[Mentors, Stream]:
    config = kit.recipe("aver", **{"classroom.bank": True, **over})
    room = groups.open_classroom(config, CUDA)
    return bank_build.open_mentors(room, config), Stream(room.data, 8, seed=0, device=CUDA)


def share(bank: Bank) -> float:
    """The share of a bank's records that are stored."""
    return bank_files.describe(bank.path)["filled"]


@pytest.mark.parametrize("over", [{}, {"classroom.bank_pooled": True}], ids=str)
def test_resident_and_host_banks_answer_alike_without_waiting(over: dict[str, object]) -> None:
    mentors, stream = opened(**over)
    assert all(bank.resident is not None and bank.resident.is_cuda for bank in mentors.banks)
    torch.cuda.set_sync_debug_mode("error")
    try:  # cold too: new records stay on the device until the epoch's end
        batches = [(batch, mentors.answer(batch).outputs) for batch in stream.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(share(bank) for bank in mentors.banks)
    mentors.flush()
    assert all(share(bank) for bank in mentors.banks)
    assert all([*Bank(path).verify()][-1][2] == 0 for path in bank_files.every())
    late, _ = opened(**over)
    host, _ = opened(**over)
    for bank in host.banks:
        bank.resident = None
    for batch, first in batches:
        torch.cuda.set_sync_debug_mode("error")
        try:
            answers = [one.answer(batch).outputs for one in (mentors, late, host)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for outputs in answers:
            assert all(a.out.equal(b.out) for a, b in zip(outputs, first, strict=True))
    assert mentors.bank_warnings() == late.bank_warnings() == host.bank_warnings() == []


def test_a_bank_filled_on_the_cpu_is_trusted_on_cuda(tmp_path: Path) -> None:
    """float32 on both, TF32 and all: the same answers but for what the check at the start allows."""
    kit.trained(kit.recipe("aver", **{"classroom.bank": True}), tmp_path / "run")
    mentors, stream = opened()
    assert all(share(bank) for bank in mentors.banks)
    for batch in stream.epoch(0):
        mentors.answer(batch)
    mentors.flush()
    assert mentors.bank_warnings() == []
