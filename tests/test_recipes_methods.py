"""The recipes of crd/, tekap/ and disk/ against the tables they come from, which are written out below.

The tables were copied from the papers' texts and public readmes, not from the recipes; a figure that was mistyped in a
recipe, or stands in the wrong row, is found here. Every other check of a recipe is in test_recipes_shipped.
"""

import re

import pytest

from kdcli import methods, recipe
from kdcli.models import registry

SHORT = {  # a network as its table writes it -> as the recipes' file names do
    "resnet8x4": "r8x4", "resnet20": "r20", "resnet32": "r32", "resnet32x4": "r32x4", "resnet56": "r56",
    "resnet110": "r110", "resnet50": "r50", "wrn_16_2": "wrn162", "wrn_40_1": "wrn401", "wrn_40_2": "wrn402",
    "vgg8": "vgg8", "vgg13": "vgg13", "mobilenetv2": "mbv2", "shufflenetv1": "snv1", "shufflenetv2": "snv2",
    "resnet10_xxs": "r10xxs", "resnet10_s": "r10s", "resnet10_m": "r10m", "resnet10_l": "r10l", "resnet10": "r10",
    "resnet18": "r18", "resnet34": "r34", "mobilenetv2_x2": "mbv2x2",
}  # fmt: skip
ALONE = {  # CRD's table: students trained alone
    "resnet20": 69.06, "resnet32": 71.14, "resnet8x4": 72.50, "wrn_16_2": 73.26, "wrn_40_1": 71.98, "vgg8": 70.36,
    "mobilenetv2": 64.60, "shufflenetv1": 70.50, "shufflenetv2": 71.82,
}  # fmt: skip
CRD = """
teacher -> student: kd fitnets at sp vid rkd pkt ab ft crd dkd dist classroom
wrn_40_2 -> wrn_16_2: 74.92 73.58 74.08 73.83 74.11 73.35 74.54 72.50 73.25 75.48 76.23 - 76.74
wrn_40_2 -> wrn_40_1: 73.54 72.24 72.77 72.43 73.30 72.22 73.45 72.38 71.59 74.14 74.81 74.43 -
resnet56 -> resnet20: 70.66 69.21 70.55 69.67 70.38 69.61 70.34 69.47 69.84 71.16 71.97 71.75 72.13
resnet110 -> resnet20: 70.67 68.99 70.22 70.04 70.16 69.25 70.25 69.53 70.22 71.46 - - 72.06
resnet110 -> resnet32: 73.08 71.06 72.31 72.69 72.61 71.82 72.61 70.98 72.37 73.48 74.11 - 74.71
resnet32x4 -> resnet8x4: 73.33 73.50 73.44 72.94 73.09 71.90 73.64 73.17 72.86 75.51 76.32 76.31 -
vgg13 -> vgg8: 72.98 71.02 71.43 72.68 71.23 71.48 72.88 70.94 70.58 73.94 74.68 - 75.29
vgg13 -> MobileNetV2: 67.37 64.14 59.40 66.30 65.56 64.52 67.13 66.06 61.78 69.73 69.71 - 70.26
ResNet50 -> MobileNetV2: 67.35 63.16 58.58 68.08 67.57 64.43 66.52 67.20 60.99 69.11 70.35 68.66 70.23
resnet32x4 -> ShuffleNetV1: 74.07 73.59 71.73 73.48 73.38 72.28 74.10 73.55 71.75 75.11 76.45 76.34 -
resnet32x4 -> ShuffleNetV2: 74.45 73.54 72.73 74.56 73.40 73.21 74.69 74.31 72.50 75.65 77.07 77.35 76.74
wrn_40_2 -> ShuffleNetV1: 74.83 73.73 73.32 74.52 73.61 72.21 73.89 73.34 72.03 76.05 76.70 - 75.81
"""
NST = """
wrn-40-2 wrn-16-2 73.68, wrn-40-2 wrn-40-1 72.24, resnet56 resnet20 69.60, resnet110 resnet20 69.53,
resnet110 resnet32 71.96, resnet32x4 resnet8x4 73.30, vgg13 vgg8 71.53, vgg13 MobileNetV2 58.16,
ResNet50 MobileNetV2 64.96, ResNet50 vgg8 71.28, resnet32x4 ShuffleNetV1 74.12, resnet32x4 ShuffleNetV2 74.68,
wrn-40-2 ShuffleNetV1 74.89
"""
R50_VGG8 = {  # RepDistiller's table 2; papers.md has twelve of its thirteen pairs
    "nokd": 70.36, "kd": 73.81, "fitnets": 70.69, "at": 71.84, "sp": 73.34, "vid": 70.30, "rkd": 71.50, "pkt": 73.01,
    "ab": 70.65, "ft": 70.29, "nst": 71.28, "crd": 74.30,
}  # fmt: skip
TABLE_1 = """
Teacher R110 R110 R56 VGG13 VGG13 R32x4 W-40x2 R50
Student R20 R32 R20 VGG8 MBV2 SN-V2 SN-V1 MBV2
SimKD - - - 74.93 - 77.49 - -
SMKD 71.70 74.05 71.59 74.39 - - - -
SRRL 71.51 73.80 - 73.23 69.34 75.66 76.61 -
WSLD 72.19 74.12 72.15 - - 75.93 76.21 -
CTKD 70.99 73.52 71.19 73.52 68.46 75.31 75.78 68.47
DTKD - 74.07 72.05 74.12 69.01 76.19 76.29 69.10
"""  # ClassroomKD's, the columns and rows that CRD's table has not
TABLE_2A = """
Teacher WR40x2 R110 R56 VGG13 VGG13 W-40x2
Student WR16x2 R20 R20 VGG8 MBV2 SN-V1
DML 74.83 70.55 70.24 72.86 66.30 74.52
ONE 74.68 70.77 70.43 72.01 66.26 -
SHAKE 75.78 - 71.62 73.85 68.81 76.42
TAKD 75.04 - 70.77 73.67 - -
AEKD 75.68 71.36 71.25 74.75 68.39 76.34
EBKD - - - 74.10 68.24 76.61
DGKD 76.24 - 71.92 74.40 - -
CAMKD - - - 74.30 69.41 77.94
"""  # ClassroomKD's, the methods of several mentors and of students that learn together
TEKAP = """
Teacher | resnet32x4 | WRN_40_2 | WRN_40_2 | VGG13 | resnet56 | resnet32x4 | resnet32x4 | WRN-40-2
Student | resnet8x4 | WRN_40_1 | WRN_16_2 | VGG8 | resnet20 | ShuffleNetV1 | ShuffleNetV2 | ShuffleNetV1
Teacher | 79.42 | 75.61 | 75.61 | 74.64 | 72.34 | 79.42 | 74.64 | 75.61
Student | 72.50 | 71.98 | 73.26 | 70.36 | 69.06 | 70.50 | 70.36 | 70.50
KD | 73.33 | 73.69 | 74.92 | 72.98 | 70.66 | 74.07 | 72.98 | 74.83
+ TeKAP (L) | 74.79 | 73.80 | 75.21 | 74.00 | 71.32 | 74.92 | 75.43 | 76.75
CRD | 75.51 | 74.14 | 75.48 | 73.94 | 71.16 | 75.11 | 75.65 | 76.05
+ TeKAP (F) | 75.65 | 74.21 | 75.83 | 74.10 | 71.71 | 75.55 | 76.23 | 76.60
TeKAP (F+L) | 75.98 | 74.41 | 76.20 | 74.42 | 71.92 | 75.60 | 77.38 | 76.59
"""
DISK_3 = """
ResNet10-l | ResNet10-xxs | 71.99 | 32.05 | 32.64 | 37.56 | 4.92 | 52.14 | 17.44 | 17.59 | 18.62 | 1.03
- | ResNet10-s | - | 52.16 | 54.92 | 58.14 | 3.22 | - | 34.65 | 35.77 | 37.43 | 1.66
- | ResNet10-m | - | 65.24 | 66.96 | 70.03 | 3.07 | - | 44.74 | 46.01 | 48.03 | 2.02
ResNet10 | ResNet10-xxs | 75.25 | 32.05 | 34.25 | 37.84 | 3.59 | 56.04 | 17.44 | 17.96 | 18.55 | 0.59
- | ResNet10-s | - | 52.16 | 54.95 | 58.36 | 3.41 | - | 34.65 | 36.11 | 37.37 | 1.26
- | ResNet10-m | - | 65.24 | 67.27 | 70.15 | 2.88 | - | 44.74 | 46.08 | 48.19 | 2.11
ResNet18 | ResNet10-xxs | 76.56 | 32.05 | 34.16 | 37.8 | 3.64 | 62.48 | 17.44 | 17.47 | 18.53 | 1.06
- | ResNet10-s | - | 52.16 | 55.76 | 58.11 | 2.35 | - | 34.65 | 35.59 | 37.5 | 1.91
- | ResNet10-m | - | 65.24 | 68.09 | 69.86 | 1.77 | - | 44.74 | 45.91 | 47.7 | 1.79
ResNet34 | ResNet10-xxs | 80.46 | 32.05 | 33.93 | 37.78 | 3.85 | 63.06 | 17.44 | 17.67 | 18.91 | 1.24
- | ResNet10-s | - | 52.16 | 54.19 | 58.02 | 3.83 | - | 34.65 | 35.43 | 37.68 | 2.25
- | ResNet10-m | - | 65.24 | 66.78 | 69.89 | 3.11 | - | 44.74 | 45.89 | 47.6 | 1.71
"""
DISK_4 = """
ResNet32x4 | ResNet8x4 | 81.45 | 73.89 | 76.25 | 76.92 | 0.67 | 74.32 | 76.23 | 78.08
- | ShuffleNetV2 | - | 73.74 | 79.13 | 80.23 | 1.1 | 75.82 | 77.62 | 78.39
- | Wide-ResNet-16-2 | - | 74.26 | 76.28 | 77.67 | 1.39 | 74.70 | 75.65 | 77.17
- | MobileNetV2x2 | - | 69.24 | 76.05 | 77.24 | 1.19 | 73.09 | 73.98 | 75.43
Wide-ResNet-40-2 | ResNet8x4 | 78.41 | 73.89 | 75.15 | 76.05 | 0.9 | 75.02 | 75.85 | 76.75
- | ShuffleNetV2 | - | 73.74 | 75.81 | 78.33 | 2.52 | - | - | -
- | Wide-ResNet-40-1 | - | 72.81 | 74.44 | 75.92 | 1.48 | 74.17 | 74.4 | 75.56
- | MobileNetV2x2 | - | 69.24 | 73.92 | 76.32 | 2.40 | - | - | -
"""
DISK_8 = """
Wide-ResNet-40-2 | ResNet8x4 | 78.41 | 73.89 | 75.15 | 76.05 | 0.9 | 75.02 | 75.85 | 76.75 | 77.13 | 0.38
- | Wide-ResNet-40-1 | - | 72.81 | 74.44 | 75.92 | 1.48 | 74.17 | 74.4 | 75.56 | 76.21 | 0.65
"""


