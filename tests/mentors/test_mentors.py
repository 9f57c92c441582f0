"""Mentors' outputs: a list in float32, the teacher first, the same however they are run."""

import copy

import engine_kit as kit
import pytest
import torch
from torch import Tensor

from kdcli.data import Batch
from kdcli.mentors import frozen
from kdcli.mentors.frozen import Frozen
from kdcli.mentors.mentors import Mentors, worth_compiling
from kdcli.models import checkpoint, registry
from kdcli.models.member import Member


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def members() -> list[Member]:
    return kit.classroom(kit.recipe("classroom")).mentors


def stacked(mentors: Mentors, some: Batch) -> Tensor:
    """All mentors' logits [M, B, K]."""
    return torch.stack([output.out for output in mentors.answer(some).outputs])


def batch(n: int = 24) -> Batch:
    return next(kit.classroom(kit.recipe()).data.test.plain(n))


def test_outputs_are_a_list_the_teacher_first() -> None:
    mentors, some = Mentors(members(), "fp32", kit.CPU), batch()
    found = mentors.answer(some)
    assert found.unfused is None
    assert [output.out.shape for output in found.outputs] == [(24, 10)] * 2
    assert {output.out.dtype for output in found.outputs} == {torch.float32}
    assert [member.name for member in mentors.members] == ["cifar_resnet14", "cifar_resnet8"]
    with torch.no_grad():
        for output, member in zip(found.outputs, mentors.members, strict=True):
            torch.testing.assert_close(output.out, member(some.images))


def test_answers_may_be_part_of_a_loss() -> None:
    """They were computed in inference mode, whose tensors no backward pass may keep: the outputs must be copies."""
    for output in Mentors(members(), "fp32", kit.CPU).answer(batch()).outputs:
        assert not output.out.is_inference()
        assert not output.out.requires_grad
    x = torch.ones((), requires_grad=True)
    (x * output.out).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad)


def test_bf16_mentors_answer_almost_alike_and_in_channels_last() -> None:
    some = batch(48)
    plain, quick = Mentors(members(), "fp32", kit.CPU), Mentors(members(), "bf16", kit.CPU)
    a, b = stacked(plain, some), stacked(quick, some)
    assert b.dtype == torch.float32
    scale = a.std(-1, keepdim=True)
    assert float(((a - b).abs() / scale).max()) < 0.2
    assert float(((a - b).abs() / scale).mean()) < 0.03
    assert float((a.argmax(-1) == b.argmax(-1)).float().mean()) > 0.9
    for one in quick.frozen:
        weights = [p for p in one.net.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
        assert {p.dtype for p in one.net.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in one.member.net.parameters()} == {torch.float32}  # the mentor itself is left as it was
        assert one.member.mean_.dtype == torch.float32  # images are normalised before anything is rounded


def test_mentors_are_frozen_and_in_eval_mode_whatever_they_were() -> None:
    awake = [member.train().requires_grad_(True) for member in members()]
    before = [checkpoint.digest(member.net) for member in awake]  # running statistics too
    Mentors(awake, "fp32", kit.CPU).answer(batch())
    assert not any(module.training for member in awake for module in member.modules())
    assert not any(p.requires_grad for member in awake for p in member.parameters())
    assert [checkpoint.digest(member.net) for member in awake] == before


def test_a_classroom_without_mentors_answers_nothing() -> None:
    assert Mentors([], "bf16", kit.CPU).answer(batch()).outputs == []


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 23])
def test_workers_that_share_a_batch_answer_as_one_does(workers: int, n: int) -> None:
    some, threads = batch(n), torch.get_num_threads()
    one = stacked(Mentors(members(), "fp32", kit.CPU, workers=1), some)
    shared = stacked(Mentors(members(), "fp32", kit.CPU, workers=workers), some)
    assert shared.shape == (2, n, 10)
    torch.testing.assert_close(shared, one, rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == threads  # a worker sets the number of threads for itself alone


def test_a_mentors_failure_in_a_worker_is_raised() -> None:
    mentors = Mentors(members(), "fp32", kit.CPU, workers=2)
    mentors.frozen[0].net.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mentors.answer(batch(4))


# --- made quick -------------------------------------------------------------------------------------------------------


def network(arch: str, size: int) -> Member:
    """A network of ten classes whose norms are not at rest."""
    name = registry.resolve(arch)
    torch.manual_seed(0)
    net = registry.create(name, 10).module
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    rgb = (0.5, 0.4, 0.3)
    return Member(net, name, mean=rgb, std=rgb, input_size=(size, size), interpolation="bilinear", num_classes=10)


def norms(net: torch.nn.Module) -> int:
    return sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())


