"""The recipes under recipes/: each loads, means something, and prints the figures its paper prints.

The tables below are written out from ClassroomKD (arXiv 2409.20237); the recipes must agree with them.
"""

import tomllib
from typing import NamedTuple

import pytest

from kdcli import methods, recipe
from kdcli.data.views import AUGMENTS
from kdcli.system.paths import shipped

NAMES = recipe.names()
WITHOUT_NAMES = {n for n in NAMES if n.startswith("defaults/") or n.endswith(("base", "mentor", "low-data"))}

# trainable parameters with 100 classes (reference/papers.md section 6)
PARAMETERS = {
    "cifar_resnet8": 83_892,
    "cifar_resnet14": 181_108,
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet32x4": 7_433_860,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
    "cifar_resnet50": 23_705_252,
    "cifar_resnet18": 11_220_132,
    "timm:efficientnet_b0": 4_135_648,
    "timm:swin_tiny_patch4_window7_224": 27_596_254,
}


class Row(NamedTuple):
    """A CIFAR-100 row of Table 7 with the figures of Tables 1, 2a, 4a and 6; sizes in millions, as printed."""

    student: str
    teacher: str
    peers: str
    all_teacher: float  # (n+1)t
    mentors: float  # 1t + np
    size: float  # s
    top1: dict[str, float]
    files_give: dict[str, float] | None = None  # where the printed size is not what the model files add up to


EFFICIENT = " ".join(["timm:efficientnet_b0"] * 5)
SMALL = "resnet8 resnet14 shufflenetv2 mobilenetv2 shufflenetv1"
TABLE_7 = {
    "r110-r20": Row("resnet20", "resnet110", SMALL, 10.42, 5.12, 0.27,
                    {"nokd": 69.06, "kd": 70.67, "aver": 71.20, "classroom": 72.06}),
    "r110-r32": Row("resnet32", "resnet110", SMALL, 10.42, 5.12, 0.47,
                    {"nokd": 71.14, "kd": 73.08, "classroom": 74.71}),
    "r56-r20": Row("resnet20", "resnet56", SMALL, 5.17, 4.24, 0.27,
                   {"nokd": 69.06, "kd": 70.66, "aver": 71.08, "classroom": 72.13}),
    "vgg13-vgg8": Row("vgg8", "vgg13", "resnet20 mobilenetv2 shufflenetv2 resnet56 resnet110", 56.77, 14.50, 3.96,
                      {"nokd": 70.68, "kd": 72.98, "aver": 73.18, "classroom": 75.29}),
    "vgg13-mbv2": Row("mobilenetv2", "vgg13", "resnet8 resnet14 resnet20 shufflenetv1 shufflenetv2", 56.77, 12.31, 0.81,
                      {"nokd": 64.60, "kd": 67.37, "aver": 62.94, "classroom": 70.26}),
    "r32x4-snv2": Row("shufflenetv2", "resnet32x4", "resnet8 resnet14 resnet20 mobilenetv2 shufflenetv1",
                      44.62, 9.739, 1.35, {"nokd": 71.82, "kd": 74.45, "classroom": 76.74}, {"all_teacher": 44.60}),
    "wrn402-snv1": Row("shufflenetv1", "wrn_40_2", "resnet20 mobilenetv2 shufflenetv2 resnet56 vgg13",
                       13.53, 15.00, 0.95, {"nokd": 70.50, "kd": 74.83, "aver": 73.00, "classroom": 75.81},
                       {"mentors": 15.03}),
    "r50-mbv2": Row("mobilenetv2", "resnet50", "resnet8 resnet14 resnet20 shufflenetv1 shufflenetv2",
                    142.23, 26.55, 0.81, {"nokd": 64.60, "kd": 67.35, "classroom": 70.23}),
    "r32x4-snv1": Row("shufflenetv1", "resnet32x4", "resnet8 resnet14 resnet20 mobilenetv2 shufflenetv2",
                      44.62, 10.14, 0.95, {"nokd": 71.29, "classroom": 75.81}, {"all_teacher": 44.60}),
    "wrn402-wrn162": Row("wrn_16_2", "wrn_40_2", "resnet20 mobilenetv2 shufflenetv2 resnet56 vgg13",
                         13.53, 14.98, 0.70, {"nokd": 73.64, "aver": 74.98, "classroom": 76.74}, {"mentors": 15.03}),
    "enb0-mbv2": Row("mobilenetv2", "timm:efficientnet_b0", EFFICIENT, 24.81, 24.81, 0.81,
                     {"nokd": 63.51, "classroom": 67.53}),
    "swint-r18": Row("resnet18", "timm:swin_tiny_patch4_window7_224", "shufflenetv2 wrn_40_2 vgg13 resnet32x4",
                     137.98, 48.10, 11.22, {"nokd": 74.01, "kd": 78.74, "classroom": 80.32}),
}  # fmt: skip

