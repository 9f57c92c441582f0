"""A user's own method, `file.py:Class`: found, run, saved with the run, and refused with a clear message."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from cli_kit import STUDENT, TEACHER, TINY, add_mentors, kdcli

from kdcli import methods, recipe as recipes
from kdcli.errors import RecipeError
from kdcli.methods import Need
from kdcli.system import user_code
from kdcli.training import run as runs

SOURCE = """
from kdcli.methods import Lesson, Method, Phase, Terms

class Mine(Method):
    weight: float = 1.0
    "Weight of the distillation."

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        hard = lesson.task.hard(lesson.student.out, lesson.target).mean()
        soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, 4.0).mean()
        return {"hard": hard, "teacher": self.weight * soft}

class Other(Mine):
    pass

class Stranger:
    pass
"""
ROOM = ("--teacher", TEACHER, "--student", STUDENT, "--data", "digits", *TINY)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that holds my_file.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_file.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def stopped(*args: object, path: str) -> runs.Run:
    """A run of two epochs that was interrupted after the first."""
    from kdcli.errors import InterruptedRun
    from kdcli.training import loop

    record = loop._record

    def interrupted(session, learner, epoch, result):
        row = record(session, learner, epoch, result)
        if epoch == 2:
            raise KeyboardInterrupt
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_record", interrupted)
        kdcli(*args, "--epochs", "2", "--out", path, code=130)
    assert InterruptedRun.exit_code == 130
    return runs.Run(Path(path))


# --- found ------------------------------------------------------------------------------------------------------------


def test_it_is_built_with_its_options():
    method = methods.build("my_file.py:Mine", {"weight": 2})
    assert (type(method).__name__, method.weight) == ("Mine", 2.0)
    (option,) = methods.options("my_file.py:Mine").values()
    assert (option.name, option.words, option.default) == ("weight", "float", 1.0)
    assert option.doc == "Weight of the distillation."
    assert methods.find("my_file.py:Mine") is methods.find(str(Path("my_file.py").resolve()) + ":Mine")
    with pytest.raises(RecipeError, match=r"method\.weigh: method Mine has no such option") as caught:
        methods.build("my_file.py:Mine", {"weigh": 2})
    assert "weight" in caught.value.hint
    with pytest.raises(RecipeError, match=r"method\.weight: .*number"):
        methods.build("my_file.py:Mine", {"weight": "much"})


def test_a_recipes_folder_comes_before_the_current_one(here):
    (here / "sub").mkdir()
    (here / "sub" / "my_file.py").write_text(SOURCE.replace("= 1.0", "= 9.0"), encoding="utf-8")
    (here / "sub" / "r.toml").write_text('[method]\nname = "my_file.py:Mine"\n', encoding="utf-8")
    (here / "r.toml").write_text('extends = "sub/r.toml"\n[method]\nname = "my_file.py:Other"\n', encoding="utf-8")
    weights = {}
    for name in ("sub/r.toml", "r.toml"):
        chosen = recipes.load(name).method
        weights[name] = methods.build(chosen.name, chosen.options).weight
    assert weights == {"sub/r.toml": 9.0, "r.toml": 1.0}
    (here / "far").mkdir()
    (here / "far" / "r.toml").write_text('[method]\nname = "my_file.py:Mine"\nweight = 3.0\n', encoding="utf-8")
    assert recipes.load("far/r.toml").method.name == f"{here / 'my_file.py'}:Mine"  # from here, for it is not there
    assert recipes.load("far/r.toml").method.label == "Mine"


def test_the_recipes_hash_is_the_files_content_wherever_it_lies(here):
    def hashed(path: Path) -> str:
        return recipes.from_dict({"method": {"name": f"{path}:Mine"}}, "test").hash()

    before = hashed(here / "my_file.py")
    shutil.copy("my_file.py", "copy.py")
    assert hashed(here / "copy.py") == before
    assert recipes.from_dict({"method": {"name": f"{here / 'copy.py'}:Other"}}, "test").hash() != before
    (here / "copy.py").write_text(SOURCE + "# changed\n", encoding="utf-8")
    assert hashed(here / "copy.py") != before


def test_only_what_is_named_runs(here):
    (here / "trap.py").write_text(SOURCE + "open('ran', 'w').close()\n", encoding="utf-8")
    (here / "r.toml").write_text(
        '[method]\nname = "trap.py:Mine"\n[baselines."trap.py:Other"]\nweight = 2.0\n', encoding="utf-8"
    )
    read = recipes.load("r.toml")
    assert read.hash()
    assert kdcli("recipes", "cat", "r.toml", "--whole").out
    assert not (here / "ran").exists()
    methods.find(read.method.name)
    assert (here / "ran").exists()


def test_the_modules_name_is_private(here):
    (here / "torch.py").write_text(SOURCE, encoding="utf-8")
    before = sys.modules["torch"]
    cls = methods.find("torch.py:Mine")
    assert sys.modules["torch"] is before
    assert cls.__module__.startswith(user_code.PRIVATE)


@pytest.mark.parametrize(
    ("name", "words", "hint"),
    [
        ("my_fle.py:Mine", "there is no file my_fle.py", "my_file.py"),
        ("nowhere/my_file.py:Mine", "there is no file nowhere/my_file.py", ""),
        ("my_file:Mine", "there is no file my_file", "my_file.py"),
        ("my_file.py:Mein", "my_file.py has no class Mein", "Mine"),
        ("my_file.py:Zzz", "my_file.py has no class Zzz", "Allowed: Mine, Other."),
        ("my_file.py:Stranger", "my_file.py: Stranger is not a method", "Mine, Other"),
        ("my_file.py:SOURCE", "my_file.py has no class SOURCE", "Mine"),
        ("my_file.py:Phase", "my_file.py: Phase is not a method", "Mine"),
        ("my_file.py:Method", "my_file.py: Method defines no loss", "def loss"),
        ("my_file.py", "my_file.py has no class name", "my_file.py:Mine"),
        ("my_file.py:", "my_file.py: has no class name", "my_file.py:Mine"),
        ("mine", "no method called 'mine'", ""),
    ],
)
def test_what_cannot_be_found_is_refused_with_a_message(name, words, hint):
    said = kdcli("check", "--method", name, code=2)
    assert words in said.err
    assert hint in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def loss(self\n", "broken.py, line 1: "),
        ("\nimport no_such_module_zzz\n", "broken.py cannot be loaded: broken.py, line 2: ModuleNotFoundError"),
        ("def f():\n    return 1 / 0\nf()\n", "broken.py, line 2, in f: ZeroDivisionError"),
        ("raise SystemExit(3)\n", "broken.py cannot be loaded: broken.py, line 1: SystemExit"),
        ("x = 1\0\n", "broken.py"),
        (
            SOURCE.replace("    def loss", "    def __init__(self, **options):\n        1 / 0\n\n    def loss", 1),
            "method Mine cannot be created: broken.py, line 9, in __init__: Zero",
        ),
        (SOURCE.replace("float = 1.0", "Lesson = None"), "method Mine cannot be created: PydanticSchema"),
        (SOURCE.replace("weight: float", "weight: 'Nothing'"), "Mine: the annotations of its options cannot be read"),
        (SOURCE.replace("weight: float", "train: float"), "Mine: an option cannot be called train"),
        (
            SOURCE.replace("    def loss", "    needs = {'map', 'pooled'}\n\n    def loss", 1),
            "method Mine: needs names 'map', which does not exist",
        ),
        (
            SOURCE.replace("    def loss", "    tasks = frozenset({'clasify'})\n\n    def loss", 1),
            "method Mine: tasks names 'clasify', which does not exist",
        ),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_a_message(here, source, words):
    (here / "broken.py").write_text(source, encoding="utf-8")
    said = kdcli("check", "--method", "broken.py:Mine", code=2)
    assert words in said.err
    assert "Traceback" not in said.err
    assert not [name for name in sys.modules if name.startswith(user_code.PRIVATE) and name.endswith("broken")]


def test_a_typo_in_needs_names_the_nearest_whether_of_the_class_or_of_its_options(here):
    own = """    def __init__(self, **options):
        super().__init__(**options)
        self.needs = frozenset({"hardtarget"})

    def loss"""
    for needs, nearest in (("    needs = {'map'}\n\n    def loss", "maps"), (own, "hard_target")):
        (here / "typo.py").write_text(SOURCE.replace("    def loss", needs, 1), encoding="utf-8")
        with pytest.raises(RecipeError, match="which does not exist") as caught:
            methods.build("typo.py:Mine", {})
        assert nearest in caught.value.hint


def test_needs_may_be_written_as_words(here):
    (here / "words.py").write_text(SOURCE.replace("    def loss", "    needs = {'maps'}\n\n    def loss", 1))
    needs = methods.build("words.py:Mine", {}).needs
    assert needs == {Need.MAPS}
    assert all(isinstance(need, Need) for need in needs)


def test_constructor_parameters_are_refused_with_the_new_form(here):
    old = """    def __init__(self, weight: float = 2.0, tau: int = 4) -> None:
        super().__init__()
        self.weight = weight

    def loss"""
    source = SOURCE.replace('    weight: float = 1.0\n    """Weight of the distillation."""\n', "")
    (here / "old.py").write_text(source.replace("    def loss", old, 1), encoding="utf-8")
    said = kdcli("check", "--method", "old.py:Mine", code=2)
    assert "__init__ has parameters of its own (weight, tau); options are annotated class fields" in said.err
    assert "weight: float = 2.0; tau: int = 4" in said.err
    assert "def __init__(self, **options): super().__init__(**options)" in said.err
    (here / "none.py").write_text(
        SOURCE.replace("    def loss", "    def __init__(self):\n        super().__init__()\n\n    def loss", 1)
    )
    assert "does not take its options (weight)" in kdcli("check", "--method", "none.py:Mine", code=2).err


def test_what_follows_from_options_is_set_in_the_constructor(here):
    derived = """    size: int = 2

    def __init__(self, **options):
        super().__init__(**options)
        self.double = 2 * self.size

    def loss"""
    (here / "derived.py").write_text(SOURCE.replace("    def loss", derived, 1), encoding="utf-8")
    method = methods.build("derived.py:Mine", {"size": 5})
    assert (method.size, method.double, method.weight) == (5, 10, 1.0)
    child = SOURCE.replace("class Other(Mine):\n    pass", "class Other(Mine):\n    weight: float = 3.0")
    (here / "child.py").write_text(child, encoding="utf-8")
    (option,) = methods.options("child.py:Other").values()
    assert (option.default, option.doc) == (3.0, "Weight of the distillation.")
    assert methods.build("child.py:Other", {}).weight == 3.0


def test_check_lists_options_tasks_and_needs():
    said = kdcli("check", "--method", "my_file.py:Mine").out
    row = next(line for line in said.splitlines() if line.startswith("weight "))
    assert row.split() == ["weight", "float", "1.0", "Weight", "of", "the", "distillation."]
    assert "tasks: classify, multilabel" in said
    found = kdcli("check", "--method", "nkd", "--json").json
    known = {one["name"]: one for one in found["known_options"]}
    assert known["tau"] == {
        "name": "tau", "type": "float > 0", "default": 1.0, "doc": "Temperature of the non-target classes.",
    }  # fmt: skip
    assert (found["mentors"], found["tasks"], found["needs"]) == (1, ["classify"], ["hard_target"])


def test_an_error_in_training_names_the_file_and_line(here):
    add_mentors(TEACHER, fit=True)
    (here / "fails.py").write_text(SOURCE.replace("hard = lesson", "hard = lesson.nothing or lesson"), encoding="utf-8")
    said = kdcli("distill", "--method", "fails.py:Mine", *ROOM, code=2)
    assert "fails.py, line 9, in loss: AttributeError" in said.err


# --- checked ----------------------------------------------------------------------------------------------------------


def test_check_reports_what_fails_and_exits_with_2(here):
    (here / "bad.py").write_text(
        SOURCE.replace(".mean()\n        return", ".mean()\n        hard.item()\n        return")
    )
    said = kdcli("check", "--method", "bad.py:Mine", code=2)
    line = next(line for line in said.out.splitlines() if line.startswith("nothing is read back"))
    assert "failed" in line
    assert "bad.py, line 11, in loss" in line
    assert "method Mine fails 1 of" in said.err
    found = kdcli("check", "--method", "bad.py:Mine", "--json", code=2).json
    assert [one["check"] for one in found["checks"] if one["result"] == "failed"] == [
        "nothing is read back to the host"
    ]


def test_check_takes_options_and_built_in_names(here):
    found = kdcli("check", "--method", "kd", "--set", "method.tau=2", "--json").json
    assert (found["method"], found["options"]) == ("kd", {"tau": 2})
    assert {one["result"] for one in found["checks"]} == {"passed", "not applicable"}
    said = kdcli("check", "--method", "my_file.py:Mine", "--set", "method.weight=0.5")
    assert (
        said.next
        == "kdcli distill --method my_file.py:Mine --set method.weight=0.5 --teacher NAME --student NAME --data NAME"
    )
    assert not (here / "runs").exists()
    assert "method.tau" in kdcli("check", "--method", "kd", "--set", "method.tau=0", code=2).err


def test_with_a_classroom_check_tests_own_methods_too():
    add_mentors(TEACHER, fit=True)
    found = kdcli("check", "--method", "my_file.py:Mine", *ROOM, "--json").json
    assert [one["role"] for one in found["seats"]] == ["student", "teacher"]
    assert {one["result"] for one in found["contract"]["checks"]} == {"passed", "not applicable"}
    assert "contract" not in kdcli("check", "--method", "kd", *ROOM, "--json").json


# --- trained ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_file_and_says_where_it_came_from(here):
    add_mentors(TEACHER, fit=True)
    said = kdcli("distill", "--method", "my_file.py:Mine", *ROOM, "--set", "method.weight=0.5")
    (run,) = (here / "runs").iterdir()
    assert run.name.endswith(f"-{STUDENT}-Mine")
    assert (run / "Mine.py").read_text(encoding="utf-8") == SOURCE
    facts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    digest = user_code.digest("my_file.py:Mine")
    assert facts["own_methods"] == {"Mine": {"file": str(here / "my_file.py"), "sha256": digest}}
    assert 'name = "Mine.py:Mine"' in (run / "recipe.toml").read_text(encoding="utf-8")
    assert "method Mine weight = 0.5" in said.out
    kept = runs.Run(run).recipe.method
    assert (kept.name, kept.options) == (f"{run / 'Mine.py'}:Mine", {"weight": 0.5})
    assert kdcli("runs", "ls", "--json").json[0]["method"] == "Mine"
    assert kdcli("evaluate", "--json").json["top1"] >= 0


def test_a_stopped_run_goes_on_wherever_the_file_went(here):
    add_mentors(TEACHER, fit=True)
    kdcli("distill", "--method", "my_file.py:Mine", *ROOM, "--epochs", "2", "--out", "whole")
    run = stopped("distill", "--method", "my_file.py:Mine", *ROOM, path="part")
    (here / "my_file.py").rename(here / "moved.py")
    kdcli("distill", "--resume", "part")
    ends = [(path / "student.safetensors").read_bytes() for path in (run.path, Path("whole"))]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("which", ["my_file.py", "part/Mine.py"])
def test_a_stopped_run_does_not_go_on_with_another_file(here, which):
    add_mentors(TEACHER, fit=True)
    stopped("distill", "--method", "my_file.py:Mine", *ROOM, path="part")
    (here / which).write_text(SOURCE.replace("4.0", "5.0"), encoding="utf-8")
    said = kdcli("distill", "--resume", "part", code=2)
    assert "has changed since part began" in said.err
    assert str(Path(which)) in said.err
    (here / which).write_text(SOURCE, encoding="utf-8")
    kdcli("distill", "--resume", "part")


def test_compare_runs_own_methods_beside_others(here):
    add_mentors(TEACHER, fit=True)
    (here / "r.toml").write_text(
        'extends = "defaults/digits"\n[baselines."my_file.py:Other"]\nweight = 0.25\n', encoding="utf-8"
    )
    args = ("compare", "--recipe", "r.toml", "--methods", "my_file.py:Mine,my_file.py:Other,kd", *ROOM, "--seeds", "1")
    found = kdcli(*args, "--out", "whole", "--json").json
    assert [line["method"] for line in found["lines"]] == ["nokd", "Mine", "Other", "kd"]
    assert sorted(path.name for path in Path("whole").iterdir() if path.is_dir()) == [
        "Mine-0",
        "Other-0",
        "kd-0",
        "nokd-0",
    ]
    options = runs.Run(Path("whole/Other-0")).recipe.method.options
    assert options == {"weight": 0.25}
    stopped(*args, path="part")
    (here / "my_file.py").unlink()
    kdcli("compare", "--resume", "part")
    assert (Path("part") / "Other-0" / "student.safetensors").is_file()


def test_two_methods_of_one_name_are_refused(here):
    add_mentors(TEACHER, fit=True)
    shutil.copy("my_file.py", "copy.py")
    said = kdcli("compare", "--methods", "my_file.py:Mine,copy.py:Mine", *ROOM, code=2)
    assert "would both have the name Mine" in said.err
    (here / "copy.py").write_text(SOURCE.replace("class Mine", "class KD").replace("(Mine)", "(KD)"), encoding="utf-8")
    assert "would both have the name kd" in kdcli("compare", "--methods", "kd,copy.py:KD", *ROOM, code=2).err
