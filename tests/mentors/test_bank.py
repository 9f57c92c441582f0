"""Banks as files: opened, read and written by row, their space reserved, refused when files contradict bank.json."""

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.errors import DataError, RecipeError
from kdcli.mentors import bank_files
from kdcli.mentors.bank import Bank

CPU = torch.device("cpu")
SAMPLES, VIEWS, CLASSES = 30, 4, 5


def identity(**over: Any) -> dict[str, Any]:
    plain = {"format": bank_files.FORMAT, "classes": CLASSES, "samples": SAMPLES, "views": VIEWS, "precision": "fp32"}
    return {**plain, "top": None, "pooled": 0, **over}


def made(**over: Any) -> Path:
    return bank_files.create(identity(**over), mentor="somebody", dataset="digits")


def records(bank: Bank, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return bank.record.pack(torch.randn(n, CLASSES, generator=generator))


def share(bank: Bank) -> float:
    """The share of records that are stored."""
    return bank_files.describe(bank.path)["filled"]


def filled(path: Path, rows: Tensor | None = None) -> Tensor:
    """Fill a bank (or some rows) and return what it was filled with, by row."""
    bank = Bank(path)
    rows = torch.arange(bank.rows) if rows is None else rows
    bank.put(rows, records(bank, len(rows)))
    return bank.table.clone()


def read(bank: Bank, rows: Tensor) -> tuple[Tensor, Tensor]:
    return bank.read(rows, rows.clamp(min=0))


# --- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_what_is_put_is_read_and_nothing_else(resident: bool) -> None:
    path = made()
    assert share(Bank(path)) == 0
    bank, rows = Bank(path), torch.tensor([5, 0, 119, 7])
    if resident:
        bank.load_to(CPU)
    some = records(bank, 4)
    assert not read(bank, rows)[1].any()
    bank.put(rows, some)
    for one in (bank, Bank(path)):  # who put it, and who opens the files afterwards
        found, known = read(one, torch.tensor([119, 6, 5, -1, 0]))
        assert known.tolist() == [True, False, True, False, True]
        assert found[0].equal(some[2])
        assert found[2].equal(some[0])
        assert found[4].equal(some[1])
        assert one.has(torch.tensor([7, 8, -1])).tolist() == [True, False, False]
        assert share(one) == 4 / (SAMPLES * VIEWS)
        assert one.damaged == 0
    late = Bank(path)
    late.load_to(CPU)
    found, known = read(late, rows)
    assert known.all()
    assert found.equal(some)


def test_rows_without_a_place_are_not_kept() -> None:
    bank = Bank(made())
    bank.put(torch.tensor([-1, 3, -1]), records(bank, 3))
    assert bank.checks.nonzero().flatten().tolist() == [3]
    assert read(bank, torch.tensor([3]))[0].equal(records(bank, 3)[1:2])


def test_rows_are_named_by_sample_and_slot_and_back() -> None:
    bank = Bank(made())
    index, view = torch.tensor([0, 29, 3, 3]), torch.tensor([1, 3, 4 * 10**17 + 2, -1])
    rows = bank.rows_of(index, view)
    assert rows.tolist() == [1, 119, 14, -1]
    back, slots = bank.slots_of(rows[:3])
    assert back.tolist() == [0, 29, 3]
    assert slots.tolist() == [1, 3, 2]


def test_a_bank_of_some_samples_numbers_them_in_order() -> None:
    samples = torch.tensor([4, 10, 11])
    bank = Bank(made(samples=3), samples)
    rows = bank.rows_of(torch.tensor([11, 4, 5, 999, 999, 0]), torch.tensor([2, 0, 1, 1, -1, 0]))
    assert rows.tolist() == [10, 0, -1, -1, -1, -1]
    assert bank.slots_of(torch.arange(12))[0].tolist() == [4] * 4 + [10] * 4 + [11] * 4


def test_a_sample_is_of_known_rows_and_the_same_again() -> None:
    path = made()
    there = torch.randperm(120)[:50].sort().values
    filled(path, there)
    rows = Bank(path).sample(20)
    assert len(rows) == 20
    assert set(rows.tolist()) <= set(there.tolist())
    assert rows.equal(Bank(path).sample(20))
    assert Bank(path).sample(500).equal(there)
    assert len(Bank(made(views=9)).sample(20)) == 0


def test_two_who_have_it_open_see_each_others_answers() -> None:
    path = made()
    one, two = Bank(path), Bank(path)
    one.put(torch.tensor([1]), records(one, 1))
    two.put(torch.tensor([2]), records(two, 1, seed=1))
    assert one.has(torch.tensor([1, 2])).all()
    assert two.has(torch.tensor([1, 2])).all()


def test_outputs_beyond_float16_are_refused_with_the_mentors_name() -> None:
    bank = Bank(made())
    out = torch.zeros(2, CLASSES)
    out[1, 0] = 1e5
    with pytest.raises(DataError, match="mentor somebody gave outputs that float16 cannot hold") as caught:
        bank.put(torch.tensor([0, 1]), bank.record.pack(out))
    assert caught.value.exit_code == 3
    assert "--set classroom.bank=false" in caught.value.hint
    assert share(bank) == 0


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("file", ["answers.bin", "checks.bin"])
def test_damage_anywhere_is_found_counted_and_mended(file: str, resident: bool) -> None:
    path, rng = made(), random.Random(file)
    whole = filled(path)
    raw = bytearray((path / file).read_bytes())
    width = len(raw) // 120
    hit = set()
    for _ in range(40):
        place = rng.randrange(len(raw))
        raw[place] ^= rng.randrange(1, 256)
        hit.add(place // width)
    (path / file).write_bytes(raw)
    bank, rows = Bank(path), torch.arange(120)
    if resident:
        bank.load_to(CPU)
    found, known = read(bank, rows)
    bad = (~known).nonzero().flatten()
    original = {n for n in hit if raw[n * width : (n + 1) * width] != _bytes(file, whole, n)}
    assert set(bad.tolist()) == original
    assert found[known].equal(whole[known])
    assert 0 < bank.damaged <= len(bad)  # a check of nought says: not there
    last = [*Bank(path).verify()][-1]
    assert last == (120, int((bank.checks != 0).sum()), bank.damaged)
    bank.put(bad, whole[bad])
    assert read(bank, rows)[1].all()
    assert Bank(path).has(rows).all()
    assert Bank(path).table.equal(whole)


def _bytes(file: str, whole: Tensor, row: int) -> bytes:
    if file == "answers.bin":
        return whole[row].numpy().tobytes()
    return Bank(made(precision="another")).record.checksum(whole[row : row + 1], torch.tensor([row])).numpy().tobytes()


def test_swapped_records_are_damaged_both() -> None:
    path = made()
    filled(path)
    bank = Bank(path)
    bank.table[[3, 4]] = bank.table[[4, 3]]
    bank.checks[[3, 4]] = bank.checks[[4, 3]]
    assert (~Bank(path).has(torch.arange(120))).nonzero().flatten().tolist() == [3, 4]


def test_what_a_crash_left_half_written_is_only_missing_or_damaged() -> None:
    path = made()
    whole = filled(path)
    bank = Bank(path)
    bank.checks[:10] = 0  # the records came to the disk, their checksums did not
    bank.table[10:20] = 0  # the other way round
    again = Bank(path)
    _, known = read(again, torch.arange(120))
    assert known.nonzero().flatten().tolist() == [*range(20, 120)]
    assert again.damaged == 10
    again.put(torch.arange(20), whole[:20])
    assert [*Bank(path).verify()][-1] == (120, 120, 0)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "short answers": (lambda p: os.truncate(p / "answers.bin", 100), r"answers\.bin is 100 bytes long instead of"),
    "short checks": (lambda p: os.truncate(p / "checks.bin", 0), r"checks\.bin is 0 bytes long"),
    "long answers": (lambda p: (p / "answers.bin").open("ab").write(b"more"), r"answers\.bin is \d+ bytes long"),
    "no answers": (lambda p: (p / "answers.bin").unlink(), r"answers\.bin is missing"),
    "no checks": (lambda p: (p / "checks.bin").unlink(), r"checks\.bin is missing"),
    "no facts": (lambda p: (p / "bank.json").unlink(), r"bank\.json cannot be read"),
    "torn facts": (lambda p: (p / "bank.json").write_text('{"identity": {'), r"bank\.json cannot be read"),
    "no json object": (lambda p: (p / "bank.json").write_text("[]"), r"bank\.json cannot be read"),
    "binary facts": (lambda p: (p / "bank.json").write_bytes(b"\xff\xfe\x00"), r"bank\.json cannot be read"),
    "words for numbers": (lambda p: edit(p, samples="many"), r"bank\.json cannot be read"),
    "no mentor": (lambda p: rewrite(p, lambda f: f.pop("mentor")), r"bank\.json cannot be read"),
    "another identity": (lambda p: edit(p, precision="bf16"), r"bank\.json belongs to bank"),
    "the most probable classes": (lambda p: edit(p, top=8), r"stores only 8 classes, which is no longer supported"),
    "no samples": (lambda p: edit(p, samples=0), r"bank\.json cannot be read \(ValueError: samples or views is 0"),
    "more samples": (lambda p: edit(p, samples=60), r"bank\.json belongs to bank"),
    "another format": (lambda p: edit(p, format=99), r"format 99; this version of kdcli reads 1"),
}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((path / "bank.json").read_text())
    change(facts)
    (path / "bank.json").write_text(json.dumps(facts))


def edit(path: Path, **over: Any) -> None:
    rewrite(path, lambda facts: facts["identity"].update(over))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_what_it_says_is_refused_with_the_cure(name: str) -> None:
    path = made()
    damage, says = DAMAGES[name]
    damage(path)
    with pytest.raises(DataError, match=says) as caught:
        Bank(path)
    assert caught.value.exit_code == 3
    assert f"kdcli bank rm {path.name}" in caught.value.hint
    assert bank_files.describe(path)["state"] == caught.value.message
    bank_files.remove(bank_files.find(path.name))
    assert bank_files.every() == []


# --- making, holding, removing ----------------------------------------------------------------------------------------


def test_all_space_is_there_from_the_beginning() -> None:
    path = made(samples=3000)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sizes["answers.bin"] == 3000 * 4 * 12
    assert sizes["checks.bin"] == 3000 * 4 * 4
    assert sizes["answers.bin"] + sizes["checks.bin"] == bank_files.bytes_of(identity(samples=3000))
    if hasattr(os.stat_result, "st_blocks") or hasattr((path / "answers.bin").stat(), "st_blocks"):
        assert (path / "answers.bin").stat().st_blocks * 512 >= sizes["answers.bin"]
    assert path.name == bank_files.id_of(identity(samples=3000))
    assert not list(bank_files.folder().glob(".*"))


def test_without_posix_fallocate_space_is_reserved_by_writing_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(bank_files, "ZEROS", 1000)
    path = made()
    assert (path / "answers.bin").read_bytes() == bytes(120 * 12)
    assert share(Bank(path)) == 0


@pytest.mark.parametrize("how", ["reserving", "writing"])
def test_a_full_disk_is_reported_when_a_bank_is_created_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if how == "reserving":
            patch.setattr(os, "posix_fallocate", full, raising=False)
        else:
            patch.delattr(os, "posix_fallocate", raising=False)
            patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"not enough space for a bank of 2 KiB in .*: No space left") as caught:
            made()
    assert caught.value.exit_code == 3
    assert all(word in caught.value.hint for word in ("data.views", "KDCLI_HOME", "classroom.bank=false"))
    assert list(bank_files.folder().iterdir()) == []
    assert share(Bank(made())) == 0