TABLE_3 = {  # recipe -> method, filter, mentoring, number of peers, figure
    "table3a-1-student": ("nokd", None, None, 5, 63.31),
    "table3a-2-teacher": ("aver", None, None, 0, 63.35),
    "table3a-3-peers": ("aver", None, None, 5, 65.96),
    "table3a-4-adaptive": ("classroom", "rank", "adaptive", 5, 68.52),
    "table3b-1-neither": ("classroom", "none", "fixed", 5, 65.96),
    "table3b-2-mentoring": ("classroom", "none", "adaptive", 5, 67.25),
    "table3b-3-filter": ("classroom", "rank", "fixed", 5, 68.49),
    "table3b-4-both": ("classroom", "rank", "adaptive", 5, 68.52),
}
TABLE_4 = {
    "table4a-same": 67.53,
    "table4a-diverse": 68.52,
    "table4b-low": 67.77,
    "table4b-average": 67.53,
    "table4b-diverse": 68.29,
}
TABLE_5 = {"table5-mbv2": ("r50-mbv2", 70.23), "table5-r20": ("r56-r20", 72.13)}
TABLE_5_DTKD = {  # the row it extends, method, tau, figure
    "table5-mbv2-dtkd": ("r50-mbv2", "dtkd", 4.0, 69.10),
    "table5-mbv2-ours-dtkd4": ("r50-mbv2", "classroom", 4.0, 64.36),
    "table5-mbv2-ours-dtkd12": ("r50-mbv2", "classroom", 12.0, 68.03),
    "table5-r20-dtkd": ("r56-r20", "dtkd", 4.0, 72.05),
    "table5-r20-ours-dtkd4": ("r56-r20", "classroom", 4.0, 71.18),
    "table5-r20-ours-dtkd12": ("r56-r20", "classroom", 12.0, 70.02),
}
TABLE_6_B = {
    "r110-r20": 71.94,
    "r110-r32": 74.28,
    "r56-r20": 72.56,
    "vgg13-vgg8": 73.58,
    "vgg13-mbv2": 68.52,
    "r32x4-snv2": 75.71,
    "r32x4-snv1": 75.08,
    "r50-mbv2": 69.78,
}


def zoo(name: str) -> str:
    return name if ":" in name else f"cifar_{name}"


def bare(name: str) -> str:
    return name.partition("@")[0]


# --- every recipe


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_says_what_it_is_and_whence(name):
    read = recipe.load(name)
    own = tomllib.loads(recipe.find(name).read_text(encoding="utf-8"))
    assert own["title"] == read.title  # its own, not its base's
    assert len(own["title"]) > 10
    assert len(own["source"]) > 4
    assert len(read.hash()) == 64


@pytest.mark.parametrize("name", NAMES)
def test_its_method_takes_its_options(name):
    method = recipe.load(name).method
    built = methods.build(method.name, method.options, name)
    assert isinstance(built, methods.Method)
    inner = built.get_submodule("method") if method.options.get("tekap") else built  # TeKAP is around it
    assert set(method.options) - {"tekap"} <= set(type(inner).options())


@pytest.mark.parametrize("name", NAMES)
def test_the_methods_beside_it_take_their_options(name):
    read = recipe.load(name)
    for beside in {*read.baselines, *(read.expect.of("top1") if read.expect else ())}:
        method = read.with_method(beside).method  # a label's is the method that it names
        built = methods.build(method.name, method.options, name)
        inner = built.get_submodule("method") if method.options.get("tekap") else built  # TeKAP stands around it
        assert inner.__class__ is methods.find(method.name)
        assert method.name == read.baselines.get(beside, {}).get("name", beside)


