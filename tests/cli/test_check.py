"""kdcli check: the classroom's table, measured, and a warning for a mentor that guesses."""

import pytest
import torch
from cli_kit import CLASSROOM, PEER, STUDENT, TEACHER, TINY, add_mentors, kdcli

from kdcli import recipe as recipes
from kdcli.models import registry


def size(name: str) -> int:
    return sum(p.numel() for p in registry.create(registry.resolve(name), 10).module.parameters())


def test_the_table_has_sizes_scores_and_the_sums_of_table_7():
    add_mentors(TEACHER, PEER, fit=True)
    said = kdcli("check", *CLASSROOM, *TINY)
    found = kdcli("check", *CLASSROOM, *TINY, "--json").json
    student, teacher, peer = found["seats"]
    assert [one["role"] for one in found["seats"]] == ["student", "teacher", "peer"]
    assert [one["params"] for one in found["seats"]] == [size(STUDENT), size(TEACHER), size(PEER)]
    assert student["top1"] is None
    measured = kdcli("evaluate", TEACHER, "--data", "digits", "--json").json["top1"]
    assert teacher["top1"] == measured > 50
    assert peer["macs"] < teacher["macs"]
    n_plus_1 = f"(n+1)t {2 * size(TEACHER) / 1e6:.2f} M"
    assert n_plus_1 in said.out
    assert f"1t+np {(size(TEACHER) + size(PEER)) / 1e6:.2f} M" in said.out
    assert f"{size(TEACHER):,}" in said.out
    assert f"{teacher['top1']:.2f}" in said.out
    assert "warning" not in said.out
    assert found["warnings"] == []
    assert "50 training images, 360 test images, 10 classes" in said.out
    assert said.next == " ".join(["kdcli distill", *CLASSROOM, *TINY])
    assert set(found["taps"]) == {STUDENT, TEACHER, PEER}
    assert list(found["taps"][TEACHER])[-2:] == ["pooled", "logits"]
    assert found["taps"][TEACHER]["logits"] == [10]
    shape = "x".join(map(str, found["taps"][TEACHER]["stage1"]))
    assert f"taps of {TEACHER}: stage1 {shape}, stage2" in " ".join(said.out.split())


def test_a_mentor_that_guesses_is_warned_of(here):
    add_mentors(TEACHER, PEER)
    said = kdcli("check", *CLASSROOM, *TINY)
    assert f"warning: {TEACHER} scores" in said.out
    assert "guessing scores 10.00 %" in said.out
    assert len(kdcli("check", *CLASSROOM, *TINY, "--json").json["warnings"]) == 2
    assert not (here / "runs").exists()


def test_only_as_many_images_are_scored_as_asked():
    add_mentors(TEACHER)
    said = kdcli("check", "--teacher", TEACHER, "--student", STUDENT, "--data", "digits", *TINY, "--images", "100")
    assert "mentors scored on 100 of 360 test images" in said.out


@pytest.mark.parametrize(
    ("method", "sets", "epochs", "phases"),
    [
        ("ft", ["method.init_epochs=4"], 5, ["paraphraser", "main"]),
        ("disk", ["train.epochs=3"], 6, ["guide", "student"]),
    ],
)
def test_every_phase_is_tried_and_counted(method: str, sets: list[str], epochs: int, phases: list[str]) -> None:
    add_mentors(TEACHER)
    options = [word for one in sets for word in ("--set", one)]
    alone = ["--teacher", TEACHER, "--student", STUDENT, "--data", "digits", "--method", method]
    said = kdcli("check", *alone, *TINY, *options, "--images", "50").out
    assert f"{epochs} epochs, estimated time: " in said
    for phase in phases:
        assert f"one step of phase {phase} (" in " ".join(said.split())


def test_a_recipe_is_checked_and_named_again_in_the_next_line(here):
    quickstart = recipes.load("quickstart")
    add_mentors(str(quickstart.classroom.teacher), *quickstart.classroom.peers)
    kdcli("recipes", "cp", "quickstart", "mine.toml")
    said = kdcli("check", "--recipe", "mine.toml", "--set", "train.lr=0.1")
    assert said.next == "kdcli distill --recipe mine.toml --set train.lr=0.1"
    assert f"{quickstart.train.epochs} epochs, estimated time: " in said.out


def test_mentors_are_scored_on_images_of_every_class():
    """A folder's pictures come sorted by class: the first few would all be of one."""
    from kdcli.data.dataset import Pixels, Split
    from kdcli.data.views import Views
    from kdcli.workflows.check import _some

    pixels = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    sorted_by_class = Split(Pixels(pixels, Views("none", 8)), torch.arange(100) // 10)
    assert _some(sorted_by_class, 20).targets.bincount().tolist() == [2] * 10
    assert len(_some(sorted_by_class, 0)) == len(_some(sorted_by_class, 500)) == 100
