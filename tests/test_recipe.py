"""kdcli/recipe.py: what a recipe may say, how it extends another, how `--set` overrides it, and how it refuses."""

from pathlib import Path

import pytest

from kdcli import recipe
from kdcli.errors import RecipeError


@pytest.fixture
def write(tmp_path: Path):
    """Writes a recipe under the test's own folder and returns its path as text."""

    def _write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write


def refused(name: str, overrides: dict | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name, overrides)
    assert caught.value.exit_code == 2
    return caught.value


# --- reading


def test_an_empty_recipe_is_all_defaults(write):
    read = recipe.load(write("a.toml", ""))
    assert (read.method.name, read.train.epochs, read.train.batch_size, read.data.name) == ("classroom", 240, 64, None)
    assert read == recipe.Recipe()


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("[train]\nepoch = 3", "train.epoch", "epochs"),
        ("[data]\nimagesize = 32", "data.imagesize", "image_size"),
        ('[classroom]\nteachers = ["a"]', "classroom.teachers", "teacher"),
        ("[trian]\nepochs = 3", "trian", "train"),
        ('titel = "x"', "titel", "title"),
        ('[expect]\nepoc = "last"', "expect.epoc", "epoch"),
    ],
)
def test_an_unknown_key_is_named_with_file_and_nearest(write, text, key, near):
    path = write("mine.toml", text)
    error = refused(path)
    assert str(Path(path).resolve()) in error.message
    assert f"{key}: no such key" in error.message
    assert near in error.hint


def test_an_unknown_key_without_neighbours_lists_what_is_allowed(write):
    error = refused(write("a.toml", "[classroom]\nzzzzzz = 1"))
    assert all(key in error.hint for key in recipe.ClassroomConfig.model_fields)


def test_an_unknown_key_of_a_base_names_the_base(write):
    write("base.toml", "[train]\nlearning = 1")
    error = refused(write("top.toml", 'extends = "base"'))
    assert "base.toml: train.learning" in error.message


def test_an_unknown_override_names_its_key():
    error = refused("quickstart", {"train.epoch": 3})
    assert "train.epoch: no such key" in error.message
    assert "epochs" in error.hint


@pytest.mark.parametrize(
    ("text", "key", "given"),
    [
        ("[train]\nepochs = 0", "train.epochs", "0"),
        ('[train]\nlr = "fast"', "train.lr", "fast"),
        ("[train]\nlr = -0.1", "train.lr", "-0.1"),
        ("[train]\nlr = nan", "train.lr", "nan"),
        ("[train]\nlr = inf", "train.lr", "inf"),
        ("[train]\nema = 1.0", "train.ema", "1.0"),
        ('[train]\nprecision = "fp8"', "train.precision", "fp8"),
        ("[data]\nholdout = 1.0", "data.holdout", "1.0"),
        ("[data]\nper_class = 0", "data.per_class", "0"),
        ("[data]\nimage_size = 4", "data.image_size", "4"),
        ('[classroom]\npeers = "a,b"', "classroom.peers", "a,b"),
        ('[classroom]\nclass_map = "maybe"', "classroom.class_map", "maybe"),
        ('task = "pose"', "task", "pose"),
        ("train = 3", "train", "3"),
        ("[method]\nname = 3", "method.name", "3"),
        ('[expect]\nepoch = "first"', "expect.epoch", "first"),
        ('[expect]\ntop1 = { kd = "high" }', "expect.top1.kd", "high"),
    ],
)
def test_a_bad_value_names_its_key_and_itself(write, text, key, given):
    message = refused(write("a.toml", text)).message
    assert f": {key}: " in message
    assert given in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nbatch_size = 10\naccumulate = 3", ("accumulate = 3", "batch_size = 10")),
        ("[train]\nbatch_size = 9\nmixup = 0.2", ("mixup", "batch_size = 9")),
    ],
)
def test_values_that_do_not_go_together_are_both_named(write, text, named):
    message = refused(write("a.toml", text)).message
    assert all(part in message for part in named)
    assert "{" not in message  # not the whole table


