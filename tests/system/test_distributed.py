"""Ranks that divide a batch: which rows are whose, and that two of them end where one does."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dist_kit as ranks
import engine_kit as kit
import pytest
import torch
from torch import nn

from kdcli.cli import launch
from kdcli.data import Batch, Stream, open_data
from kdcli.errors import DataError, RecipeError
from kdcli.recipe import DataConfig, TrainConfig
from kdcli.system import device as devices, distributed, shards
from kdcli.tasks import Classify
from kdcli.training import checks


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


# --- which rows are whose ---------------------------------------------------------------------------------------------


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be one of several ranks, without the others: enough for what needs no exchange."""

    def one(rank: int, world: int) -> None:
        shards.layout.cache_clear()
        monkeypatch.setattr(distributed, "alone", lambda: world == 1)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)

    yield one
    shards.layout.cache_clear()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("size", "world"), [(8, 2), (9, 2), (64, 3), (30, 8)])
def test_every_row_is_one_ranks_and_shares_are_even(become: Any, size: int, world: int, mirrored: bool) -> None:
    become(0, world)
    whose = shards.ranks_of_rows(size, mirrored)
    counts = torch.bincount(whose, minlength=world)
    assert len(whose) == size
    assert int(counts.max() - counts.min()) <= (2 if mirrored else 1)
    if mirrored:
        assert torch.equal(whose, whose.flip(0))


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_the_stream_of_all_ranks_is_the_stream_of_one(become: Any, world: int, mixing: bool) -> None:
    data = open_data(DataConfig(name="digits", per_class=4, image_size=8))
    options = {"mixup": 0.3, "cutmix": 1.0} if mixing else {}

    def epoch() -> list[Batch]:
        return list(Stream(data, 14, seed=3, **options).epoch(1, 1))  # pyright: ignore[reportArgumentType]

    become(0, 1)
    alone = epoch()
    seen = [torch.full((len(batch),), -1) for batch in alone]
    for rank in range(world):
        become(rank, world)
        for n, (own, batch) in enumerate(zip(epoch(), alone, strict=True)):
            assert own.whole is not None
            assert torch.equal(own.whole.target, batch.target)
            assert torch.equal(own.whole.index, batch.index)
            rows = [batch.index.tolist().index(i) for i in own.index.tolist()]
            for name in ("images", "target", "view"):
                assert torch.equal(getattr(own, name), getattr(batch, name)[rows]), name
            assert (seen[n][rows] == -1).all()
            seen[n][rows] = rank
    assert all((places >= 0).all() for places in seen)


@pytest.mark.parametrize("mirrored", [False, True])
def test_micro_batches_are_those_of_the_whole_batch(become: Any, mirrored: bool) -> None:
    whole = Batch(torch.rand(10, 3, 2, 2), torch.arange(10), torch.arange(20, 30), torch.arange(30, 40))
    for at, end in ((0, 4), (4, 8), (8, 12)):
        found = []
        for rank in range(2):
            become(rank, 2)
            rows, few = shards.own_rows(10, 10, mirrored)
            assert few == len(whole.images[rows])
            own = Batch(whole.images[rows], whole.target, whole.index, whole.view)
            part = own.share(mirrored).micro(at, end)
            assert part.global_batch.index.tolist() == whole.index[at:end].tolist()
            assert part.global_batch.target.tolist() == whole.target[at:end].tolist()
            assert torch.equal(part.images, whole.images[part.index - 20])
            found += part.index.tolist()
        assert sorted(found) == whole.index[at:end].tolist()


@pytest.mark.parametrize("count", [1, 50, 101, 360])
def test_a_split_is_scored_in_the_batches_of_one_rank(become: Any, count: int) -> None:
    test = open_data(DataConfig(name="digits", image_size=8)).test.subset(torch.arange(count))
    become(0, 1)
    alone = {tuple(batch.index.tolist()) for batch in test.plain(50)}
    found = []
    for rank in range(3):
        become(rank, 3)
        found += [tuple(batch.index.tolist()) for batch in test.subset(shards.turns(count, 50)[rank]).plain(50)]
    assert len(found) == len(alone)
    assert set(found) == alone


