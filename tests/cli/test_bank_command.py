"""kdcli bank: build, ls, verify, rm, and runs with --bank."""

import gc
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_kit import CLASSROOM, PEER, TEACHER, TINY, add_mentors, kdcli

from kdcli.mentors import bank_files
from kdcli.mentors.mentors import Mentors

FEW = ("--set", "data.per_class=2", "--set", "train.batch_size=20")
MENTORS = ("--teacher", TEACHER, "--peers", PEER, "--data", "digits", *FEW)
VIEWS = 25  # of a digit at 16 pixels


@pytest.fixture(autouse=True)
def _zoo() -> None:
    add_mentors(TEACHER, PEER)


def test_build_ls_verify_distill_rm(here: Path):
    built = kdcli("bank", "build", *MENTORS)
    assert "100.0" in built.out
    assert f"bank of {TEACHER}" in built.out  # its size and share, noted before it is filled
    assert built.next.startswith(
        f"kdcli distill --bank --teacher {TEACHER} --peers {PEER} --student NAME --data digits"
    )
    rows = kdcli("bank", "ls", "--json").json
    assert {row["mentor"] for row in rows} == {TEACHER, PEER}
    for row in rows:
        assert (row["filled"], row["views"], row["data"], row["form"], row["state"]) == (
            1,
            VIEWS,
            "digits",
            "logits",
            "ok",
        )
        assert row["bytes"] >= 20 * VIEWS * 24
        assert row["used"].startswith("20")
    listed = kdcli("bank", "ls")
    assert all(row["id"] in listed.out for row in rows)
    assert kdcli(*listed.next.split()[1:], "--json").json == [
        {"id": row["id"], "answers": 20 * VIEWS, "damaged": 0, "state": "ok"} for row in rows
    ]
    before = {path: (path / "checks.bin").read_bytes() for path in bank_files.every()}
    again = built.next.replace("NAME", "cifar_resnet10_xxs").split()[1:]
    run = kdcli(*again, "--epochs", 2, "--json").json["run"]
    assert {path: (path / "checks.bin").read_bytes() for path in bank_files.every()} == before
    facts = json.loads(Path(run, "provenance.json").read_text())["banks"]
    assert {name: fact["id"] for name, fact in facts.items()} == {row["mentor"]: row["id"] for row in rows}
    assert {fact["filled"] for fact in facts.values()} == {1.0}
    gc.collect()
    removed = kdcli("bank", "rm", rows[0]["id"][:10], "--yes")
    assert rows[0]["id"] in removed.out
    assert [row["id"] for row in kdcli("bank", "ls", "--json").json] == [rows[1]["id"]]
    kdcli("bank", "rm", "--all", "--yes")
    assert "no banks" in kdcli("bank", "ls").out
    assert kdcli("bank", "ls", "--json").json == []


def test_runs_fill_banks_and_share_them():
    first = kdcli("distill", *CLASSROOM, *TINY, "--bank")
    assert "0.0 % filled" in first.out
    assert "classroom.bank = true" in first.out
    ids = {row["id"] for row in kdcli("bank", "ls", "--json").json}
    second = kdcli("compare", *CLASSROOM, *TINY, "--bank", "--seeds", 1, "--methods", "aver")
    assert "4.0 % filled" in second.out  # one of 25 views
    rows = kdcli("bank", "ls", "--json").json
    assert {row["id"] for row in rows} == ids
    assert {round(row["filled"], 4) for row in rows} == {0.04}