@pytest.mark.parametrize("text", ["[train\n", "epochs = = 3", 'title = "a\nb = 1'])
def test_what_is_not_toml_names_file_and_line(write, text):
    error = refused(write("broken.toml", text))
    assert "broken.toml is not TOML" in error.message
    assert "line" in error.message


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('title = "Schüler"'.encode("latin-1"))
    assert "latin.toml is not TOML" in refused(str(path)).message


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "notepad.toml"
    path.write_bytes('title = "Schüler"'.encode("utf-8-sig"))
    assert recipe.load(str(path)).title == "Schüler"


def test_an_unknown_recipe_names_the_nearest():
    error = refused("quikstart")
    assert "'quikstart'" in error.message
    assert "quickstart" in error.hint
    assert "recipes ls" in error.hint


def test_the_results_among_the_recipes_are_not_a_recipe():
    assert "RESULTS" not in recipe.names()
    for name in ("RESULTS", "RESULTS.md"):
        assert f"no recipe called '{name}'" in refused(name).message


# --- extends


def test_a_chain_of_extends_merges_key_by_key(write):
    write("a.toml", 'title = "a"\n[train]\nepochs = 1\nlr = 0.1\n[classroom]\nstudent = "s"\npeers = ["p", "q"]')
    write("b.toml", 'extends = "a"\n[train]\nepochs = 2\n[classroom]\npeers = ["r"]')
    read = recipe.load(write("c.toml", 'extends = "b.toml"\ntitle = "c"\n[train]\nseed = 7'))
    assert (read.title, read.train.epochs, read.train.lr, read.train.seed) == ("c", 2, 0.1, 7)
    assert (read.classroom.student, read.classroom.peers) == ("s", ["r"])  # a list is replaced, not appended to


def test_a_base_is_looked_for_beside_the_recipe_that_names_it(write, monkeypatch, tmp_path):
    write("lab/base.toml", "[train]\nepochs = 5")
    write("lab/deep/mid.toml", 'extends = "../base"')
    top = write("lab/top.toml", 'extends = "deep/mid"')
    monkeypatch.chdir(tmp_path)  # nothing called base.toml here
    assert recipe.load(top).train.epochs == 5


def test_a_built_in_recipe_can_be_extended_from_anywhere(write):
    read = recipe.load(write("mine.toml", 'extends = "cifar100/r110-r20"\n[train]\nepochs = 3'))
    assert (read.train.epochs, read.classroom.teacher) == (3, "cifar_resnet110")


def test_a_users_file_may_extend_the_built_in_one_of_its_own_name(write):
    read = recipe.load(write("quickstart.toml", 'extends = "quickstart"\n[train]\nepochs = 3'))
    assert (read.train.epochs, read.data.name) == (3, "digits")


def test_a_circle_is_shown_whole(write):
    write("one.toml", 'extends = "two"')
    write("two.toml", 'extends = "three"')
    error = refused(write("three.toml", 'extends = "one"'))
    assert error.message.count(" -> ") == 3
    assert [error.message.count(f"{name}.toml") for name in ("one", "two", "three")] == [1, 1, 2]


def test_a_recipe_that_extends_itself_is_a_circle(write):
    assert "circle" in refused(write("self.toml", 'extends = "self"')).message


def test_a_base_that_is_missing_or_no_name_is_refused(write):
    assert "'nowhere'" in refused(write("a.toml", 'extends = "nowhere"')).message
    assert "extends: one recipe's name" in refused(write("b.toml", 'extends = ["a", "c"]')).message


def test_class_map_is_replaced_whole(write):
    write("a.toml", '[classroom.class_map]\ncat = "tabby"\ndog = 5')
    read = recipe.load(write("b.toml", 'extends = "a"\n[classroom.class_map]\ncow = "ox"'))
    assert read.classroom.class_map == {"cow": "ox"}


# --- the method


