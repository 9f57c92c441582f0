"""The run folder: found by name or as the newest, written whole, and read back."""

import json
import os
import re
from pathlib import Path

import pytest

from kdcli import recipe as recipes
from kdcli.errors import DataError, RecipeError
from kdcli.recipe import Recipe
from kdcli.system import files
from kdcli.training import run as runs
from kdcli.training.run import Run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe() -> Recipe:
    return recipes.from_dict({"data": {"name": "digits", "seed": 3}, "train": {"seed": 5}}, "test")


def made(name: str, started: str, *, finished: bool = True, kind: str = "distill", **facts: object) -> Run:
    run = Run(Path("runs") / name)
    run.start(recipe(), {**runs.provenance(kind, recipe(), **facts), "started": started})
    if finished and kind == "compare":
        (run.path / "compare.json").touch()
    elif finished:
        run.amend(finished=True)
    return run


def test_a_run_keeps_its_recipe_and_provenance() -> None:
    run = made("a", "2026-01-01", mentors={"x": 1})
    assert run.recipe == recipe()
    assert run.provenance["recipe"] == recipe().hash()
    assert run.provenance["seeds"] == {"data": 3, "train": 5}
    assert run.provenance["mentors"] == {"x": 1}
    run.amend(best=70.5)
    assert run.provenance["best"] == 70.5
    assert run.provenance["mentors"] == {"x": 1}
    assert run.kind == "distill"


def test_a_folder_is_laid_out_once() -> None:
    run = made("a", "2026-01-01")
    with pytest.raises(RecipeError, match="already holds a run") as caught:
        run.start(recipe(), {})
    assert "kdcli runs rm" in caught.value.hint
    assert caught.value.exit_code == 2


def test_new_runs_never_share_a_folder() -> None:
    one = runs.new("net", "kd")
    assert re.fullmatch(r"\d{8}-\d{6}-net-kd", one.name)
    one.path.mkdir(parents=True)
    names = {one.name}
    for _ in range(3):
        run = runs.new("net", "kd")
        run.path.mkdir(parents=True)
        names.add(run.name)
    assert len(names) == 4
    assert runs.new("net", "kd", Path("mine")).path == Path("mine")


def test_the_newest_finished_run_is_the_one_meant() -> None:
    made("z-old", "2026-01-01T00:00:00")
    made("a-new", "2026-01-03T00:00:00")
    made("m-going", "2026-01-05T00:00:00", finished=False)
    assert runs.find(None).name == "a-new"
    assert [run.name for run in runs.every()] == ["z-old", "a-new", "m-going"]


def test_an_unfinished_run_is_found_where_that_is_wanted() -> None:
    made("old", "2026-01-01")
    made("going", "2026-01-05", finished=False)
    assert runs.find(None, learner=False).name == "going"
    assert runs.find("going").name == "going"


def test_a_run_is_found_by_name_and_by_path() -> None:
    run = made("a", "2026-01-01")
    assert runs.find("a").path == runs.find("runs/a").path == run.path
    assert runs.find(str(run.path.resolve())).name == "a"


def test_a_compare_is_its_learner_unless_it_is_wanted_itself() -> None:
    made("c", "2026-01-02", kind="compare", stands_for="kd-4")
    assert runs.find("c").path == Path("runs/c/kd-4")
    assert runs.find(None).path == Path("runs/c/kd-4")
    assert runs.find("c", learner=False).path == Path("runs/c")


def test_no_run_at_all_says_how_to_make_one() -> None:
    with pytest.raises(RecipeError, match="no finished run under runs/") as caught:
        runs.find(None)
    assert "kdcli quickstart" in caught.value.hint


def test_an_unknown_run_is_refused_with_the_nearest() -> None:
    made("20260101-kd", "2026-01-01")
    with pytest.raises(RecipeError, match="no run called '20260102-kd'") as caught:
        runs.find("20260102-kd")
    assert "20260101-kd" in caught.value.hint
    assert "kdcli runs ls" in caught.value.hint


def test_a_broken_provenance_names_its_file() -> None:
    run = made("a", "2026-01-01")
    (run.path / "provenance.json").write_text("{")
    with pytest.raises(RecipeError, match=r"provenance\.json: not a run's provenance"):
        _ = run.provenance


def test_rows_are_read_back_and_forgotten() -> None:
    run = made("a", "2026-01-01")
    assert run.metrics() == []
    run.forget_after(3)
    assert not (run.path / "metrics.jsonl").exists()
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch, "x": epoch / 3})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "x"')
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3]
    run.forget_after(2)
    assert run.metrics() == [{"epoch": 1, "x": 1 / 3}, {"epoch": 2, "x": 2 / 3}]
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_run_knows_its_size_and_can_go() -> None:
    run = made("a", "2026-01-01")
    before = run.size()
    (run.path / "inner").mkdir()
    (run.path / "inner" / "file").write_bytes(b"x" * 1000)
    assert run.size() == before + 1000
    run.remove()
    assert not run.path.exists()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.txt"
    files.write_text(path, "one")
    assert path.read_text() == "one"

    def fails(temporary: Path) -> None:
        assert temporary.parent == path.parent  # a rename is atomic within one folder only
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="the disk is full") as caught:
        files.write_atomic(path, fails)
    assert path.read_text() == "one"
    assert [one.name for one in path.parent.iterdir()] == ["x.txt"]
    assert caught.value.exit_code == 3
    assert "kdcli runs rm" in caught.value.hint


def test_an_interruption_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def breaks(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "x.txt", breaks)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_folder_is_a_clear_word(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        files.write_text(tmp_path / "file" / "x.txt", "y")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_are_as_readable_as_the_users_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    files.write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_provenance_is_plain_json() -> None:
    facts = runs.provenance("distill", recipe(), extra=[1, None])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["command"].startswith("kdcli")
    assert runs._version("no-such-package-at-all") == "not installed"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    made("good", "2026-01-01T00:00:00")
    broken = made("broken", "2026-01-02T00:00:00")
    (broken.path / "provenance.json").write_text("{")
    made("odd", "2026-01-03T00:00:00").path.joinpath("recipe.toml").write_text("nonsense = 1")
    assert [run.name for run in runs.every()] == ["good"]
    assert runs.find(None).name == "good"
    said = capsys.readouterr().err
    assert "broken is left out" in said
    assert "odd is left out" in said
