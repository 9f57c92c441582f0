"""Runs with banks: the same bits cold, warm, half filled, killed or damaged; shared; refused where they cannot be."""

import copy
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_kit as kit
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcli import methods
from kdcli.data import Batch, Stream
from kdcli.errors import DataError, InterruptedRun, RecipeError, WeightsError
from kdcli.mentors import bank_build, bank_files
from kdcli.mentors.bank import Bank
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors
from kdcli.methods.base import Need
from kdcli.models import registry
from kdcli.models.member import Member
from kdcli.recipe import Recipe
from kdcli.training import checks
from kdcli.training.run import Run
from kdcli.training.session import Notice
from kdcli.workflows import check, compare, groups

BANKED = {"classroom.bank": True}


@pytest.fixture(autouse=True)
def without_banks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A KDCLI_HOME of the test's own that knows the kit's mentors; called, another one without any banks."""

    def move() -> None:
        path = tmp_path / f"home-{len(list(tmp_path.glob('home-*')))}"
        shutil.copytree(kit.home() / "zoo", path / "zoo")
        monkeypatch.setenv("KDCLI_HOME", str(path))

    move()
    return move


def banked(method: str = "classroom", /, **over: Any) -> Recipe:
    return kit.recipe(method, **BANKED, **over)


def stacked(mentors: Mentors, batch: Batch) -> Tensor:
    """All mentors' logits [M, B, K]."""
    return torch.stack([output.out for output in mentors.answer(batch).outputs])


def share(bank: Bank) -> float:
    """The share of a bank's records that are stored."""
    return bank_files.describe(bank.path)["filled"]


def weights_of(run: Run) -> dict[str, Tensor]:
    return kit.student(run)


def silence(mentors: Mentors) -> None:
    """From now on a mentor that is asked fails."""

    def fails(*_: object) -> Tensor:
        raise AssertionError("a mentor was asked")

    for member in mentors.members:
        member.forward = fails  # pyright: ignore[reportAttributeAccessIssue]


def of_mentor(name: str) -> Path:
    return next(path for path in bank_files.every() if bank_files.describe(path)["mentor"] == name)


def raise_signal(number: int) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    signal.raise_signal(number)


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_banked_answers_are_the_live_ones_in_float16() -> None:
    room = kit.classroom(banked())
    mentors = bank_build.open_mentors(room, banked())
    stream = Stream(room.data, 8, seed=0)
    for batch in stream.epoch(0):
        answer = mentors.answer(batch).outputs
        assert [output.out.shape for output in answer] == [(len(batch), 10)] * 2
        assert not any(output.out.is_inference() for output in answer)
        out = torch.stack([output.out for output in answer])
        with torch.no_grad():
            live = torch.stack([member(batch.images) for member in mentors.members])
        assert (out - live).abs().max() < 2**-10 * live.abs().max()
        again = stacked(mentors, batch)
        assert again.equal(out)
        assert again.equal(out.half().float())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_answer_has_the_same_bits_whatever_it_is_asked_with(workers: int) -> None:
    """As float32, before any rounding: what a CPU's kernels do depends on the size of the batch alone."""
    room = kit.classroom(banked())
    mentors = Mentors(room.mentors, "fp32", kit.CPU, workers=workers)
    pixels = next(room.data.train.plain(30)).images
    whole = [one.out for one in mentors.run_fixed_batch(pixels, [0, 1])]
    for rows in (torch.tensor([7]), torch.tensor([3, 28]), torch.arange(29, 4, -1), torch.randperm(30)[:17]):
        some = [one.out for one in mentors.run_fixed_batch(pixels[rows], [0, 1])]
        assert all(a.equal(b[rows]) for a, b in zip(some, whole, strict=True))
    assert mentors.run_fixed_batch(pixels[:3], [1])[0].out.equal(whole[1][:3])