def test_banks_that_do_not_fit_together_are_refused_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [identity(), identity(views=9)]
    free = sum(map(bank_files.bytes_of, wanted))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    bank_files.check_space(wanted)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(DataError, match=r"2 new banks of 6 KiB together in .*, where 6 KiB are free") as caught:
        bank_files.check_space(wanted)
    assert "data.views=8" in caught.value.hint


def test_a_folder_that_cannot_be_written_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(DataError, match="Permission denied"):
        made()


def test_the_slower_of_two_processes_takes_the_bank_of_the_faster() -> None:
    path = made()
    whole = filled(path)
    assert made() == path  # as after a race
    assert Bank(path).table.equal(whole)
    assert len(list(bank_files.folder().iterdir())) == 1


def test_a_bank_in_use_is_not_removed() -> None:
    if bank_files.fcntl is None:
        pytest.skip("the system itself keeps open files here")
    path = made()
    bank = Bank(path)
    with pytest.raises(DataError, match="a run is using it") as caught:
        bank_files.remove(path)
    assert caught.value.exit_code == 3
    assert path.is_dir()
    other = Bank(path)  # several may use it
    del bank
    gc.collect()
    assert bank_files.in_use(path)
    del other
    gc.collect()
    bank_files.remove(path)
    assert not path.exists()