def token(text: str) -> str:
    """A network's name as file names have it, however a table writes it."""
    plain = text.strip().lower().replace("-", "_")
    plain = re.sub(r"^(wide_resnet|w|wr)_?(\d+)[x_](\d)$", r"wrn_\2_\3", plain).replace("sn_v", "shufflenetv")
    plain = plain.replace("mbv2", "mobilenetv2").replace("mobilenetv2x2", "mobilenetv2_x2")
    plain = f"resnet{plain[1:]}" if plain[0] == "r" and plain[1].isdigit() else plain
    return SHORT[plain]


def number(text: str) -> float | None:
    return None if text.strip() in ("-", "") else float(text)


def figures(cells: dict[str, str]) -> dict[str, float]:
    return {name: figure for name, text in cells.items() if (figure := number(text)) is not None}


def crd_rows() -> dict[str, dict[str, float]]:
    """Pair -> method -> figure, of all tables that crd/ prints."""
    head, *lines = [line.split(": ") for line in CRD.strip().splitlines()]
    rows: dict[str, dict[str, float]] = {"r50-vgg8": dict(R50_VGG8)}
    for pair, cells in lines:
        teacher, student = pair.split(" -> ")
        row = figures(dict(zip(head[1].split(), cells.split(), strict=True)))
        rows[f"{token(teacher)}-{token(student)}"] = {"nokd": ALONE[student.strip().lower()], **row}
    for one in NST.replace("\n", " ").split(","):
        teacher, student, figure = one.split()
        rows[f"{token(teacher)}-{token(student)}"]["nst"] = float(figure)
    for pair, row in [*by_column(TABLE_1).items(), *by_column(TABLE_2A).items()]:
        of_one_teacher = {name: figure for name, figure in row.items() if name == "shake" or name in TABLE_1.lower()}
        rows.setdefault(pair, {}).update(of_one_teacher)
    return rows


