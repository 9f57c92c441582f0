"""Weights: what loads, what is refused and in which words, and which weights a name without them gets."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcli.errors import WeightsError
from kdcli.models import cards
from kdcli.models.cards import Card
from kdcli.models.checkpoint import digest, fill, load_state
from kdcli.models.registry import create, resolve
from kdcli.models.weights import Found, choose


def net(arch: str = "cifar_resnet8", num_classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create(resolve(arch), num_classes).module


def card(arch: str = "zoo:cifar_resnet8", **over: Any) -> Card:
    plain: dict[str, Any] = {
        "name": "a net",
        "architecture": arch,
        "dataset": "digits",
        "data_hash": "d1",
        "num_classes": 10,
        "image_size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "score": {"top1": 72.4},
        "created": "2026-11-20T00:00:00+00:00",
    }
    return Card.model_validate(plain | over)


def pick(spec: str, role: Any = "mentor", *, num_classes: int = 10, name: str = "digits", **options: Any) -> Found:
    """`choose` for a data set of that many classes."""
    data: Any = SimpleNamespace(name=name, hash="d1", classes=[str(k) for k in range(num_classes)])
    return choose(resolve(spec), data, role, **options)


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


# --- load_state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.th", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "student"])
def test_checkpoints_of_every_dress_load(tmp_path: Path, name: str, wrap: str | None) -> None:
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    torch.save(state if wrap is None else {"epoch": 3, wrap: state}, tmp_path / name)
    assert same(load_state(tmp_path / name), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    state = {"a.weight": torch.randn(2, 3), "module.bias": torch.randn(2)}
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "x.pth")
    assert same(load_state(tmp_path / "x.pth"), state)


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.randn(2), "b": torch.randn(2)}
    save_file(state, tmp_path / "x.safetensors")
    assert same(load_state(tmp_path / "x.safetensors"), state)


def test_the_old_pickle_format_loads(tmp_path: Path) -> None:
    state = {"a": torch.randn(4)}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(load_state(tmp_path / "x.pth"), state)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "student.pth")
    with pytest.raises(WeightsError, match="no checkpoint at") as caught:
        load_state(tmp_path / "studnet.pth")
    assert caught.value.exit_code == 3
    assert "student.pth" in caught.value.hint


def _file(folder: Path, kind: str) -> Path:
    path = folder / ("x.safetensors" if "safetensors" in kind else "x.pth")
    big = {"a": torch.randn(100, 100), "b": torch.randn(3)}
    if kind == "folder":
        path.mkdir()
    elif kind == "safetensors":
        save_file(big, path)
    elif kind == "old":
        torch.save(big, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(big, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_truncated_files_are_said_to_be_cut_short(tmp_path: Path, kind: str, keep: float) -> None:
    path = _file(tmp_path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(WeightsError, match="broken or cut short") as caught:
        load_state(path)
    assert path.name in caught.value.message
    assert "sha256" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"hello, I am a text\n", "looks like text"),
        (bytes(range(200, 256)) * 4, "something else"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=said) as caught:
        load_state(path)
    assert "x.pth" in caught.value.message
    assert caught.value.hint


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder"):
        load_state(_file(tmp_path, "folder"))


@pytest.mark.parametrize(
    "held", [{}, {"epoch": 3, "lr": 0.1}, [torch.ones(1)], {"state_dict": {"a": 3}}, torch.ones(2)]
)
def test_checkpoints_without_a_network_are_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="no network's tensors"):
        load_state(tmp_path / "x.pth")


class Sly:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("how", ["torch", "pickle", "module"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Sly()}, protocol=2))
    else:
        torch.save({"model": Sly() if how == "torch" else nn.Linear(2, 2)}, path)
    with pytest.raises(WeightsError) as caught:
        load_state(path)
    assert not (tmp_path / "ran").exists()
    assert caught.value.exit_code == 3
    assert "pickled code" in caught.value.message
    assert "state_dict()" in caught.value.hint


# --- fill and digest ----------------------------------------------------------------------------------------------


def test_fill_is_exact() -> None:
    given, own = net(seed=1), net(seed=2)
    assert digest(given) != digest(own)
    fill(own, given.state_dict(), arch="cifar_resnet8", where="x.pth")
    assert digest(given) == digest(own)


def test_fill_takes_states_from_before_batch_norm_counted() -> None:
    given, own = net(seed=1), net(seed=2)
    state = {k: v for k, v in given.state_dict().items() if not k.endswith("num_batches_tracked")}
    fill(own, state, arch="zoo:cifar_resnet8", where="x.pth")
    assert digest(given) == digest(own)


@pytest.mark.parametrize("arch", ["mnasnet1_0", "torchvision:squeezenet1_1"])
def test_fill_of_torchvision_networks(arch: str) -> None:
    given, own = net(arch, 4, seed=1), net(arch, 4, seed=2)
    fill(own, dict(given.state_dict()), arch=arch, where="x.pth")
    assert digest(given) == digest(own)


def test_fill_leaves_auxiliary_heads_out() -> None:
    from torchvision.models import get_model

    whole = get_model("googlenet", aux_logits=True, init_weights=False, num_classes=5)
    own = net("googlenet", 5)
    fill(own, whole.state_dict(), arch="googlenet", where="googlenet.pth")
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in own.state_dict().items())


def test_another_class_count_is_said_in_words_and_nothing_is_touched() -> None:
    own = net(num_classes=100)
    before = digest(own)
    with pytest.raises(WeightsError, match=r"x\.pth: its head has 10 classes, cifar_resnet8 here has 100") as caught:
        fill(own, net().state_dict(), arch="cifar_resnet8", where="x.pth")
    assert "class_map" in caught.value.hint
    assert "kdcli train" in caught.value.hint
    assert digest(own) == before


def test_a_foreign_checkpoint_is_counted_and_shown() -> None:
    own = net()
    before = digest(own)
    state = net("cifar_resnet14").state_dict()
    with pytest.raises(WeightsError, match=r"not a checkpoint of cifar_resnet8: \d+ of the network's \d+ tensors") as e:
        fill(own, state, arch="cifar_resnet8", where="x.pth")
    assert "not in the network" in e.value.message
    assert "ARCHITECTURE@PATH" in e.value.hint
    with pytest.raises(WeightsError, match=r" 0 of the network's"):
        fill(own, {"w": torch.ones(1)}, arch="cifar_resnet8", where="x.pth")
    wide = {k: torch.cat([v, v]) if k.endswith("conv1.weight") else v for k, v in net().state_dict().items()}
    with pytest.raises(WeightsError, match="in the file"):
        fill(own, wide, arch="cifar_resnet8", where="x.pth")
    assert digest(own) == before


def test_weights_that_are_no_numbers_are_refused() -> None:
    state = {k: v.clone() for k, v in net().state_dict().items()}
    key = next(k for k in state if k.endswith("weight"))
    state[key].view(-1)[0] = float("nan")
    with pytest.raises(WeightsError, match="NaN or infinite"):
        fill(net(), state, arch="cifar_resnet8", where="x.pth")


def test_digest_sees_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(1)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)},
        {"a": torch.arange(6.0), "b": torch.tensor(1, dtype=torch.int32)},
        {"a": torch.arange(6.0) + 1e-6, "b": torch.tensor(1)},
        {"a": torch.arange(6.0).bfloat16(), "b": torch.tensor(1)},
    ]
    assert len({digest(s) for s in [base, *others]}) == 6
    assert digest(dict(reversed(base.items()))) == digest(base)
    assert digest({"a": torch.arange(12.0)[::2] / 2, "b": torch.tensor(1)}) == digest(base)


def test_the_public_checkpoints_fill_their_networks(shared: Path) -> None:
    for depth, params in ((20, 269_722), (56, 853_018)):
        path = next((shared / "data" / "checkpoints").glob(f"resnet{depth}-*.th"))
        found = pick(f"cifar_resnet{depth}_a@{path}")
        assert found.card is not None
        assert (found.card.params, found.num_classes) == (params, 10)
        assert f"cifar_resnet{depth}_a on cifar10, 9" in found.origin
        own = net(f"cifar_resnet{depth}_a")
        assert found.state is not None
        fill(own, found.state, arch=f"cifar_resnet{depth}_a", where=str(path))
        assert sum(p.numel() for p in own.parameters()) == params
        assert any(torch.equal(v, next(iter(found.state.values()))) for v in own.state_dict().values())


def test_a_public_checkpoint_under_the_wrong_name_is_corrected(shared: Path) -> None:
    path = next((shared / "data" / "checkpoints").glob("resnet20-*.th"))
    with pytest.raises(WeightsError, match="is a cifar_resnet20_a, not a cifar_resnet20") as caught:
        pick(f"cifar_resnet20@{path}")
    assert caught.value.hint.startswith("Write cifar_resnet20_a@")


# --- choose -------------------------------------------------------------------------------------------------------


def test_a_student_starts_from_scratch_whatever_the_zoo_has() -> None:
    cards.add(net().state_dict(), card())
    for spec in ("cifar_resnet8", "cifar_resnet8@none", "resnet18"):
        assert pick(spec, "student") == Found(None, "from scratch", None, None, False)


def test_a_mentor_takes_the_zoos_newest_for_this_data() -> None:
    cards.add(net(seed=1).state_dict(), card(created="2026-11-18T00:00:00+00:00"))
    new = net(seed=2).state_dict()
    cards.add(new, card(score={"top1": 80.0}))
    cards.add(net(seed=3).state_dict(), card(data_hash="d2", created="2026-11-30T00:00:00+00:00"))
    found = pick("cifar_resnet8")
    assert same(found.state, new)
    assert found.origin == "zoo: cifar_resnet8 on digits, 80 %, 2026-11-20"
    assert (found.num_classes, found.pretrained) == (10, False)
    assert same(pick("zoo:cifar_resnet8").state, new)


def test_the_zoo_comes_before_the_librarys_weights() -> None:
    state = net("squeezenet1_1").state_dict()
    cards.add(state, card("torchvision:squeezenet1_1"))
    assert same(pick("squeezenet1_1").state, state)


def test_a_tampered_zoo_file_is_refused() -> None:
    path = cards.weights_path(cards.add(net().state_dict(), card()))
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match="sha256 differs") as caught:
        pick("cifar_resnet8")
    assert "zoo verify" in caught.value.hint


def test_a_mentor_takes_the_librarys_weights_when_the_classes_fit() -> None:
    found = pick("resnet18", num_classes=1000, name="imagenet")
    assert (found.state, found.num_classes, found.pretrained) == (None, 1000, True)
    assert "timm's pretrained weights" in found.origin
    assert pick("mobilenetv3_small@pretrained", num_classes=1000).pretrained
    assert pick("resnet18", mapped=True).num_classes == 1000


def test_a_mentor_without_weights_names_the_cure() -> None:
    for spec in ("cifar_resnet8", "cifar_resnet8@pretrained"):
        with pytest.raises(WeightsError, match="no pretrained weights") as caught:
            pick(spec)
        assert "kdcli train --model cifar_resnet8 --data digits" in caught.value.hint
        assert "cifar_resnet8@PATH" in caught.value.hint


@pytest.mark.parametrize("spec", ["resnet18", "resnet18@pretrained"])
def test_a_mentor_whose_classes_differ_names_the_cure(spec: str) -> None:
    with pytest.raises(WeightsError, match="know 1000 classes, digits has 10") as caught:
        pick(spec)
    for cure in ("kdcli train --model timm:resnet18 --data digits", "@PATH", "--set classroom.class_map=auto"):
        assert cure in caught.value.hint


def test_weights_without_a_head_teach_nothing() -> None:
    for mapped in (False, True):
        with pytest.raises(WeightsError, match="have no head") as caught:
            pick("vit_base_patch16_224.dino", mapped=mapped)
        assert "class_map" not in caught.value.hint


def test_an_untrained_mentor_is_refused() -> None:
    with pytest.raises(WeightsError, match="teach noise") as caught:
        pick("cifar_resnet8@none")
    assert "kdcli train --model cifar_resnet8" in caught.value.hint


def test_a_student_may_start_from_pretrained_weights_with_a_fresh_head() -> None:
    found = pick("resnet18@pretrained", "student")
    assert found.pretrained
    assert found.state is None
    assert "fresh head for 10 classes" in found.origin


def test_a_path_without_a_card(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    found = pick(f"cifar_resnet8@{tmp_path / 'x.pth'}")
    assert same(found.state, dict(state))
    assert (found.num_classes, found.card, found.origin) == (10, None, str(tmp_path / "x.pth"))


@pytest.mark.parametrize("role", ["mentor", "student"])
def test_a_path_with_other_classes(tmp_path: Path, role: str) -> None:
    torch.save(net(num_classes=100).state_dict(), tmp_path / "x.pth")
    spec = f"cifar_resnet8@{tmp_path / 'x.pth'}"
    with pytest.raises(WeightsError, match="its head has 100 classes, digits has 10") as caught:
        pick(spec, role)
    assert ("class_map" in caught.value.hint) == (role == "mentor")
    if role == "mentor":
        assert pick(spec, mapped=True).num_classes == 100


def test_a_path_with_its_card(tmp_path: Path) -> None:
    path = cards.save(tmp_path, "x", net().state_dict(), card())
    found = pick(f"cifar_resnet8@{path}")
    assert found.card is not None
    assert found.origin == f"{path}: cifar_resnet8 on digits, 72.4 %, 2026-11-20"
    with pytest.raises(WeightsError, match="is a cifar_resnet8, not a cifar_resnet14"):
        pick(f"cifar_resnet14@{path}")


def test_a_missing_path_and_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no checkpoint at"):
        pick(f"cifar_resnet8@{tmp_path / 'absent.pth'}")
    (tmp_path / "first-run").mkdir()
    with pytest.raises(WeightsError, match="neither a file nor a run") as caught:
        pick("cifar_resnet8@frist-run", runs=tmp_path)
    assert "first-run" in caught.value.hint


def _run(runs: Path, name: str = "one") -> dict[int | None, dict[str, Tensor]]:
    """A run that kept epochs 20 (with a card) and 60 (without) and its student."""
    states: dict[int | None, dict[str, Tensor]] = {
        e: dict(net(seed=s).state_dict()) for s, e in enumerate((None, 20, 60))
    }
    cards.save(runs / name, "student", states[None], card(epoch=240))
    cards.save(runs / name, "epoch-020", states[20], card(epoch=20, score={"top1": 30.0}))
    save_file(states[60], runs / name / "epoch-060.safetensors")
    return states


def test_runs_by_name_and_by_folder(tmp_path: Path) -> None:
    states = _run(tmp_path)
    for spec in ("cifar_resnet8@one", f"cifar_resnet8@{tmp_path / 'one'}"):
        found = pick(spec, runs=tmp_path)
        assert same(found.state, states[None])
        assert found.origin == "run one: cifar_resnet8 on digits, 72.4 %, epoch 240, 2026-11-20"
    assert same(pick("cifar_resnet8@one", "student", runs=tmp_path).state, states[None])


def test_a_runs_kept_epochs(tmp_path: Path) -> None:
    states = _run(tmp_path)
    found = pick("cifar_resnet8@one#20", runs=tmp_path)
    assert same(found.state, states[20])
    assert "30 %, epoch 20" in found.origin
    found = pick(f"cifar_resnet8@{tmp_path / 'one'}#60", runs=tmp_path)
    assert same(found.state, states[60])
    assert found.card is not None
    assert (found.card.epoch, found.card.score) == (60, {})
    with pytest.raises(WeightsError, match="kept no epoch 40") as caught:
        pick("cifar_resnet8@one#40", runs=tmp_path)
    assert "20, 60" in caught.value.hint


def test_a_run_of_another_network_or_unfinished(tmp_path: Path) -> None:
    _run(tmp_path)
    with pytest.raises(WeightsError, match="is a cifar_resnet8, not a cifar_resnet20"):
        pick("cifar_resnet20@one", runs=tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(WeightsError, match="has not finished") as caught:
        pick("cifar_resnet8@two", runs=tmp_path)
    assert "runs show" in caught.value.hint


@pytest.mark.parametrize("low", [0x80, ord("P")])
def test_a_safetensors_file_whose_header_length_looks_like_a_pickle(tmp_path: Path, low: int) -> None:
    """The length is the first thing in the file, and its low byte may be that of another format."""
    from safetensors.torch import save

    for n in range(256):
        data = save({"a": torch.ones(2)}, metadata={"pad": "x" * n})
        if data[0] == low:
            (tmp_path / "w.safetensors").write_bytes(data)
            assert load_state(tmp_path / "w.safetensors")["a"].tolist() == [1.0, 1.0]
            return
    pytest.fail("no header of that length was made")
