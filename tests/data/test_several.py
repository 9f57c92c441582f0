"""Several classes per image: 0/1 matrices in .npz files, labels.csv in folders, and how they are divided."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdcli.data import Stream, available, open_data
from kdcli.data.split import balanced, check_classes, held_out, stratified
from kdcli.data.workers import Files
from kdcli.errors import DataError, KdcliError, RecipeError
from kdcli.recipe import DataConfig

CLASSES = ["ant", "bee", "cow"]


def matrix(n=60, seed=0, k=3):
    """Some images without a class, all classes more than once."""
    return (np.random.default_rng(seed).random((n, k)) < 0.35).astype(np.uint8)


def opened(name, task="multilabel", **keys):
    return open_data(DataConfig(**({"name": name, "workers": 0, "image_size": 32} | keys)), task)


def refused(name, kind: type[KdcliError] = DataError, **keys) -> KdcliError:
    with pytest.raises(kind) as error:
        opened(name, **keys)
    assert error.value.hint
    return error.value


# --- npz


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float32])
def test_a_matrix_of_any_type_is_read(npz, dtype):
    labels = matrix(40).astype(dtype)
    path = npz(train_labels=labels, test_labels=matrix(20, 1).astype(dtype), class_names=np.array(CLASSES))
    data = opened(f"npz:{path}")
    assert data.classes == CLASSES
    assert data.train.targets.dtype == torch.float32
    assert data.train.targets.numpy().tolist() == labels.astype(float).tolist()
    other = npz("b.npz", train_labels=matrix(40), test_labels=matrix(20, 1), class_names=np.array(CLASSES))
    assert data.hash == opened(f"npz:{other}").hash
    batch = next(Stream(data, 8, seed=0).epoch(0))
    assert batch.target.equal(data.train.targets[batch.index])
    row = next(one for one in available(str(path.parent)) if one["name"] == "npz:toy.npz")
    assert (row["images"], row["classes"]) == (60, 3)


def test_names_are_numbers_where_there_are_none_and_labels_count_in_the_hash(npz):
    labels = matrix(40)
    data = opened(f"npz:{npz(train_labels=labels, test_labels=matrix(20, 1))}")
    assert data.classes == ["0", "1", "2"]
    labels[0, 0] ^= 1
    assert opened(f"npz:{npz(train_labels=labels, test_labels=matrix(20, 1))}").hash != data.hash


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"test_labels": np.arange(20) % 3},
            "train_labels is a 0/1 matrix of 3 classes and test_labels has shape (20,)",
        ),
        ({"test_labels": matrix(20, 1, 4)}, "of 3 classes and test_labels has shape (20, 4)"),
        ({"class_names": np.array(["a", "b"])}, "2 class_names for the 3 columns"),
        ({"train_labels": matrix(40) * 2}, "allowed: class numbers [N] or [N,1], or a 0/1 matrix [N,K]"),
        ({"train_labels": matrix(40) * [1, 1, 0]}, "1 of 3 classes have no training images: 2"),
        ({"train_labels": np.arange(40) % 3}, "test_labels is a 0/1 matrix and train_labels are class numbers"),
    ],
)
def test_faults_are_named(npz, change, said):
    path = npz(**({"train_labels": matrix(40), "test_labels": matrix(20, 1)} | change))
    error = refused(f"npz:{path}")
    assert said in error.message
    assert str(path) in error.message


def test_labels_of_another_task_are_refused(npz, folder):
    path = npz(train_labels=matrix(40), test_labels=matrix(20, 1))
    error = refused(f"npz:{path}", RecipeError, task="classify")
    assert "a 0/1 matrix of 3 classes" in error.message
    assert "task=multilabel" in error.hint
    assert "argmax" in error.hint
    for name, cure in (
        (f"npz:{npz('single.npz')}", "0/1 matrix"),
        (f"folder:{folder()}", "labels.csv"),
        ("digits", "npz:FILE"),
    ):
        error = refused(name, RecipeError)
        assert "one class per image" in error.message
        assert "task=classify" in error.hint
        assert cure in error.hint


def test_mixing_is_refused(npz):
    data = opened(f"npz:{npz(train_labels=matrix(40), test_labels=matrix(20, 1))}")
    with pytest.raises(RecipeError, match=r"mixup and cutmix mix class numbers.*\(40, 3\)"):
        Stream(data, 8, seed=0, mixup=0.5)


# --- labels.csv


@pytest.fixture
def tagged(tmp_path):
    """Writes images of noise and a labels.csv; returns the folder and the labels by name."""

    def write(names, labels=None, root="pets", header="file,labels", **more):
        rng = np.random.default_rng(1)
        rows = labels or [";".join(c for c, has in zip(CLASSES, row, strict=True) if has) for row in matrix(len(names))]
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
        lines = [header, *(f"{name},{row}" for name, row in zip(names, rows, strict=True))]
        (tmp_path / root / "labels.csv").write_text("\n".join(lines) + "\n", **({"encoding": "utf-8"} | more))
        return tmp_path / root, dict(zip(names, rows, strict=True))

    return write


def names_of(data) -> list[list[str]]:
    assert isinstance(data.train.store, Files)
    return [[bytes(f).decode() for f in p.files] for p in data.train.store.readers.decoder.parts]  # pyright: ignore


def parts(train=24, val=8):
    return [f"{part}/{n:02}.png" for part, count in (("train", train), ("val", val)) for n in range(count)]


def test_a_folder_in_parts(tagged):
    path, labels = tagged(parts())
    data = opened(f"folder:{path}")
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (24, 8)
    for split, part in ((data.train, "train"), (data.test, "val")):
        expected = [[float(c in labels[f"{part}/{n:02}.png"].split(";")) for c in CLASSES] for n in range(len(split))]
        assert split.targets.tolist() == expected
    assert any(not row.any() for row in data.train.targets)  # an empty cell: no label
    row = next(one for one in available(str(path.parent)) if one["name"] == "folder:pets")
    assert (row["images"], row["classes"], row["present"]) == (32, 3, True)


def test_labels_count_in_the_hash(tagged):
    names = parts()
    path, labels = tagged(names)
    before = opened(f"folder:{path}").hash
    assert opened(f"folder:{path}").hash == before
    tagged(names, [labels[name] for name in names[:-1]] + ["ant;bee;cow"])
    assert opened(f"folder:{path}").hash != before


@pytest.mark.parametrize("header", ["FILE,Labels", " image , tags", "Filename,label", "path,CLASSES"])
def test_columns_go_by_several_names_and_a_mark_in_front_is_ignored(tagged, header):
    path, _ = tagged(parts(), header=header, encoding="utf-8-sig")
    assert len(opened(f"folder:{path}").train) == 24


def test_cells_may_be_quoted_spaced_repeated_and_among_others(tmp_path, tagged):
    names = parts(4, 2)
    path, _ = tagged(names)
    lines = ["id,file,labels", '1,"train/00.png"," ant ; bee;ant;"', "2,./train/01.png,cow", "3,train\\02.png,", "",
             "5,train/03.png,b e e;cow", "6,val/00.png,ant", '7,val/01.png,"cow;bee"']  # fmt: skip
    (path / "labels.csv").write_text("\r\n".join(lines))
    data = opened(f"folder:{path}")
    assert data.classes == ["ant", "b e e", "bee", "cow"]
    assert data.train.targets.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]


def test_a_folder_without_parts_is_split_by_name(tagged):
    names = [f"images/{n:03}.png" for n in range(60)]
    path, labels = tagged(names)
    data = opened(f"folder:{path}", augment="imagenet")
    files = names_of(data)
    assert sorted(files[0] + files[1]) == names
    assert 9 <= len(files[1]) <= 24
    counts = data.train.targets.sum(0) + data.test.targets.sum(0)
    assert (data.test.targets.sum(0) >= 0.2 * counts - 0.5).all()
    again = opened(f"folder:{path}", augment="imagenet")
    assert names_of(again) == files
    rare = [labels[name] for name in names[:-1]] + ["cow;yak"]
    tagged(names, rare)
    with_rare = opened(f"folder:{path}")
    assert with_rare.train.targets[:, 3].sum() == 1  # a single image trains


def test_images_without_a_line_are_left_out_and_named(tagged):
    path, _ = tagged(parts())
    Image.new("RGB", (40, 30)).save(path / "train" / "more.png")
    data = opened(f"folder:{path}")
    assert len(data.train) == 24
    assert any("1 images without a line are left out: train/more.png" in why for _, _, why in data.notes)


def test_a_test_folder_next_to_val_is_not_read(tagged):
    path, _ = tagged([*parts(), "test/x.png"])
    data = opened(f"folder:{path}")
    assert (len(data.train), len(data.test)) == (24, 8)
    assert any("lines outside train/ and val/ are not read: test/x.png" in why for _, _, why in data.notes)


def rewrite(path, change):
    file = path / "labels.csv"
    lines = file.read_text().splitlines()
    change(lines)
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda lines: lines.append("train/none.png,ant"),
            "1 of 33 listed images are not there: train/none.png (line 34)",
        ),
        (lambda lines: lines.append("../x.png,ant"), "../x.png (line 34)"),
        (lambda lines: lines.append(lines[3]), "line 34: train/02.png was already on line 4"),
        (lambda lines: lines.append("train/99.png"), "line 34: 1 cells, and the first line has 2"),
        (lambda lines: lines.insert(5, "train/a.png,ant,bee"), "line 6: 3 cells, and the first line has 2"),
        (lambda lines: lines.insert(5, ",ant"), "line 6: no file is named"),
        (lambda lines: lines.insert(5, 'train/a.png,"ant'), "line"),
        (
            lambda lines: lines.__setitem__(-1, "val/07.png,yak"),
            "1 of 4 classes have no training images: yak (line 33)",
        ),
        (lambda lines: lines.__setitem__(0, "file,image,labels"), "line 1: 2 columns called"),
        (lambda lines: lines.__delitem__(slice(1, None)), "no image is listed"),
        (lambda lines: lines.__delitem__(slice(25, None)), "no line names an image in val/"),
    ],
)
def test_faults_of_a_table_are_named_by_line(tagged, change, said):
    path, _ = tagged(parts())
    rewrite(path, change)
    error = refused(f"folder:{path}")
    assert said in error.message
    assert "labels.csv" in error.message


def test_a_table_that_is_not_utf_8(tagged):
    path, _ = tagged(parts())
    file = path / "labels.csv"
    file.write_bytes(file.read_bytes().replace(b"train/03.png,", b"train/03.png,caf\xe9"))
    error = refused(f"folder:{path}")
    assert "line 5: not UTF-8" in error.message


def test_another_labels_csv_leaves_class_folders_alone(folder, tmp_path):
    path = folder()
    (path / "labels.csv").write_text("number,name\n0,ant\n")
    assert opened(f"folder:{path}", task="classify").classes == ["ant", "bee"]
    (path / "labels.csv").write_text(
        "file,label\n" + "\n".join(f"{part}/ant/ant0.png,ant" for part in ("train", "val"))
    )
    error = refused(f"folder:{path}", RecipeError, task="classify")
    assert "several classes per image" in error.message
    assert "without labels.csv" in error.hint


def test_only_train_is_refused(tagged):
    path, _ = tagged(parts(24, 0))
    assert "no val/" in refused(f"folder:{path}").message


def test_corrupt_images_of_a_table(tagged):
    path, _ = tagged(parts())
    (path / "train" / "05.png").write_text("words")
    assert "05.png" in refused(f"folder:{path}").message
    data = opened(f"folder:{path}", skip_corrupt=True)
    assert len(data.train) == len(data.train.targets) == 23


# --- dividing


def test_per_class_gives_each_class_at_least_so_many(npz):
    labels = matrix(200)
    few, many = (balanced(labels, n, 0, CLASSES) for n in (5, 12))
    for rows, n in ((few, 5), (many, 12)):
        assert (labels[rows].sum(0) >= n).all()
        assert len(rows) <= 4 * n
        assert (~labels[rows].any(1)).sum() == n  # and as many without a class
    assert set(few) <= set(many)
    assert (few == balanced(labels, 5, 0, CLASSES)).all()
    assert not np.array_equal(few, balanced(labels, 5, 1, CLASSES))
    with pytest.raises(RecipeError, match="per_class = 150"):
        balanced(labels, 150, 0, CLASSES)
    path = npz(n=200, train_labels=labels, test_labels=matrix(100, 1))
    assert len(opened(f"npz:{path}", per_class=5).train) == len(few)


def test_holdout_takes_a_share_of_each_class_and_leaves_each_one(npz):
    labels = matrix(200)
    labels[:, 2] = 0
    labels[7] = (1, 1, 1)  # the only image of the last class
    rows = held_out(labels, 0.25, 0, CLASSES)
    assert 7 not in rows
    counts = labels.sum(0)
    assert (labels[rows].sum(0)[:2] >= np.rint(0.25 * counts[:2]) - 1).all()
    assert len(rows) < 0.45 * 200
    path = npz(n=200, train_labels=matrix(200), test_labels=matrix(100, 1))
    data = opened(f"npz:{path}", holdout=0.2)
    assert data.holdout is not None
    assert torch.cat([data.train.index, data.holdout.index]).sort().values.equal(torch.arange(200))


def test_stratified_keeps_combinations_in_proportion():
    labels = np.repeat(np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.uint8), [40, 30, 20, 10], axis=0)
    rows = stratified(labels, total=10, seed=0)
    assert np.unique(labels[rows], axis=0, return_counts=True)[1].tolist() == [4, 2, 3, 1]


def test_one_class_alone_may_be_there_or_not():
    check_classes(np.array([[1], [0]], np.uint8), ["ant"], "here")
    with pytest.raises(DataError, match="only one class"):
        check_classes(np.array([0, 0]), ["ant"], "here")