def by_column(table: str) -> dict[str, dict[str, float]]:
    """Pair -> method -> figure, of a table with a column for every pair."""
    rows: dict[str, dict[str, float]] = {}
    teachers, students, *more = [line.split() for line in table.strip().splitlines()]
    for name, *cells in more:
        for teacher, student, text in zip(teachers[1:], students[1:], cells, strict=True):
            row = rows.setdefault(f"{token(teacher)}-{token(student)}", {})
            row.update(figures({name.lower(): text}))
    return rows


def disk_rows() -> dict[str, dict[str, float]]:
    """Recipe -> method -> figure, of DiSK's Tables 3, 4 and 8; Table 3 has two data sets side by side."""
    rows: dict[str, dict[str, float]] = {}
    teacher = ""
    for line in DISK_3.strip().splitlines():
        first, student, _, ce, kd, disk, _, _, *tiny, _ = line.split(" | ")
        teacher = teacher if first == "-" else first
        pair = f"{token(teacher)}-{token(student)}"
        rows[pair] = figures({"nokd": ce, "kd": kd, "disk": disk})
        rows[f"tiny-{pair}"] = figures(dict(zip(["nokd", "kd", "disk"], tiny, strict=True)))
    for line in [*DISK_4.strip().splitlines(), *DISK_8.strip().splitlines()]:
        first, student, _, ce, kd, disk, _, *others = line.split(" | ")
        teacher = teacher if first == "-" else first
        found = {"nokd": ce, "kd": kd, "disk": disk}
        found |= dict(zip(["fitnets", "semckd", "simkd", "simkd-disk"], others, strict=False))
        rows.setdefault(f"{token(teacher)}-{token(student)}", {}).update(figures(found))
    return rows