@pytest.mark.parametrize("over", [{}, {"classroom.bank_pooled": True}], ids=str)
def test_cold_warm_and_half_filled_runs_end_with_the_same_bits(tmp_path: Path, over: dict[str, Any]) -> None:
    config = banked(**over)
    cold = kit.trained(config, tmp_path / "cold")
    full = {path: (path / "checks.bin").read_bytes() for path in bank_files.every()}
    warm = kit.session(config, tmp_path / "warm")
    silence(warm.mentors)
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(cold))
    assert warm.run.metrics() == cold.metrics()
    assert {path: (path / "checks.bin").read_bytes() for path in bank_files.every()} == full
    generator = torch.Generator().manual_seed(0)
    for n, path in enumerate(
        bank_files.every()
    ):  # lose others of each, so that the mentors are asked for different images
        bank = Bank(path)
        bank.checks[torch.rand(bank.rows, generator=generator) < 0.3 + 0.4 * n] = 0
    half = kit.trained(config, tmp_path / "half")
    assert kit.same(weights_of(half), weights_of(cold))
    assert half.metrics() == cold.metrics()
    assert {path: (path / "checks.bin").read_bytes() for path in bank_files.every()} == full


def test_a_bank_in_device_memory_ends_with_the_same_bits(tmp_path: Path) -> None:
    cold = kit.trained(banked(), tmp_path / "cold")
    for n, path in enumerate(bank_files.every()):
        Bank(path).checks[n::2] = 0
    half = kit.session(banked(), tmp_path / "half")
    for bank in half.mentors.banks:
        bank.load_to(kit.CPU)
    kit.drive(groups.go(half))
    assert kit.same(weights_of(half.run), weights_of(cold))
    warm = kit.session(banked(), tmp_path / "warm")
    silence(warm.mentors)
    for bank in warm.mentors.banks:
        bank.load_to(kit.CPU)
        bank.table, bank.checks = torch.empty(0), bank.checks  # the file is not looked at again
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(cold))


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, without_banks: Callable[[], None]) -> None:
    config = banked(**{"train.epochs": 3, "train.ema": 0.9})
    stopped = kit.session(config, tmp_path / "run")
    with pytest.raises(InterruptedRun):
        kit.drive(groups.go(stopped), kit.at(2, 3, lambda _: raise_signal(signal.SIGTERM)))
    kit.drive(groups.go(kit.session(config, tmp_path / "run", resume=True), resume=True))
    warm = kit.trained(config, tmp_path / "warm")
    assert kit.same(weights_of(Run(tmp_path / "run")), weights_of(warm))
    without_banks()
    cold = kit.trained(config, tmp_path / "cold")
    assert kit.same(weights_of(cold), weights_of(warm))


def run_apart(config: Recipe, path: Path, dies_at: int = 0) -> Any:
    """A process that trains the recipe; it may kill itself in the middle of its nth writing to a bank."""

    def work() -> None:
        put, left = Bank.put, dies_at

        def killed(self: Bank, rows: Tensor, records: Tensor) -> None:
            nonlocal left
            left -= 1
            if left == 0:  # records without their checksums
                self.table.index_copy_(0, rows, records)
                os.kill(os.getpid(), signal.SIGKILL)
            put(self, rows, records)

        Bank.put = killed
        kit.trained(config, path)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@forked
def test_a_run_killed_while_it_writes_to_a_bank_ends_with_the_same_bits(
    tmp_path: Path, without_banks: Callable[[], None]
) -> None:
    config = banked(**{"train.epochs": 3})
    victim = run_apart(config, tmp_path / "run", dies_at=13)  # two mentors, four batches: in the second epoch
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    again = kit.session(config, tmp_path / "run", resume=True)
    assert 0 < share(again.mentors.banks[0]) < 1
    kit.drive(groups.go(again, resume=True))
    assert again.mentors.bank_warnings() == []  # what had no checksum was not there, not damaged
    without_banks()
    assert kit.same(weights_of(again.run), weights_of(kit.trained(config, tmp_path / "whole")))


@forked
def test_two_processes_fill_one_bank_at_once(tmp_path: Path) -> None:
    config = banked(**{"train.epochs": 4})
    both = [run_apart(config, tmp_path / str(n)) for n in range(2)]
    for one in both:
        one.join()
        assert one.exitcode == 0
    assert kit.same(weights_of(Run(tmp_path / "0")), weights_of(Run(tmp_path / "1")))
    assert len(bank_files.every()) == 2
    for path in bank_files.every():
        rows, filled, damaged = [*Bank(path).verify()][-1]
        assert damaged == 0
        assert 0 < filled < rows
    warm = kit.session(config, tmp_path / "warm")
    silence(warm.mentors)
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(Run(tmp_path / "0")))


# --- damage and staleness ---------------------------------------------------------------------------------------------