@pytest.mark.parametrize(
    ("images", "over", "says"),
    [
        (64, {"batch_size": 2}, "a batch of 2 images"),
        (65, {"batch_size": 16}, "the last batch of 1 images"),
        (64, {"batch_size": 16, "accumulate": 8}, "a micro-batch of 2 images"),
        (64, {"batch_size": 4, "mixup": 0.2}, "a batch of 4 images"),
    ],
)
def test_a_batch_too_small_for_the_ranks_is_refused(become: Any, images: int, over: dict[str, Any], says: str) -> None:
    become(1, 3)
    with pytest.raises(RecipeError, match=says) as caught:
        checks.check_ranks(images, TrainConfig(**over))
    assert "3 ranks" in caught.value.message
    assert "drop_last" in caught.value.hint
    checks.check_ranks(65, TrainConfig(batch_size=16, drop_last=True))
    checks.check_ranks(65, TrainConfig(batch_size=16, mixup=0.1))  # an odd last batch is dropped when images are mixed


def test_synchronised_norms_are_refused_on_a_cpu(become: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    become(0, 2)
    monkeypatch.setattr(distributed.td, "get_backend_config", lambda: "cpu:gloo")
    with pytest.raises(RecipeError, match=r"train\.sync_bn.*GPUs only"):
        distributed.sync_norms(nn.BatchNorm2d(3))


def test_synchronised_norms_keep_names_and_activations(become: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    net = timm.create_model("test_resnet", num_classes=4).eval()
    pixels, before, names = torch.rand(2, 3, 32, 32), list(net.parameters()), list(net.state_dict())
    out = net(pixels)
    distributed.sync_norms(net)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in net.modules())  # nobody to synchronise with
    become(0, 2)
    monkeypatch.setattr(distributed.td, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    distributed.sync_norms(net)
    norms = [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in norms)
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    assert torch.equal(net.eval()(pixels), out)


# --- alone, nothing changes -------------------------------------------------------------------------------------------


def test_alone_everything_is_handed_back() -> None:
    batch = Batch(torch.rand(2, 3, 4, 4), torch.zeros(2), torch.arange(2), torch.arange(2))
    layer = nn.Linear(2, 2)
    assert distributed.alone()
    assert (
        distributed.rank(),
        distributed.world(),
        distributed.local_ranks(),
        distributed.restarts(),
        distributed.seed_offset(),
    ) == (0, 1, 1, 0, ())
    assert distributed.join(kit.CPU, 1) == kit.CPU
    assert batch.share(False) is batch
    assert batch.global_batch is batch
    assert batch.micro(0, 2) is batch
    assert distributed.data_parallel(layer, True) is layer
    assert distributed.on_rank0(lambda: 3) == distributed.local_rank0_first(lambda: 3) == 3
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.resumable_run() is None
    distributed.remember_run("runs/x")
    distributed.shutdown()


def test_ranks_are_known_by_the_whole_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert distributed.expected_ranks() == 1  # nobody to meet: some clusters set these two for other ends
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert distributed.expected_ranks() == 4
    with pytest.raises(RecipeError, match="--gpus 2: this process is already one of 4 ranks"):
        distributed.join(kit.CPU, 2)
    with pytest.raises(RecipeError, match="several ranks run on cuda or cpu"):
        distributed.join(torch.device("mps"))
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RecipeError, match="rank 1 needs GPU 1 of its machine, which has 0"):
        distributed.join(torch.device("cuda"))


@pytest.mark.parametrize(
    ("asked", "device", "have", "says"),
    [
        (3, None, 0, "has no CUDA devices"),
        (3, "cuda", 2, "has 2 CUDA devices"),
        (1, "cuda", 0, "has no CUDA devices"),
        (2, "cuda:1", 4, "a GPU of its own"),
        (2, "mps", 0, "a GPU of its own"),
    ],
)
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: int, device: str | None, have: int, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: have)
    with pytest.raises(RecipeError, match=says) as caught:
        launch.launch(print, [], asked, device)
    assert caught.value.exit_code == 2
    assert "cpu" in caught.value.hint


