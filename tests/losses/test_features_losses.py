"""AT, SP, NST and VID against loops over single numbers."""

import math

import pytest
import torch
from torch import Tensor

from kdcli.losses import features as losses

Map = list[list[list[float]]]  # channels of rows, of one sample


def maps(channels: int, size: tuple[int, int] = (2, 3), batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def flat(sample: Map) -> list[list[float]]:
    return [[value for row in channel for value in row] for channel in sample]


def unit(row: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in row))
    return [value / norm for value in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_at_is_its_definition(p):
    student, mentor = maps(3), maps(5, seed=1)
    total = 0.0
    for s, t in zip(student.tolist(), mentor.tolist(), strict=True):
        attention = []
        for sample in (flat(s), flat(t)):
            mean = [sum(abs(channel[i]) ** p for channel in sample) / len(sample) for i in range(6)]
            attention.append(unit(mean))
        total += sum((a - b) ** 2 for a, b in zip(*attention, strict=True))
    assert losses.attention_loss(student, mentor, p=p).item() == pytest.approx(total / (2 * 6), rel=1e-5)


def test_at_sees_where_and_not_how_much():
    student = maps(3)
    assert losses.attention_loss(student, 7 * student[:, [2, 0, 1]]).item() == pytest.approx(0, abs=1e-12)
    assert losses.attention_loss(student, student.flip(3)) > 1e-3
    known = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # squares 9, 0 and 0, 4: means 4.5 and 2
    torch.testing.assert_close(losses.attention(known), torch.tensor([[4.5, 2.0]]) / math.hypot(4.5, 2.0))


def test_sp_is_its_definition():
    student, mentor = maps(3, batch=4), maps(5, (4, 4), batch=4, seed=1)
    rows = []
    for every in (student.tolist(), mentor.tolist()):
        vectors = [[value for channel in flat(sample) for value in channel] for sample in every]
        rows.append([unit([dot(a, b) for b in vectors]) for a in vectors])
    total = sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(4) for j in range(4))
    assert losses.similarity_loss(student, mentor).item() == pytest.approx(total / 16, rel=1e-4)


def test_sp_sees_only_who_is_like_whom():
    student = maps(3, batch=4)
    turned = student.flatten(1) @ torch.linalg.qr(maps(18, (1, 18), batch=1)[0, :, 0])[0]
    assert losses.similarity_loss(student, 3 * turned).item() == pytest.approx(0, abs=1e-10)
    assert losses.similarity_loss(student, student[[1, 0, 2, 3]]) > 1e-3


@pytest.mark.parametrize("channels", [(3, 4), (7, 9)])  # fewer channels than positions, and more
def test_nst_is_its_definition(channels):
    student, mentor = maps(channels[0]), maps(channels[1], seed=1)
    total = 0.0
    for s, t in zip(student.tolist(), mentor.tolist(), strict=True):
        ours, theirs = ([unit(channel) for channel in flat(sample)] for sample in (s, t))

        def kernel(a: list[list[float]], b: list[list[float]]) -> float:
            return sum(dot(x, y) ** 2 for x in a for y in b) / (len(a) * len(b))

        total += kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)
    assert losses.selectivity_loss(student, mentor).item() == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("channels", [3, 9])
def test_nst_does_not_mind_which_channel_says_it(channels):
    student = maps(channels)
    shuffled = 5 * torch.cat([student, student], 1).flip(1)
    assert losses.selectivity_loss(student, shuffled).item() == pytest.approx(0, abs=1e-6)
    assert losses.selectivity_loss(student, student.flip(3)) > 1e-3


def test_vid_is_its_definition():
    mean, mentor, scale = maps(4), maps(4, seed=1), torch.tensor([-2.0, 0.0, 1.0, 30.0])
    total = 0.0
    for s, t in zip(mean.tolist(), mentor.tolist(), strict=True):
        for c, (a, b) in enumerate(zip(flat(s), flat(t), strict=True)):
            variance = math.log(1 + math.exp(scale[c].item())) + 1e-5
            total += sum(0.5 * ((x - y) ** 2 / variance + math.log(variance)) for x, y in zip(a, b, strict=True))
    variance = losses.channel_variance(scale)
    assert losses.variational_loss(mean, mentor, variance).item() == pytest.approx(total / (2 * 4 * 6), rel=1e-5)


@pytest.mark.parametrize("start", [0.01, 5.0, 500.0])
def test_vids_variance_starts_where_it_is_told(start):
    assert losses.channel_variance(losses.log_scale(start)).item() == pytest.approx(start, rel=1e-4)


def test_vids_start_is_the_papers():
    assert losses.log_scale(5.0, eps=1e-5).item() == pytest.approx(math.log(math.exp(5.0 - 1e-5) - 1))


def test_vid_is_least_at_the_maps_own_spread():
    mean, mentor = torch.zeros(1, 1, 10, 10), 3 * maps(1, (10, 10), batch=1)
    best = mentor.square().mean()
    at = [losses.variational_loss(mean, mentor, share * best[None]).item() for share in (0.9, 1.0, 1.1)]
    assert at[1] < min(at[0], at[2])


ALL = {
    "at": losses.attention_loss,
    "sp": losses.similarity_loss,
    "nst": losses.selectivity_loss,
    "vid": lambda s, t: losses.variational_loss(s, t, torch.full((4,), 5.0)),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_and_huge_maps_give_numbers(name, dtype):
    dead, some, huge = torch.zeros(2, 4, 3, 3), maps(4, (3, 3)), 1e4 * maps(4, (3, 3), seed=3).sign()
    for student in (dead, some, huge, 1e-5 * some):
        for mentor in (dead, some, huge):
            given = student.to(dtype).requires_grad_()
            loss = ALL[name](given, mentor.to(dtype))
            (grad,) = torch.autograd.grad(loss, given)
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)
            assert torch.isfinite(grad).all()