@pytest.mark.parametrize("how", ["no fcntl", "refused"])
def test_without_locks_banks_work_all_the_same(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if how == "no fcntl":
        monkeypatch.setattr(bank_files, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refused)
    path = made()
    filled(path)
    bank = Bank(path)
    assert not bank_files.in_use(path)
    bank_files.remove(path)
    assert bank_files.every() == []
    del bank


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_bank_is_free_again_when_its_process_was_killed() -> None:
    if bank_files.fcntl is None:
        pytest.skip("the system itself keeps open files here")
    path = made()
    reading, writing = os.pipe()
    if not (child := os.fork()):
        bank = Bank(path)
        os.write(writing, b"1")
        signal.pause()
        del bank
        os._exit(0)
    os.read(reading, 1)
    assert bank_files.in_use(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    bank_files.remove(path)
    for end in (reading, writing):
        os.close(end)


def test_leftovers_of_a_killed_creation_are_removed_but_not_a_current_one() -> None:
    left, current = (bank_files.folder() / f".{name}.tmp" for name in ("left", "current"))
    for path in (left, current):
        path.mkdir(parents=True)
        (path / "answers.bin").write_bytes(bytes(10))
    os.utime(left, (1, 1))
    made()
    assert not left.exists()
    assert current.exists()
    assert len(bank_files.every()) == 1  # and none of them counts as a bank


def test_banks_are_found_by_the_beginning_of_their_name() -> None:
    one, two = made(), made(views=5)
    assert bank_files.every() == sorted([one, two])
    assert bank_files.find(one.name) == one
    assert bank_files.find(one.name[:9]) == one
    for name in ("", "zz"):
        with pytest.raises(RecipeError, match="no bank called") as caught:
            bank_files.find(name)
        assert "kdcli bank ls" in caught.value.hint
    twin = one.with_name(one.name[:8] + "0" * 8)
    with contextlib.suppress(FileExistsError):
        twin.mkdir()
    with pytest.raises(RecipeError, match="2 banks begin with"):
        bank_files.find(one.name[:8])


def test_a_bank_is_described_in_words() -> None:
    path = made(pooled=3)
    about = bank_files.describe(path)
    assert about["id"] == path.name
    assert about["mentor"] == "somebody"
    assert about["data"] == "digits"
    assert about["form"] == "logits and pooled"
    assert (about["filled"], about["views"], about["precision"], about["state"]) == (0, VIEWS, "fp32", "ok")
    assert about["bytes"] >= bank_files.bytes_of(identity(pooled=3))
    filled_path = made()
    filled(filled_path, torch.arange(60))
    assert bank_files.describe(filled_path)["filled"] == 0.5


@pytest.mark.parametrize(("size", "says"), [(12, "12 bytes"), (2**11, "2 KiB"), (3.5 * 2**30, "3.50 GiB")])
def test_sizes_are_given_in_a_readable_unit(size: float, says: str) -> None:
    assert bank_files.amount(size) == says