def test_the_same_method_keeps_its_options_and_another_replaces_them(write):
    write("a.toml", '[method]\nname = "classroom"\ntau = 12.0\nvariant = "official"')
    same = recipe.load(write("b.toml", 'extends = "a"\n[method]\nname = "classroom"\nbeta = 2.0'))
    assert same.method.options == {"tau": 12.0, "variant": "official", "beta": 2.0}
    other = recipe.load(write("c.toml", 'extends = "a"\n[method]\nname = "aver"\nform = "mean"'))
    assert (other.method.name, other.method.options) == ("aver", {"form": "mean"})


def test_a_method_table_without_a_name_is_the_default_methods(write):
    write("a.toml", "[method]\ntau = 12.0")
    assert recipe.load(write("b.toml", 'extends = "a"\n[method]\nname = "classroom"')).method.options == {"tau": 12.0}
    assert recipe.load(write("c.toml", 'extends = "a"\n[method]\nname = "kd"')).method.options == {}


def test_overriding_the_method_drops_the_old_ones_options():
    read = recipe.load("cifar100/base", {"method.name": "kd", "method.tau": 2.0})
    assert (read.method.name, read.method.options) == ("kd", {"tau": 2.0})
    assert read.with_(**{"method.name": "nokd"}).method.options == {}
    assert read.with_(**{"method.alpha": 0.5}).method.options == {"tau": 2.0, "alpha": 0.5}


def test_another_method_takes_the_options_its_baseline_gives(write):
    text = "[method]\ntau = 12.0\n[baselines]\naver = { tau = 1.0 }\nkd = { tau = 2.0, alpha = 0.5 }"
    write("a.toml", text)
    read = recipe.load(write("b.toml", 'extends = "a"\n[baselines]\nkd = { tau = 3.0 }'))
    assert read.with_method("aver").method.options == {"tau": 1.0}
    assert read.with_method("kd").method.options == {"tau": 3.0, "alpha": 0.5}
    assert read.with_method("nokd").method.options == {}
    assert read.with_method("classroom") == read
    assert read.with_method("nokd").train == read.train


def test_a_label_runs_the_method_it_names_with_the_figure_published_for_that_form(write):
    text = """
    [method]
    name = "aver"
    tau = 2.0
    form = "mean"
    [baselines]
    aver-sum = { name = "aver", form = "sum" }
    kd-hot = { name = "kd", tau = 9.0 }
    kd-bare = { name = "kd" }
    [expect]
    top1 = { aver = 60.0, aver-sum = 61.0, kd = 62.0, kd-hot = 63.0 }
    top5 = { kd = 90.0, kd-hot = 91.0 }
    """
    read = recipe.load(write("a.toml", text))
    own, hot, bare = (read.with_method(name) for name in ("aver-sum", "kd-hot", "kd-bare"))
    assert (own.method.name, own.method.options) == (
        "aver",
        {"tau": 2.0, "form": "sum"},
    )  # its own method keeps the rest
    assert (hot.method.name, hot.method.options) == ("kd", {"tau": 9.0})
    assert own.hash() == recipe.load(str(write("a.toml", text)), {"method.form": "sum"}).hash()
    assert own.expect is not None
    assert hot.expect is not None
    assert bare.expect is not None
    assert own.expect.of("top1") == {"aver": 61.0, "kd": 62.0, "kd-hot": 63.0}
    assert hot.expect.of("top1") == {"aver": 60.0, "aver-sum": 61.0, "kd": 63.0}
    assert (hot.expect.of("top5"), bare.expect.of("top5")) == ({"kd": 91.0}, {"kd-hot": 91.0})
    assert "kd" not in bare.expect.of("top1")  # 62.0 was measured of plain kd, not of this form
    assert read.expect is not None
    assert read.expect.of("top1")["kd"] == 62.0  # the recipe itself is unchanged