@pytest.mark.parametrize("name", NAMES)
def test_its_words_are_known(name):
    read = recipe.load(name)
    assert read.data.augment in ("auto", *AUGMENTS)
    assert read.train.schedule in ("crd", "classroom", "cosine", "step")
    assert read.train.schedule != "step" or read.train.decay_epochs
    assert read.train.optimizer == ("adamw" if name == "quickstart" else "sgd")  # sgd as every paper's


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_whole_classroom_or_none_at_all(name):
    room = recipe.load(name).classroom
    if name in WITHOUT_NAMES:
        assert (room.student, room.teacher, room.peers) == (None, None, [])
    else:
        assert room.student is not None
        assert room.teacher
        assert room.student.endswith("@pretrained" if name.startswith("disk/imagenet") else "@none")  # from scratch
        assert bare(room.student) not in map(bare, [room.teacher, *room.peers])
        assert not any(mentor.endswith("@none") for mentor in room.peers)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_a_screen(name):
    lines = recipe.find(name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert any("#" in line for line in lines) or "extends" in lines[2]  # a comment says why, here or in the base


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_elsewhere_still_finds_its_base(name, tmp_path):
    copy = tmp_path / "copy.toml"
    copy.write_bytes(recipe.find(name).read_bytes())
    assert recipe.load(str(copy)) == recipe.load(name)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("ablations/", "imagenet/"))])
def test_published_figures_are_percent_with_a_source(name):
    expect = recipe.load(name).expect
    if name == "ablations/table3":  # the classroom alone; its rows have the figures
        assert expect is None
        return
    assert expect is not None
    assert "Table" in expect.source
    assert expect.epoch == "best"
    assert all(1 < figure < 100 for figure in expect.of("top1").values())


# --- ClassroomKD, CIFAR-100


def test_every_cifar_row_of_table_7_is_there():
    rows = {n.removeprefix("cifar100/") for n in NAMES if n.startswith("cifar100/")}
    assert rows == {*TABLE_7, "base", "mentor", "logits", "low-data", "low-data-mbv2", "low-data-r20"}


@pytest.mark.parametrize("name", TABLE_7)
def test_a_row_has_table_7s_classroom(name):
    row, read = TABLE_7[name], recipe.load(f"cifar100/{name}")
    assert read.classroom.student == f"{zoo(row.student)}@none"
    assert bare(read.classroom.teacher or "") == zoo(row.teacher)
    assert [bare(peer) for peer in read.classroom.peers] == [zoo(peer) for peer in row.peers.split()]


@pytest.mark.parametrize("name", TABLE_7)
def test_a_row_prints_the_papers_figures(name):
    expect = recipe.load(f"cifar100/{name}").expect
    assert expect is not None
    own = ("nokd", "kd", "aver", "classroom")  # the others: test_recipes_methods
    assert {method: figure for method, figure in expect.of("top1").items() if method in own} == TABLE_7[name].top1
    assert expect.of("top5") == {}
    assert expect.epoch == "best"
    assert expect.source.startswith("Table")


@pytest.mark.parametrize("name", [*(f"cifar100/{row}" for row in TABLE_7), "imagenet/r34-r18"])
def test_aver_beside_a_row_runs_at_the_published_figures_temperature(name):
    assert recipe.load(name).with_method("aver").method.options == {"tau": 1.0}
    assert recipe.load(name).with_method("kd").method.options == {}  # its defaults are the CIFAR recipe's


@pytest.mark.parametrize("name", TABLE_7)
def test_a_rows_sizes_add_up_to_table_7s(name):
    row, room = TABLE_7[name], recipe.load(f"cifar100/{name}").classroom
    count = {model: PARAMETERS[bare(model)] / 1e6 for model in (room.student or "", room.teacher or "", *room.peers)}
    sizes = {
        "all_teacher": (len(room.peers) + 1) * count[room.teacher or ""],
        "mentors": count[room.teacher or ""] + sum(count[peer] for peer in room.peers),
        "size": count[room.student or ""],
    }
    files_give = row.files_give or {}
    for column, size in sizes.items():
        assert size == pytest.approx(files_give.get(column, getattr(row, column)), abs=0.01), column  # some are cut
    for column, given in files_give.items():  # the exceptions of papers.md 2.3 are exceptions indeed
        assert abs(getattr(row, column) - sizes[column]) > 0.01
        assert given == pytest.approx(sizes[column], abs=0.005)