def test_damaged_records_are_computed_again_and_reported(tmp_path: Path) -> None:
    first = kit.session(banked(), tmp_path / "cold")
    cold = first.run
    assert not [event for event in kit.drive(groups.go(first)) if isinstance(event, Notice)]
    path = of_mentor("cifar_resnet14")
    file = path / "answers.bin"
    file.write_bytes(bytes(b ^ 0x55 for b in file.read_bytes()))
    met = share(Bank(path))
    again = kit.session(banked(), tmp_path / "again")
    told = [event.text for event in kit.drive(groups.go(again)) if isinstance(event, Notice)]
    assert kit.same(weights_of(again.run), weights_of(cold))
    bank = Bank(path)
    count = round(met * bank.rows)
    assert told == [f"{count} damaged records of bank {path.name} (cifar_resnet14) were computed again"]
    assert [*bank.verify()][-1][2] == 0
    warm = kit.session(banked(), tmp_path / "warm")
    silence(warm.mentors)
    assert not [event for event in kit.drive(groups.go(warm)) if isinstance(event, Notice)]


def test_a_bank_that_is_no_longer_true_is_refused(tmp_path: Path) -> None:
    """As when files were replaced by others of the same name and size: all checksums are right."""
    kit.trained(banked(), tmp_path / "cold")
    path, other = of_mentor("cifar_resnet14"), of_mentor("cifar_resnet8")
    for name in ("answers.bin", "checks.bin"):
        (path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(DataError, match=f"bank {path.name} does not match what cifar_resnet14 computes now") as caught:
        kit.session(banked(), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert f"kdcli bank rm {path.name}" in caught.value.hint
    assert "classroom.bank=false" in caught.value.hint
    assert not (tmp_path / "run").exists()
    kit.trained(kit.recipe(), tmp_path / "run")


def test_a_bank_of_a_lower_precision_is_trusted_within_that_precision(tmp_path: Path) -> None:
    config = banked(**{"classroom.precision": "bf16"})
    cold = kit.trained(config, tmp_path / "cold")
    assert {bank_files.describe(path)["precision"] for path in bank_files.every()} == {"bf16"}
    warm = kit.session(config, tmp_path / "warm")
    assert all(len(bank.sample(64)) > 50 for bank in warm.mentors.banks)
    silence(warm.mentors)
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(cold))


def test_a_truncated_bank_stops_a_run_before_it_begins(tmp_path: Path) -> None:
    kit.trained(banked(), tmp_path / "cold")
    path = bank_files.every()[0]
    os.truncate(path / "answers.bin", 10)
    with pytest.raises(DataError, match=r"answers\.bin is 10 bytes long"):
        kit.session(banked(), tmp_path / "run")


def test_a_full_disk_is_reported_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))  # enough for one of the two
        with pytest.raises(DataError, match="not enough space for 2 new banks") as caught:
            kit.session(banked(), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert "classroom.bank=false" in caught.value.hint
    assert bank_files.every() == []
    assert not (tmp_path / "run").exists()
    kit.trained(banked(), tmp_path / "run")


def test_a_mentor_that_answers_beyond_float16_is_named(tmp_path: Path) -> None:
    opened = kit.session(banked("kd"), tmp_path / "run")
    head = opened.mentors.frozen[0].net.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    head.weight.data.mul_(1e7)
    with pytest.raises(DataError, match="mentor cifar_resnet14 gave outputs that float16 cannot hold"):
        kit.drive(groups.go(opened))


# --- which bank -------------------------------------------------------------------------------------------------------


def test_methods_seeds_and_commands_share_one_bank(tmp_path: Path) -> None:
    config = banked()
    kit.compared(config, tmp_path / "compare", ["aver", "classroom"], [0, 1])
    assert len(bank_files.every()) == 2

    def silenced(_: Classroom, events: Any, label: str) -> None:
        silence(kit.session_of(events).mentors)
        kit.drive(events)

    compare.compare(config, ["kd", "aver"], [5], kit.CPU, silenced, out=str(tmp_path / "other"))
    alone = kit.session(banked("aver", **{"train.seed": 1}), tmp_path / "alone")
    silence(alone.mentors)
    kit.drive(groups.go(alone))
    assert kit.same(weights_of(alone.run), weights_of(Run(tmp_path / "compare" / "aver-1")))
    assert len(bank_files.every()) == 2


def changed(room: Classroom, **over: Any) -> dict[str, Any]:
    """The identity of the teacher's bank after one thing was changed."""
    member, data, config = room.mentors[0], copy.copy(room.data), banked()
    for key, value in over.items():
        where, _, name = key.partition(".")
        if where == "member":
            setattr(member, name, value)
        elif where == "data":
            setattr(data, name, value)
        elif where == "classroom":
            config = config.with_(**{key: value})
    return bank_build.identity(member, data, over.get("precision", "fp32"), config)


OTHER: dict[str, dict[str, Any]] = {
    "weights": {"member.digest": "another"},
    "architecture": {"member.architecture": registry.resolve("cifar_resnet20")},
    "mean": {"member.mean": (0.3, 0.3, 0.31)},
    "std": {"member.std": (0.4, 0.4, 0.41)},
    "input size": {"member.input_size": 16},
    "interpolation": {"member.interpolation": "nearest"},
    "class map": {"member.class_index": torch.arange(9, -1, -1)},
    "classes": {"member.num_classes": 11},
    "pixels": {"data.pixels": "packed"},
    "files left out": {"data.skipped": ["a.jpg"]},
    "image size": {"data.image_size": 16},
    "augmentation": {"data.augment": "flip"},
    "views": {"data.views": 3},
    "precision": {"precision": "bf16"},
    "pooled": {"classroom.bank_pooled": True},
}


@pytest.mark.parametrize("what", OTHER)
def test_whatever_an_answer_depends_on_makes_another_bank(what: str) -> None:
    before = bank_files.id_of(changed(kit.classroom(banked())))
    assert bank_files.id_of(changed(kit.classroom(banked()))) == before
    assert bank_files.id_of(changed(kit.classroom(banked()), **OTHER[what])) != before


def test_what_an_answer_does_not_depend_on_shares_the_bank() -> None:
    before = bank_files.id_of(changed(kit.classroom(banked())))
    for over in ({"data.seed": 5}, {"train.batch_size": 16}, {"train.seed": 3}, {"classroom.student": "cifar_resnet8"}):
        config = banked(**over)
        room = kit.classroom(config)
        same = over != {"data.seed": 5}  # thirty digits of 1,437 are numbered by themselves, and a seed chooses others
        assert (bank_files.id_of(bank_build.identity(room.mentors[0], room.data, "fp32", config)) == before) == same


def test_runs_on_most_of_the_images_share_a_bank_of_all() -> None:
    def opened(**over: Any) -> Bank:
        config = banked(**{"data.per_class": None, **over})
        return bank_build.open_mentors(kit.classroom(config), config).banks[0]

    whole, part, other = opened(), opened(**{"data.holdout": 0.2}), opened(**{"data.holdout": 0.3, "data.seed": 4})
    assert whole.id == part.id == other.id
    assert whole.rows == 1437 * whole.views
    few = opened(**{"data.per_class": 5})
    assert few.id != whole.id
    assert few.rows == 50 * few.views


def test_the_same_mentor_twice_is_banked_once(tmp_path: Path) -> None:
    config = banked(**{"classroom.peers": [kit.MENTORS[1], kit.MENTORS[0]]})
    opened = kit.session(config, tmp_path / "run")
    assert [member.name for member in opened.mentors.members] == ["cifar_resnet14", "cifar_resnet14#2", "cifar_resnet8"]
    assert len(bank_files.every()) == 2
    assert opened.mentors.banks[0] is opened.mentors.banks[1]
    kit.drive(groups.go(opened))
    out = stacked(opened.mentors, next(opened.stream.epoch(0)))
    assert out[0].equal(out[1])
    assert not out[0].equal(out[2])


def test_plain_images_are_answered_live_and_not_kept(tmp_path: Path) -> None:
    opened = kit.session(banked(), tmp_path / "run")
    batch = next(opened.data.train.plain(6))
    out = stacked(opened.mentors, batch)
    with torch.no_grad():
        torch.testing.assert_close(out[0], opened.mentors.members[0](batch.images), rtol=1e-3, atol=1e-3)
    assert share(opened.mentors.banks[0]) == 0
    nameless = Batch(batch.images, batch.target, batch.index, batch.view)
    assert stacked(opened.mentors, nameless).equal(out)


def test_limited_views_of_an_uncountable_augmentation_are_banked(tmp_path: Path) -> None:
    config = banked(**{"data.augment": "cutout", "data.views": 2, "train.epochs": 4})
    cold = kit.trained(config, tmp_path / "cold")
    bank = Bank(bank_files.every()[0])
    assert bank.rows == 30 * 2
    assert share(bank) > 0.8
    warm = kit.session(config.with_(**{"data.seed": 0}), tmp_path / "warm")
    silence(warm.mentors)
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(cold))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "says", "cure"),
    [
        ({"train.mixup": 0.2}, "mixup and cutmix blend images at random", "train.mixup=0"),
        ({"train.cutmix": 1.0}, "mixup and cutmix", "classroom.bank=false"),
        ({"data.augment": "cutout"}, "augmentation cutout has too many views of an image to store", "data.views=8"),
        ({"data.augment": "imagenet"}, "augmentation imagenet", "crop-flip"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_a_bank_cannot_hold_is_refused_with_the_cure(
    tmp_path: Path, over: dict[str, Any], says: str, cure: str
) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        kit.session(banked("aver", **over), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert cure in caught.value.hint
    assert not (tmp_path / "run").exists()
    assert bank_files.every() == []
    off = kit.session(kit.recipe("aver", **over, **{"classroom.bank": False}), tmp_path / "live")
    assert list(off.mentors.banks) == []


@pytest.mark.parametrize(
    ("needs", "over", "says"),
    [
        ({"maps"}, {}, "method aver reads its mentors' intermediate maps"),
        ({"pooled"}, {}, "method aver reads its mentors' pooled features"),
        ({"pooled"}, {"classroom.bank_pooled": True}, ""),
        ({"index", "hard_target"}, {}, ""),
    ],
    ids=["maps", "pooled", "pooled kept", "neither"],
)
def test_a_method_that_reads_more_than_a_bank_answers_is_named(
    needs: set[str], over: dict[str, Any], says: str
) -> None:
    config = banked("aver", **over)
    room, method = kit.classroom(config), methods.build("aver", {})
    method.needs = frozenset(map(Need, needs))
    if not says:
        checks.check_method(method, config, room.data, 2)
        return
    with pytest.raises(RecipeError, match=says) as caught:
        checks.check_method(method, config, room.data, 2)
    assert "classroom.bank" in caught.value.hint
    method.teachers = 0
    checks.check_method(method, config, room.data, 2)  # without mentors it reads nothing of them


def test_a_learner_without_mentors_makes_no_bank(tmp_path: Path) -> None:
    kit.trained(banked("nokd"), tmp_path / "run")
    assert bank_files.every() == []


# --- notes and provenance ---------------------------------------------------------------------------------------------


def test_banks_are_noted_and_in_the_provenance(tmp_path: Path) -> None:
    config = banked()
    kit.trained(config, tmp_path / "cold")
    room = kit.classroom(config)
    warm = kit.session(config, tmp_path / "warm", room=room)
    note = next(value for key, value, _ in room.notes if key == "bank of cifar_resnet14")
    bank = warm.mentors.banks[0]
    percent = f"{100 * share(bank):.1f} % filled"
    assert str(note).startswith(f"{bank.id}, logits, {bank.views} views, {percent}, ")
    facts = warm.run.provenance["banks"]
    assert facts["cifar_resnet14"] == {
        "id": bank.id, "form": "logits", "views": bank.views, "filled": round(share(bank), 4)
    }  # fmt: skip
    assert warm.run.recipe.classroom.bank
    assert kit.trained(kit.recipe("kd"), tmp_path / "live").provenance["banks"] == {}


def test_check_states_the_size_of_the_banks_and_creates_none() -> None:
    found = check.check(banked(), kit.CPU, 10)
    assert any(fact.startswith("banks: 2 of ") and ", 0 exist" in fact for fact in found.facts)
    assert bank_files.every() == []
    with pytest.raises(RecipeError, match="too many views of an image"):
        check.check(banked(**{"data.augment": "cutout"}), kit.CPU, 10)


# --- filling ahead ----------------------------------------------------------------------------------------------------


def built(config: Recipe, epochs: int | None = None) -> tuple[list[tuple[int, int]], Mentors]:
    room = kit.classroom(config)
    mentors = bank_build.open_mentors(room, config)
    return list(bank_build.build(mentors, room, config, epochs)), mentors


def test_a_built_bank_holds_every_view_and_a_second_building_asks_nobody(tmp_path: Path) -> None:
    config = banked(**{"data.per_class": 2})
    steps, mentors = built(config)
    assert all(share(bank) == 1 for bank in mentors.banks)
    views = mentors.banks[0].views
    assert steps[-1] == (20 * views, 20 * views)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    room = kit.classroom(config)
    again = bank_build.open_mentors(room, config)
    silence(again)
    assert [*bank_build.build(again, room, config, None)][-1] == (20 * views, 20 * views)
    bank = again.banks[0]
    bank.table[[3, 50]] = 0  # damaged, and mended by building again
    _, mended = built(config)
    assert [*mended.banks[0].verify()][-1] == (bank.rows, bank.rows, 0)
    warm = kit.session(config, tmp_path / "run")
    silence(warm.mentors)
    kit.drive(groups.go(warm))


def test_a_bank_built_for_some_epochs_holds_what_a_run_of_them_meets(
    tmp_path: Path, without_banks: Callable[[], None]
) -> None:
    config = banked(**{"train.epochs": 2})
    built(config, 2)
    whole = {path.name: (path / "checks.bin").read_bytes() for path in bank_files.every()}
    warm = kit.session(config, tmp_path / "run")
    assert 0 < share(warm.mentors.banks[0]) < 0.2
    silence(warm.mentors)
    kit.drive(groups.go(warm))
    without_banks()
    kit.trained(config, tmp_path / "cold")
    assert {path.name: (path / "checks.bin").read_bytes() for path in bank_files.every()} == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_building_goes_on_where_it_stopped(number: int) -> None:
    config = banked(**{"data.per_class": 2})
    room = kit.classroom(config)
    mentors = bank_build.open_mentors(room, config)
    seen = 0

    def interrupted() -> None:
        nonlocal seen
        for done, _ in bank_build.build(mentors, room, config, None):
            seen = done
            if done > 50:
                raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(InterruptedRun, match=signal.Signals(number).name) as caught:
        interrupted()
    assert caught.value.exit_code == 130
    assert "continues where it stopped" in caught.value.hint
    assert signal.getsignal(number) is before
    kept = round(share(mentors.banks[0]) * mentors.banks[0].rows)
    assert seen <= kept < mentors.banks[0].rows
    steps, after = built(config)
    assert steps[-1][0] == steps[-1][1]
    assert share(after.banks[0]) == 1
    with pytest.raises(InterruptedRun):  # also where there is nothing to do but to look
        [raise_signal(number) for _ in bank_build.build(after, room, config, None)]


# --- pooled features --------------------------------------------------------------------------------------------------


def test_pooled_features_are_banked_beside_the_logits(tmp_path: Path) -> None:
    config = banked("kd", **{"classroom.bank_pooled": True})
    cold = kit.session(config, tmp_path / "run")
    batch = next(cold.stream.epoch(0))
    answer = cold.mentors.answer(batch).outputs
    silence(cold.mentors)
    again = cold.mentors.answer(batch).outputs
    live = Mentors(kit.classroom(config).mentors, "fp32", kit.CPU, needs=frozenset({"pooled"})).answer(batch).outputs
    for outputs in (answer, again, live):
        assert [output.vectors.shape for output in outputs] == [(8, 64), (8, 64)]
    for a, b, c in zip(answer, again, live, strict=True):
        assert a.vectors.equal(b.vectors)
        assert (a.vectors - c.vectors).abs().max() <= 2**-10 * c.vectors.abs().max()
        assert not c.vectors.is_inference()
    without = Mentors(kit.classroom(config).mentors, "fp32", kit.CPU).answer(batch).outputs
    assert [output.pooled for output in without] == [None, None]


def member(spec: str, **options: Any) -> Member:
    name = registry.resolve(spec)
    torch.manual_seed(0)
    net = registry.create(name, 7)
    return Member(
        net.module.eval(), name, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), input_size=net.input_size if not options
        else options["size"], interpolation="bilinear", num_classes=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "size", "width"),
    [
        ("timm:resnet18", 64, 512),
        ("timm:mobilenetv3_small_100", 64, 1024),
        ("timm:vit_tiny_patch16_224", 224, 192),
        ("torchvision:mobilenet_v3_small", 64, 1024),
        ("torchvision:squeezenet1_1", 64, 512),
        ("zoo:cifar_resnet8", 32, 64),
    ],
)
@torch.no_grad()
def test_the_penultimate_vector_is_what_the_last_layer_is_given(spec: str, size: int, width: int) -> None:
    one = member(spec, size=size)
    pixels = torch.rand(3, 3, size, size)
    seen = one.see(pixels, frozenset({"pooled"}))
    out, pooled = seen.out, seen.vectors
    assert out.equal(one(pixels))
    assert pooled.shape == (3, width)
    assert one.width == width
    last = [layer for layer in one.net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    if isinstance(last, nn.Linear):
        assert last(pooled).equal(out)
    assert not any("head" in key and "_head" in key.split(".")[0] for key in one.state_dict())  # listed once only
    if spec.startswith("zoo"):
        features = one.net.forward_head(one.net.forward_features(one.read(pixels)), pre_logits=True)  # pyright: ignore
        assert pooled.equal(features)
        twin = copy.deepcopy(one)  # as a moving average does
        twin.net.fc.weight.zero_()  # pyright: ignore
        assert twin.see(pixels, frozenset({"pooled"})).vectors.equal(pooled)
        assert twin.see(pixels, frozenset({"pooled"})).out.abs().max() <= twin.net.fc.bias.abs().max()  # pyright: ignore


def test_a_network_with_two_heads_has_no_penultimate_vector() -> None:
    with pytest.raises(WeightsError, match="does not end in one linear layer") as caught:
        _ = member("timm:deit_tiny_distilled_patch16_224").width
    assert "bank_pooled" in caught.value.hint


def test_threads_that_share_a_mentor_keep_their_vectors_apart() -> None:
    room = kit.classroom(banked())
    images = next(room.data.train.plain(30)).images
    one = Mentors(room.mentors, "fp32", kit.CPU, workers=1, needs=frozenset({"pooled"})).run(images, [0, 1], 10)
    many = Mentors(room.mentors, "fp32", kit.CPU, workers=3, needs=frozenset({"pooled"})).run(images, [0, 1], 10)
    for few, more in zip(one, many, strict=True):
        assert few.out.equal(more.out)
        assert few.vectors.equal(more.vectors)


# --- other tasks, other versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 6])
def test_mentors_of_several_classes_an_image_are_banked(tmp_path: Path, classes: int) -> None:
    """Targets are 0/1 matrices [N, K]: a record holds the logits [K] whatever the task."""
    dice = np.random.default_rng(0)
    parts = {"train": 40, "test": 20}
    images = {f"{part}_images": dice.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for part, n in parts.items()}
    labels = {f"{part}_labels": dice.integers(0, 2, (n, classes)) for part, n in parts.items()}
    np.savez(tmp_path / "toy.npz", **images, **labels)
    data = {"data.name": f"npz:{tmp_path / 'toy.npz'}", "data.per_class": None, "data.image_size": 16}
    config = kit.recipe("kd", task="multilabel", **data)
    alone = {"classroom.teacher": None, "classroom.peers": [], "classroom.student": "cifar_resnet8", "train.epochs": 1}
    mentor = kit.trained(config.with_method("nokd").with_(**alone), tmp_path / "mentor")
    config = config.with_(**{"classroom.teacher": f"cifar_resnet8@{mentor.path}", "classroom.peers": []}, **BANKED)
    cold = kit.trained(config, tmp_path / "cold")
    warm = kit.session(config, tmp_path / "warm")
    batch = next(warm.stream.epoch(0))
    assert batch.target.shape == (8, classes)
    with torch.no_grad():
        live = warm.mentors.members[0](batch.images)
    silence(warm.mentors)
    out = stacked(warm.mentors, batch)[0]
    assert out.shape == (8, classes)
    assert (out - live).abs().max() <= 2**-10 * live.abs().max() + 1e-4
    kit.drive(groups.go(warm))
    assert kit.same(weights_of(warm.run), weights_of(cold))
    assert {path.name for path in bank_files.every()} == {warm.mentors.banks[0].id}


def test_banks_of_earlier_versions_have_the_same_ids() -> None:
    """Format 1 had `top`, which is None in a bank of whole records: the keys, and so the ids, are those of then."""
    keys = """format architecture weights data left_out samples which image_size augment views mean std input_size
        interpolation class_index classes precision top pooled"""
    found = changed(kit.classroom(banked()))
    assert list(found) == keys.split()
    assert found["top"] is None
    assert found["format"] == 1
    assert isinstance(found["image_size"], int)
    assert isinstance(found["input_size"], int)