def test_a_label_of_an_own_method_finds_its_file_beside_the_recipe_and_beside_the_run(write):
    mine = write("mine.py", "")
    read = recipe.load(write("a.toml", '[baselines]\nhot = { name = "mine.py:Mine", tau = 2.0 }'))
    assert read.baselines == {"hot": {"name": f"{Path(mine).resolve()}:Mine", "tau": 2.0}}
    assert read.own_methods() == {"Mine": f"{Path(mine).resolve()}:Mine"}
    assert read.to_keep().baselines == {"hot": {"name": "Mine.py:Mine", "tau": 2.0}}
    assert read.with_method("hot").method.options == {"tau": 2.0}


# --- --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("4.5", 4.5),
        ("5e-4", 5e-4),
        ("true", True),
        ("crd", "crd"),
        ('"4"', "4"),
        ("'a b'", "a b"),
        ("[1, 2]", [1, 2]),
        ('["a", "b"]', ["a", "b"]),
        ("npz:my file.npz", "npz:my file.npz"),
        ("C:\\data", "C:\\data"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_set_value_is_toml_else_text(text, value):
    parsed = recipe.parse_set([f" method.x ={text}"])
    assert parsed == {"method.x": value}
    assert type(parsed["method.x"]) is type(value)


@pytest.mark.parametrize("pair", ["method.tau", "=4", " = 4", ""])
def test_a_set_that_is_no_pair_is_refused_with_an_example(pair):
    with pytest.raises(RecipeError) as caught:
        recipe.parse_set([pair])
    assert "not key=value" in caught.value.message
    assert "method.tau=4" in caught.value.hint


def test_set_values_reach_the_recipe_in_its_types():
    given = recipe.parse_set(["train.lr=1", "train.epochs=3", "train.schedule=crd", "train.warmup_lr=.5", "title=hi"])
    read = recipe.load("quickstart", given)
    assert (read.train.lr, read.train.epochs, read.train.schedule, read.train.warmup_lr, read.title) == (
        (1.0, 3, "crd", 0.5, "hi")
    )
    assert type(read.train.lr) is float


@pytest.mark.parametrize("pairs", [["train=3", "train.lr=1"], ["train.lr=1", "train.lr.x=2"]])
def test_a_set_key_inside_anothers_value_is_refused(pairs):
    assert "value of its own" in refused("quickstart", recipe.parse_set(pairs)).message


# --- the hash, and writing it out again


def test_the_hash_ignores_the_words_and_the_published_figures(write):
    plain = recipe.load("cifar100/r110-r20")
    words = recipe.load(
        "cifar100/r110-r20", {"title": "x", "source": "y", "expect.top1.kd": 1.0, "expect.epoch": "last"}
    )
    assert words != plain
    assert words.hash() == plain.hash()
    assert recipe.from_dict({**plain.model_dump(exclude_none=True, exclude={"expect"})}, "x").hash() == plain.hash()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.seed", 1),
        ("data.per_class", 7),
        ("classroom.student", "cifar_resnet8@none"),
        ("classroom.peers", []),
        ("method.name", "aver"),
        ("method.tau", 11.0),
        ("train.seed", 1),
        ("train.lr", 0.01),
        ("train.precision", "bf16"),
    ],
)
def test_the_hash_sees_everything_that_decides_the_result(key, value):
    assert recipe.load("cifar100/r110-r20", {key: value}).hash() != recipe.load("cifar100/r110-r20").hash()


def test_the_hash_is_of_values_not_of_spelling():
    spelt = recipe.load("quickstart", recipe.parse_set(["method.tau=4", "train.epochs=60", "train.lr=3e-3"]))
    assert spelt.hash() == recipe.load("quickstart").hash()


@pytest.mark.parametrize("name", ["quickstart", "cifar100/swint-r18", "ablations/table6-r56-r20", "imagenet/r34-r18"])
def test_what_is_written_out_reads_back_the_same(write, name):
    read = recipe.load(name)
    back = recipe.load(write("back.toml", read.toml()))
    assert back == read
    assert back.hash() == read.hash()
    assert "epochs" in read.toml()
    assert "accumulate" in read.toml()  # defaults too