@pytest.mark.parametrize("name", TABLE_7)
def test_a_row_trains_as_the_authors_code(name):
    read = recipe.load(f"cifar100/{name}")
    assert (read.data.name, read.data.image_size, read.data.augment, read.data.per_class) == (
        ("cifar100", 32, "crop-flip", None)
    )
    assert (read.method.name, read.method.options) == ("classroom", {"variant": "official", "tau": 12.0})
    train = read.train
    assert (train.epochs, train.batch_size, train.lr, train.schedule) == (240, 64, 0.05, "classroom")
    assert (train.momentum, train.nesterov, train.weight_decay) == (0.9, False, 5e-4)
    assert train.decay_norm_and_bias
    assert train.drop_last


def test_peers_of_one_network_are_its_own_epochs_in_rising_order():
    room = recipe.load("cifar100/enb0-mbv2").classroom
    assert "#" not in (room.teacher or "")  # the teacher is the run's end
    run = (room.teacher or "").partition("@")[2]
    epochs = [int(peer.removeprefix(f"timm:efficientnet_b0@{run}#")) for peer in room.peers]
    assert epochs == sorted(set(epochs))
    assert "--keep " + ",".join(map(str, epochs)) in recipe.find("cifar100/enb0-mbv2").read_text(encoding="utf-8")


def test_mentors_train_alone_at_batch_128():
    read = recipe.load("cifar100/mentor")
    assert (read.method.name, read.method.options) == ("nokd", {})
    assert (read.train.batch_size, read.train.lr, read.train.schedule) == (128, 0.05, "crd")
    assert (read.train.epochs, read.train.weight_decay) == (240, 5e-4)


@pytest.mark.parametrize(
    ("name", "top1", "top5"),
    [
        ("low-data-mbv2", {"nokd": 3.75, "aver": 1.51, "classroom": 6.30}, {}),
        (
            "low-data-r20",
            {"nokd": 3.08, "aver": 3.565, "classroom": 4.93},
            {"nokd": 12.50, "aver": 15.24, "classroom": 17.81},
        ),
    ],
)
def test_low_data_has_seven_images_a_class_and_table_8s_figures(name, top1, top5):
    read = recipe.load(f"cifar100/{name}")
    assert (read.data.per_class, len(read.classroom.peers)) == (7, 5)
    assert read.expect is not None
    assert (read.expect.of("top1"), read.expect.of("top5")) == (top1, top5)
    assert "synthetic" in read.expect.source  # ours are photographs, and the reader is told beside the figure


# --- ClassroomKD, ImageNet


def test_the_imagenet_row():
    read = recipe.load("imagenet/r34-r18")
    assert (bare(read.classroom.student or ""), bare(read.classroom.teacher or "")) == (
        ("torchvision:resnet18", "torchvision:resnet34")
    )
    assert len(read.classroom.peers) == 4
    assert all(
        mentor.endswith(("@pretrained", "@IMAGENET1K_V1"))
        for mentor in [read.classroom.teacher or "", *read.classroom.peers]
    )
    train = read.train
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay, train.nesterov) == (100, 512, 0.1, 1e-4, True)
    assert (train.schedule, train.decay_epochs, train.decay_rate) == ("step", [30], 0.1)
    assert read.method.options == {"variant": "official", "tau": 4.0, "delta": 1.0}
    assert read.expect is not None
    own = {"nokd": 69.75, "kd": 70.66, "aver": 70.63, "classroom": 71.49}
    assert read.expect.of("top1") == own | {"dml": 71.03, "one": 70.55, "shake": 72.07, "crd": 71.17}


# --- ClassroomKD's ablations


def test_every_ablation_is_there():
    wanted = {"table3", *TABLE_3, *TABLE_4, *TABLE_5, *TABLE_5_DTKD, *(f"table6-{row}" for row in TABLE_6_B)}
    assert {n.removeprefix("ablations/") for n in NAMES if n.startswith("ablations/")} == wanted


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name):
    method, keep, mentoring, peers, figure = TABLE_3[name]
    read = recipe.load(f"ablations/{name}")
    assert (read.method.name, len(read.classroom.peers)) == (method, peers)
    assert read.expect is not None
    assert read.expect.of("top1")[method] == figure
    assert read.expect.of("top1")["nokd"] == 63.31  # the same control beside every row
    if method == "classroom":
        defaults = methods.options("classroom")
        assert read.method.options.get("filter", defaults["filter"].default) == keep
        assert read.method.options.get("mentoring", defaults["mentoring"].default) == mentoring
        assert read.method.options["variant"] == "official"


def test_the_ablations_classroom_is_that_of_vgg13_and_mobilenetv2():
    rows = [recipe.load(f"ablations/{name}").classroom for name in TABLE_3 if name != "table3a-2-teacher"]
    assert all(room == recipe.load("cifar100/vgg13-mbv2").classroom for room in rows)