def test_build_fills_what_a_run_of_some_epochs_meets():
    kdcli("bank", "build", *CLASSROOM, *TINY, "--json")
    before = {path.name: (path / "checks.bin").read_bytes() for path in bank_files.every()}
    assert len(before) == 2
    kdcli("distill", *CLASSROOM, *TINY, "--bank", "--json")
    assert {path.name: (path / "checks.bin").read_bytes() for path in bank_files.every()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_build_leaves_with_130_and_goes_on(monkeypatch: pytest.MonkeyPatch, number: int):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    answer, count = Mentors.answer, 0

    def stopped(self: Mentors, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            signal.raise_signal(number)
        return answer(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Mentors, "answer", stopped)
        said = kdcli("bank", "build", *MENTORS, code=130)
    assert "continues where it stopped" in said.err
    assert f"{4 * 20} of {20 * VIEWS} views" in said.err  # the fifth is broken off, nothing being lost
    assert {row["filled"] for row in kdcli("bank", "ls", "--json").json} == {4 / VIEWS}
    assert {row["filled"] for row in kdcli("bank", "build", *MENTORS, "--json").json} == {1}
    assert count == 5


def test_damage_is_told_by_verify_and_mended_by_a_run():
    kdcli("bank", "build", *MENTORS, "--json")
    path = bank_files.every()[0]
    raw = bytearray((path / "answers.bin").read_bytes())
    raw[5] ^= 1
    raw[24 * 7] ^= 64
    (path / "answers.bin").write_bytes(raw)
    said = kdcli("bank", "verify", code=3)
    assert path.name in said.err
    assert "kdcli bank build" in said.err
    by = {row["id"]: row for row in json.loads(kdcli("bank", "verify", "--json", code=3).out)}
    assert by[path.name] == {"id": path.name, "answers": 20 * VIEWS, "damaged": 2, "state": "damaged"}
    assert {row["state"] for row in by.values()} == {"damaged", "ok"}
    kdcli("bank", "verify", bank_files.every()[1].name[:8])
    kdcli("bank", "build", *MENTORS, "--json")
    kdcli("bank", "verify")


def test_a_run_tells_of_damaged_answers():
    kdcli("distill", *CLASSROOM, *TINY, "--bank", "--json")
    for path in bank_files.every():
        (path / "answers.bin").write_bytes(bytes(b ^ 1 for b in (path / "answers.bin").read_bytes()))
    said = kdcli("distill", *CLASSROOM, *TINY, "--bank", "--json")
    assert said.err.count("50 damaged records of bank ") == 2
    assert said.json["top1"] >= 0  # and the JSON is nothing else


def test_a_broken_bank_is_listed_refused_and_removed():
    kdcli("bank", "build", *MENTORS, "--json")
    path = bank_files.every()[0]
    os.truncate(path / "answers.bin", 11)
    listed = kdcli("bank", "ls")
    assert "answers.bin is 11 bytes long" in listed.out
    assert "answers.bin is 11 bytes long" in kdcli("bank", "verify", code=3).out
    said = kdcli("bank", "build", *MENTORS, code=3)
    assert f"kdcli bank rm {path.name}" in said.err
    gc.collect()
    kdcli("bank", "rm", path.name, "--yes")
    assert {row["filled"] for row in kdcli("bank", "build", *MENTORS, "--json").json} == {1}


@pytest.mark.parametrize(
    ("typed", "code", "says"),
    [
        (["bank", "build", "--data", "digits"], 2, "--teacher"),
        (["bank", "build", *MENTORS, "--set", "data.augment=disk"], 2, "data.views=8"),
        (["bank", "build", *MENTORS, "--set", "data.views=25"], 2, "has only 25 views"),
        (["bank", "build", *MENTORS, "--set", "classroom.bank_top=10"], 2, "classroom.bank_top was removed"),
        (["distill", *CLASSROOM, *TINY, "--bank", "--set", "train.mixup=0.2", "--method", "aver"], 2, "train.mixup=0"),
        (["bank", "verify", "nothing"], 2, "kdcli bank ls"),
        (["bank", "rm"], 2, "--all"),
        (["bank", "rm", "abc", "--all"], 2, "which bank"),
        (["distill", "--resume", "x", "--bank"], 2, "--bank would change it"),
        (["compare", "--resume", "x", "--bank"], 2, "--bank would change it"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(typed: list[str], code: int, says: str):
    said = kdcli(*typed, code=code)
    assert says in said.err
    assert "Traceback" not in said.err


def test_nothing_is_removed_without_a_yes(monkeypatch: pytest.MonkeyPatch):
    kdcli("bank", "build", *MENTORS, "--json")
    gc.collect()
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, abort: asked.append(text) or _abort())
    said = kdcli("bank", "rm", bank_files.every()[0].name, code=130)
    assert "interrupted" in said.err
    assert "on digits" in asked[0]
    assert len(bank_files.every()) == 2


def _abort() -> None:
    import typer

    raise typer.Abort


def test_check_counts_the_banks():
    said = kdcli("check", *CLASSROOM, *TINY, "--set", "classroom.bank=true", "--images", 10)
    assert "banks: 2 of " in said.out
    assert bank_files.every() == []