CRD_ROWS, DISK_ROWS = crd_rows(), disk_rows()
EVERY = [n for n in recipe.names() if n.startswith(("crd/", "tekap/", "disk/"))]
PAIRS = [n for n in EVERY if recipe.load(n).classroom.teacher]


def expected(name: str) -> recipe.Expect:
    expect = recipe.load(name).expect
    assert expect is not None
    return expect


# --- all of them


@pytest.mark.parametrize("name", EVERY)
def test_figures_are_those_of_methods_or_of_labels_that_say_which(name):
    read = recipe.load(name)
    for label in [*read.baselines, *(read.expect.of("top1") if read.expect else ())]:
        assert read.with_method(label).method.name in methods.METHODS, label


@pytest.mark.parametrize("name", PAIRS)
def test_its_file_is_called_after_its_networks(name):
    room, parts = recipe.load(name).classroom, name.partition("/")[2].split("-")
    assert registry.resolve(room.student or "").weights in ("none", "pretrained")
    if "imagenet" in parts:
        return
    teacher, student = ((model or "").partition("@")[0] for model in (room.teacher, room.student))
    assert [SHORT[one.removeprefix("cifar_")] for one in (teacher, student)] == parts[-2:]
    assert room.peers == []


@pytest.mark.parametrize("name", PAIRS)
def test_its_networks_can_be_made(name):
    room = recipe.load(name).classroom
    for model in (room.student, room.teacher):
        found = registry.resolve(model or "")
        assert found.source == ("timm" if "imagenet" in name and "tekap" not in name else found.source)


# --- CRD's benchmark


def test_every_pair_of_crds_benchmark_is_there():
    assert {n for n in EVERY if n.startswith("crd/")} == {f"crd/{row}" for row in [*CRD_ROWS, "base", "mentor"]}
    assert len(CRD_ROWS) == 13


@pytest.mark.parametrize("pair", CRD_ROWS)
def test_a_crd_pair_prints_the_published_figures(pair):
    expect = expected(f"crd/{pair}")
    assert expect.of("top1") == CRD_ROWS[pair]
    assert expect.epoch == "last"
    assert "RepDistiller" in expect.source
    assert ("ClassroomKD" in expect.source) is ("classroom" in expect.of("top1"))