@pytest.mark.parametrize("name", TABLE_4)
def test_table_4(name):
    read = recipe.load(f"ablations/{name}")
    assert read.expect is not None
    assert read.expect.of("top1")["classroom"] == TABLE_4[name]
    assert len({read.classroom.teacher, *read.classroom.peers}) == 6
    mentors = {bare(mentor) for mentor in [read.classroom.teacher or "", *read.classroom.peers]}
    assert len(mentors) == (6 if name == "table4a-diverse" else 1)


@pytest.mark.parametrize("name", TABLE_5)
def test_table_5(name):
    row, figure = TABLE_5[name]
    read, base = recipe.load(f"ablations/{name}"), recipe.load(f"cifar100/{row}")
    assert read.hash() == base.hash()  # "Ours" is the row itself
    assert read.expect is not None
    assert read.expect.of("top1")["classroom"] == figure


@pytest.mark.parametrize("name", TABLE_5_DTKD)
def test_table_5_with_dtkds_temperatures(name):
    row, method, tau, figure = TABLE_5_DTKD[name]
    read, base = recipe.load(f"ablations/{name}"), recipe.load(f"cifar100/{row}")
    assert (read.method.name, read.method.options["tau"]) == (method, tau)
    assert read.data == base.data
    assert read.expect is not None
    assert read.expect.of("top1")[method] == figure
    if method == "dtkd":  # its own recipe: one teacher, CRD's schedule
        assert read.classroom == base.classroom.model_copy(update={"peers": []})
        lr = 0.01 if row == "r50-mbv2" else 0.05
        assert (read.train.schedule, read.train.lr, read.train.drop_last) == ("crd", lr, False)
    else:
        assert (read.classroom, read.train) == (base.classroom, base.train)
        assert read.method.options == {**base.method.options, "mentoring": "dtkd", "tau": tau}


@pytest.mark.parametrize("row", TABLE_6_B)
def test_table_6_method_b(row):
    read, base = recipe.load(f"ablations/table6-{row}"), recipe.load(f"cifar100/{row}")
    assert (read.classroom, read.train, read.data) == (base.classroom, base.train, base.data)
    wanted = {"variant": "paper", "ranking": "position", "mark_mean": "arithmetic", "lambda_": 0.1, "tau": 12.0}
    assert read.method.options == wanted
    assert read.expect is not None
    assert base.expect is not None
    assert read.expect.of("top1") == {**base.expect.of("top1"), "classroom": TABLE_6_B[row]}


# --- quickstart and the defaults


def test_quickstart_is_small():
    read = recipe.load("quickstart")
    assert (read.data.name, read.data.image_size, read.method.name) == ("digits", 8, "classroom")
    assert read.classroom.student == "cifar_resnet8@none"
    assert read.data.per_class is not None  # or there would be nothing to gain
    assert "variant" not in read.method.options  # the paper's form


def test_every_kind_of_data_has_its_defaults():
    assert {n.removeprefix("defaults/") for n in NAMES if n.startswith("defaults/")} == (
        {"digits", "cifar", "imagenet", "folder", "npz"}
    )
    others = [p.name for p in shipped("recipes").rglob("*") if p.is_file() and p.suffix != ".toml"]
    assert others == ["RESULTS.md"]


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "schedule", "tau"),
    [
        ("digits", 30, 32, "cosine", 4.0),
        ("cifar", 240, 64, "classroom", 12.0),
        ("imagenet", 100, 512, "step", 4.0),
        ("folder", 100, 32, "cosine", 4.0),
        ("npz", 100, 64, "cosine", 4.0),
    ],
)
def test_defaults(name, epochs, batch_size, schedule, tau):
    read = recipe.load(f"defaults/{name}")
    assert read.data.name is None  # --data says which
    assert read.expect is None
    assert (read.train.epochs, read.train.batch_size, read.train.schedule) == (epochs, batch_size, schedule)
    assert (read.method.name, read.method.options["tau"]) == ("classroom", tau)
    assert "variant" not in read.method.options
    assert read.train.ema is None
    assert read.train.label_smoothing == 0


def test_a_folders_defaults_are_gentle():
    train = recipe.load("defaults/folder").train
    assert (train.lr, train.nesterov, train.warmup_epochs, train.weight_decay) == (0.02, True, 5, 1e-4)
