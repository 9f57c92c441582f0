"""The example in kdcli/methods/README.md: it passes the contract, trains, and computes what its paper says."""

import re
from pathlib import Path

import pytest
import torch
from cli_kit import PEER, STUDENT, TEACHER, TINY, add_mentors, kdcli
from torch.nn import functional as F

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.workflows import method_contract

README = Path(methods.__file__).with_name("README.md")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example as a user would save it, in a folder of its own; the name by which a command finds it."""
    page = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(# my_method\.py\n.*?)^```$", page, re.M | re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 40
    (cls,) = re.findall(r"^class (\w+)\(Method\)", blocks[0], re.M)
    (tmp_path / "my_method.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert f"kdcli check --method my_method.py:{cls}\n" in page
    assert f"kdcli compare --methods my_method.py:{cls},kd " in page
    return f"my_method.py:{cls}"


def test_its_options_are_its_annotated_fields(example):
    assert set(methods.options(example)) == {"tau", "alpha", "beta"}
    assert methods.build(example, {"tau": 8}).tau == 8.0
    with pytest.raises(RecipeError, match=r"method\.tau: .*greater than 0"):
        methods.build(example, {"tau": 0.0})


def test_it_passes_the_contract(example):
    said = kdcli("check", "--method", example, "--json").json
    results = {one["check"]: one["result"] for one in said["checks"]}
    assert results.keys() == method_contract.CHECKS.keys()
    assert {check for check, result in results.items() if result != "passed"} == {
        "no step waits for the GPU",
        "peers' targets are detached",
    }


def test_it_distils(example, tmp_path):
    add_mentors(TEACHER, PEER, fit=True)
    room = ("--teacher", TEACHER, "--student", STUDENT, "--data", "digits", *TINY)
    said = kdcli("distill", "--method", example, *room, "--out", "run", "--json").json
    assert said["top1"] > 0
    row = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"corrected"' in row


def test_it_computes_the_papers_shift(example):
    toy = method_contract.Toy(torch.device("cpu"))
    (phase, given), *_ = toy.subject(example, {}).lessons
    lesson = method_contract.remade(given)
    teacher = lesson.mentors[0].out
    teacher[:5] = teacher[:5].roll(1, -1)  # mistakes
    terms = methods.build(example, {}).loss(lesson, phase)
    corrected = teacher.clone()
    for row, true in zip(corrected, lesson.target.tolist(), strict=True):
        top = int(row.argmax())
        row[top], row[true] = row[true].item(), row[top].item()
    assert (corrected.argmax(-1) == lesson.target).all()
    log_q = F.log_softmax(lesson.student.out / 4, -1)
    kl = 16 * F.kl_div(log_q, F.softmax(corrected / 4, -1), reduction="batchmean")
    torch.testing.assert_close(terms["teacher"], 0.9 * kl)
    torch.testing.assert_close(terms["hard"], 0.1 * F.cross_entropy(lesson.student.out, lesson.target))
    assert lesson.notes["corrected"] >= 5 / len(lesson.target) - 1e-6