@pytest.mark.parametrize("name", [n for n in EVERY if n.startswith(("crd/", "tekap/")) and "imagenet" not in n])
def test_the_crd_benchmarks_training(name):
    read = recipe.load(name)
    train = read.train
    assert (read.data.name, read.data.image_size, read.data.augment) == ("cifar100", 32, "crop-flip")
    assert (train.epochs, train.batch_size, train.schedule, train.drop_last) == (240, 64, "crd", False)
    assert (train.momentum, train.nesterov, train.weight_decay) == (0.9, False, 5e-4)
    slow = ("cifar_mobilenetv2", "cifar_shufflenetv1", "cifar_shufflenetv2")
    usual = 0.01 if (read.classroom.student or "").startswith(slow) else 0.05
    assert train.lr == (0.025 if read.method.name == "mlkd" else usual)


@pytest.mark.parametrize(
    ("pairs", "beta"),
    [
        ("r56-r20 r110-r20 r110-r32", 2.0),
        ("wrn402-wrn162 wrn402-wrn401 vgg13-vgg8 vgg13-mbv2", 6.0),
        ("r32x4-r8x4 r32x4-snv1 r32x4-snv2 r50-mbv2 r50-vgg8 wrn402-snv1", 8.0),
    ],
)
def test_dkd_has_its_papers_weight_for_every_pair(pairs, beta):
    for pair in pairs.split():
        assert recipe.load(f"crd/{pair}").with_method("dkd").method.options["beta"] == beta


def test_dtkd_weighs_less_for_the_one_pair():
    weighed = {pair for pair in CRD_ROWS if "dtkd" in recipe.load(f"crd/{pair}").baselines}
    assert weighed == {"r110-r32"}
    assert recipe.load("crd/r110-r32").baselines["dtkd"] == {"alpha": 1.0, "beta": 0.5}


# --- ClassroomKD's tables of others


@pytest.mark.parametrize("row", by_column(TABLE_2A))
def test_a_classrooms_row_prints_the_methods_of_table_2a(row):
    own = ("nokd", "kd", "aver", "classroom")  # test_recipes_shipped
    found = {name: figure for name, figure in expected(f"cifar100/{row}").of("top1").items() if name not in own}
    assert found == by_column(TABLE_2A)[row]


def test_the_swin_classroom_prints_table_1s_column():
    wanted = {"fitnets": 78.87, "crd": 77.63, "rkd": 74.11, "dist": 77.75, "ofa": 80.54}
    assert expected("cifar100/swint-r18").of("top1") == wanted | {"nokd": 74.01, "kd": 78.74, "classroom": 80.32}


# --- DiSK


def test_every_pair_of_disks_tables_is_there():
    others = {"base", "mentor", "tiny-base", "tiny-mentor", "imagenet-r50-r18", "imagenet-vitl-vitt"}
    assert {n for n in EVERY if n.startswith("disk/")} == {f"disk/{row}" for row in {*DISK_ROWS, *others}}
    assert len(DISK_ROWS) == 12 + 12 + 8


@pytest.mark.parametrize("row", DISK_ROWS)
def test_a_disk_pair_prints_the_papers_figures(row):
    expect = expected(f"disk/{row}")
    assert expect.of("top1") == DISK_ROWS[row]
    assert expect.epoch == "last"
    assert "Table" in expect.source
    assert ("Tiny" in expect.source) is row.startswith("tiny")
    assert ("Chen" in expect.source) is ("semckd" in expect.of("top1"))


def test_disks_imagenet_pairs():
    assert expected("disk/imagenet-r50-r18").of("top1") == {"nokd": 69.73, "kd": 71.29, "disk": 72.35}
    assert expected("disk/imagenet-vitl-vitt").of("top1") == {"nokd": 75.45, "disk": 77.86}


@pytest.mark.parametrize("name", [n for n in EVERY if n.startswith("disk/")])
def test_disks_training(name):
    read = recipe.load(name)
    train = read.train
    assert (train.epochs, train.batch_size, train.lr, train.schedule) == (200, 200, 0.1, "cosine")
    assert (train.momentum, train.nesterov, train.weight_decay) == (0.9, False, 5e-4)
    assert read.data.augment == ("imagenet" if "imagenet" in name else "disk")
    if read.method.name == "disk":
        assert (read.method.options["K"], read.method.options["tau"], read.method.options["alpha"]) == (20, 4.0, 0.1)
        alone = read.expect.of("top1")["nokd"] if read.expect else None
        assert read.method.options.get("budget") == (None if alone is None else pytest.approx(1 - alone / 100))
    size = 64 if "tiny" in name else 224 if "imagenet" in name else 32
    assert read.data.image_size == size
    assert (read.data.name or "").startswith({32: "cifar100", 64: "folder:", 224: "imagenet"}[size])