FAMILIES = {  # network, size, batch norms that no convolution comes before
    "zoo:cifar_resnet8": (32, 0),
    "zoo:cifar_shufflenetv1": (32, 0),
    "zoo:cifar_wrn_16_1": (32, 7),  # pre-activation: a norm comes first
    "timm:mobilenetv3_small_050": (64, 0),  # timm's norm and activation in one
    "timm:regnetx_002": (64, 0),
    "timm:vit_tiny_patch16_224": (224, 0),  # has none
    "torchvision:shufflenet_v2_x0_5": (64, 0),
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_folded_networks_answer_as_the_eager_ones(arch: str) -> None:
    size, left = FAMILIES[arch]
    member = network(arch, size)
    before = checkpoint.digest(member.net)
    images = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(1))
    quick = Frozen(member, "fp32", kit.CPU)
    assert norms(quick.net) == left
    assert quick.folded
    with torch.no_grad():
        reference = member(images)
    torch.testing.assert_close(quick(images).out, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert checkpoint.digest(member.net) == before


def test_a_network_that_cannot_be_followed_is_taken_as_it_is() -> None:
    class Moody(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if float(x.sum()) < 1e9 else x

    member = network("zoo:cifar_resnet8", 32)
    member.net = Moody(member.net)
    quick = Frozen(member, "fp32", kit.CPU)
    assert not quick.folded
    images = torch.rand(6, 3, 32, 32)
    torch.testing.assert_close(quick(images).out, member(images), rtol=1e-4, atol=1e-4)


def test_a_fold_that_changes_the_answer_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(net: torch.nn.Module) -> torch.nn.Module:
        net = copy.deepcopy(net)
        net.fc.bias.data += 1e3  # pyright: ignore
        return net

    monkeypatch.setattr(frozen, "_folded", wrong)
    assert not Frozen(network("zoo:cifar_resnet8", 32), "fp32", kit.CPU).folded


def test_a_class_map_is_kept() -> None:
    member = network("zoo:cifar_resnet8", 32)
    member.class_index = torch.tensor([3, 0, 7])
    images = torch.rand(6, 3, 32, 32)
    found = Frozen(member, "fp32", kit.CPU)(images).out
    assert found.shape == (6, 3)
    torch.testing.assert_close(found, member(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_mentors_answer_as_the_eager_ones() -> None:
    """At their one batch size and at others, from several threads."""
    two = members()
    mentors = Mentors(two, "fp32", kit.CPU, workers=2)
    reference = stacked(mentors, batch(24))
    assert mentors.compile(24, [two[0].name]) == {}
    assert mentors.frozen[0].compiled is not None
    assert mentors.frozen[1].compiled is None
    for _ in range(3):
        torch.testing.assert_close(stacked(mentors, batch(24)), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stacked(mentors, batch(7)), reference[:, :7], rtol=1e-4, atol=1e-4)


def test_a_mentor_that_cannot_be_compiled_says_why_and_answers_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", none_here)
    two = members()
    mentors = Mentors(two, "fp32", kit.CPU, workers=2)
    reasons = mentors.compile(24, [member.name for member in two])
    assert reasons == {member.name: "No working C++ compiler found" for member in two}
    assert len(mentors.answer(batch(24)).outputs) == 2


def test_only_much_work_is_worth_compiling() -> None:
    two = members()
    adds = {member.name: member.count()[1] for member in two}
    assert worth_compiling(two, 1000) == []
    between = int(1e14 / max(adds.values())) + 1
    assert worth_compiling(two, between) == [max(adds, key=lambda name: adds[name])]
    assert worth_compiling(two, 10**10) == [member.name for member in two]


# --- ahead ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [2, 3, 7])
@pytest.mark.parametrize("workers", [1, 2])
def test_answers_ahead_are_those_of_one_batch_after_another(ahead: int, workers: int) -> None:
    two = members()
    some = list(
        kit.classroom(kit.recipe()).data.test.subset(torch.arange(83)).plain(16)
    )  # five batches and a short one
    one = list(Mentors(two, "fp32", kit.CPU, workers=1).answer_ahead(some))
    ahead_of = list(Mentors(two, "fp32", kit.CPU, workers=workers, ahead=ahead).answer_ahead(some))
    assert [len(b) for b, _ in ahead_of] == [16] * 5 + [3]
    for (batch_a, a), (batch_b, b) in zip(one, ahead_of, strict=True):
        assert batch_a is batch_b
        for x, y in zip(a.outputs, b.outputs, strict=True):
            torch.testing.assert_close(y.out, x.out, rtol=1e-5, atol=1e-5)


def test_no_more_batches_are_drawn_than_are_answered() -> None:
    drawn = []

    def batches():
        for n, one in enumerate(kit.classroom(kit.recipe()).data.test.plain(16)):
            drawn.append(n)
            yield one

    following = Mentors(members(), "fp32", kit.CPU, ahead=3).answer_ahead(batches())
    next(following)
    assert drawn == [0, 1, 2]
    alone = Mentors([], "fp32", kit.CPU, ahead=1).answer_ahead(batches())
    assert next(alone)[1].outputs == []
    assert drawn == [0, 1, 2, 0]


def test_looking_ahead_goes_as_far_as_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    some = list(kit.classroom(kit.recipe()).data.test.plain(16))[:16]
    mentors = Mentors(members(), "fp32", kit.CPU)
    for seconds, expected in [
        ({1: 1.0, 2: 1.1}, 1),  # a CPU
        ({1: 1.0, 2: 0.97}, 1),  # within the noise
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.5}, 4),
        ({1: 1.0, 2: 0.6, 4: 0.5, 8: 0.4, 16: 0.3}, 16),
    ]:
        monkeypatch.setattr(mentors, "_seconds", lambda batches, seconds=seconds: seconds[len(batches)])
        assert mentors.measure_ahead(some) == expected
    monkeypatch.undo()
    assert mentors._seconds(some[:2]) > 0