def test_one_gpu_needs_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launch.launch(print, [], 1, None)
    launch.launch(print, [], 1, "cpu")
    assert devices.pick("cpu") == kit.CPU


def test_only_the_loss_of_another_rank_is_a_lost_connection() -> None:
    gone = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    assert launch._lost_connection(gone)
    assert launch._lost_connection(distributed.td.DistBackendError("NCCL communicator was aborted"))
    assert not launch._lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not launch._lost_connection(DataError("gloo.jpg does not decode"))
    assert not launch._lost_connection(KeyboardInterrupt())


# --- one and two ranks agree ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every recipe of the kit, trained once by two ranks; what each of them has of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_HOME", str(kit.home()))
        return ranks.in_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.RECIPES)
def test_ranks_agree_with_each_other_to_the_bit(twice: list[dict[str, Any]], name: str) -> None:
    one, other = (SimpleNamespace(**found[name]) for found in twice)
    assert kit.same(one.learners, other.learners)
    assert kit.same(one.method, other.method)
    assert torch.equal(one.answers, other.answers)
    assert one.rows == other.rows
    assert one.own + other.own == 360
    assert abs(one.own - other.own) <= 50
    assert one.noise[0] == other.noise[0]  # a method's noise is the same for all
    assert one.noise[1] != other.noise[1]  # dropout is not


@pytest.mark.parametrize("name", [name for name in ranks.RECIPES if "batch norm" not in name])
def test_two_ranks_end_where_one_does(twice: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    two, one = SimpleNamespace(**twice[0][name]), SimpleNamespace(**ranks.trained(name, tmp_path / "run"))
    ranks.near(two.learners, one.learners)
    ranks.near(two.method, one.method)
    assert one.own == 360
    for row, expected in zip(two.rows, one.rows, strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            near = 100 * 2 / 360 if key.endswith(("top1", "top5")) else 1e-3
            assert math.isclose(value, expected[key], rel_tol=1e-3, abs_tol=near), (key, value, expected[key])


def test_machines_that_hold_other_files_are_told_apart(twice: list[dict[str, Any]]) -> None:
    for found in twice:
        assert found["unlike"].startswith("rank 1 on ")
        assert "has another teacher than rank 0 on" in found["unlike"]


def test_scores_of_two_ranks_are_those_of_one(twice: list[dict[str, Any]]) -> None:
    """Batch norm's running statistics too are one network's: what one rank answers with them, two answered."""
    config = ranks.recipe("batch norm")
    student = kit.classroom(config).student(0)
    student.load_state_dict(twice[0]["batch norm"]["learners"])
    test = open_data(DataConfig(name="digits", image_size=8)).test
    from kdcli.training.evaluate import outputs, score_outputs

    out = outputs(student, test, kit.CPU, 50)
    assert torch.equal(out, twice[0]["batch norm"]["answers"])
    logged = twice[0]["batch norm"]["rows"][-1]
    found = score_outputs(out, test.targets, Classify(10))
    assert (logged["test/top1"], logged["test/top5"]) == (found["top1"], found["top5"])


def test_running_means_are_those_of_the_whole_batch(twice: list[dict[str, Any]], tmp_path: Path) -> None:
    """The rate is zero here, so the first norm sees the same pixels whoever reads them: their mean is the batch's."""
    two, one = twice[0]["batch norm at rest"], ranks.trained("batch norm at rest", tmp_path / "run")
    name = next(key for key in one["learners"] if key.endswith("running_mean"))
    assert one["learners"][name].abs().max() > 0.01
    torch.testing.assert_close(two["learners"][name], one["learners"][name], rtol=1e-5, atol=1e-6)