# --- TeKAP


def tekap_rows() -> dict[str, dict[str, float]]:
    """Pair -> method or label -> figure, of the slides' table of networks."""
    called = ["nokd", "kd", "tekap-l", "crd", "tekap-f", "tekap"]
    teachers, students, _, *lines = [line.split(" | ")[1:] for line in TEKAP.strip().splitlines()]
    columns = zip(teachers, students, *lines, strict=True)
    rows = {f"{token(t)}-{token(s)}": figures(dict(zip(called, cells, strict=True))) for t, s, *cells in columns}
    assert (rows["r32x4-snv2"]["nokd"], rows["r32x4-snv2"]["kd"]) == (70.36, 72.98)  # VGG-8's, printed once more
    rows["r32x4-snv2"] |= {"nokd": 71.82, "kd": 74.45}  # CRD's
    return rows


AROUND = {  # the slides' table of single teachers: method alone, with TeKAP
    "r32x4-r8x4": {"dkd": (76.32, 76.59), "mlkd": (77.08, 77.36)},
    "wrn402-wrn401": {"dkd": (74.81, 75.33), "mlkd": (75.35, 75.67)},
}


def test_every_pair_of_tekaps_slides_is_there():
    others = {"base", "imagenet-r34-r18", *(f"mlkd-{pair}" for pair in AROUND)}
    assert {n for n in EVERY if n.startswith("tekap/")} == {f"tekap/{row}" for row in {*tekap_rows(), *others}}
    assert len(tekap_rows()) == 8


@pytest.mark.parametrize("pair", tekap_rows())
def test_a_tekap_pair_prints_the_slides_figures(pair):
    wanted = tekap_rows()[pair]
    if pair in AROUND:
        wanted |= dict(zip(["dkd", "dkd-tekap"], AROUND[pair]["dkd"], strict=True))
    assert expected(f"tekap/{pair}").of("top1") == wanted
    assert expected(f"tekap/{pair}").epoch == "last"


@pytest.mark.parametrize("pair", tekap_rows())
def test_its_three_forms_are_three_learners(pair):
    read = recipe.load(f"tekap/{pair}")
    forms = {label: read.with_method(label).method for label in ("tekap", "tekap-l", "tekap-f")}
    assert {label: (one.name, one.options) for label, one in forms.items()} == {
        "tekap": ("tekap", {"parts": "both"}),
        "tekap-l": ("tekap", {"parts": "logits"}),
        "tekap-f": ("tekap", {"parts": "features"}),
    }
    alone = read.with_method("tekap-l").expect
    assert alone is not None
    assert alone.of("top1")["tekap"] == tekap_rows()[pair]["tekap-l"]  # what `distill --method tekap-l` is held against


@pytest.mark.parametrize("pair", AROUND)
@pytest.mark.parametrize("method", ["dkd", "mlkd"])
def test_tekap_around_another_method_changes_nothing_else(pair, method):
    read = recipe.load(f"tekap/{pair}" if method == "dkd" else f"tekap/mlkd-{pair}")
    own, around = read.with_method(method), read.with_method(f"{method}-tekap")
    assert around.method.options == {**own.method.options, "tekap": True}
    assert around.train == own.train
    if method == "mlkd":
        alone, together = AROUND[pair]["mlkd"]
        assert expected(f"tekap/mlkd-{pair}").of("top1") == {
            "nokd": tekap_rows()[pair]["nokd"], "mlkd": alone, "mlkd-tekap": together
        }  # fmt: skip
    else:
        assert own.method.options["beta"] == recipe.load(f"crd/{pair}").with_method("dkd").method.options["beta"]


def test_tekaps_imagenet_pair():
    teacher, student, kd, tekap = (100 - error for error in (26.69, 30.25, 29.59, 29.33))
    expect = expected("tekap/imagenet-r34-r18")
    assert expect.of("top1") == pytest.approx({"nokd": student, "kd": kd, "tekap": tekap})
    assert expect.of("top5") == pytest.approx({"nokd": 100 - 10.93, "kd": 100 - 10.30, "tekap": 100 - 10.08})
    assert teacher == pytest.approx(73.31)  # ResNet-34's, as imagenet/r34-r18 has it
    assert recipe.load("tekap/imagenet-r34-r18").classroom.teacher == recipe.load("imagenet/r34-r18").classroom.teacher
