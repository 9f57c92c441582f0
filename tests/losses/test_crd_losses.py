"""CRD's loss, its negatives and its memories against loops over single numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.losses import crd as losses

N, K = 9, 4


def units(rows: int, dims: int = 3, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_part_is_its_definition():
    x, memory = units(2), units(N, seed=1)
    rows = torch.tensor([[0, 3, 8, 3, 7], [5, 1, 2, 0, 8]])
    raw = [[math.exp(sum(a * b for a, b in zip(x[i].tolist(), memory[r].tolist(), strict=True)) / 0.07) for r in row]
           for i, row in enumerate(rows.tolist())]  # fmt: skip
    z = sum(map(sum, raw)) / 10 * N
    pn, total = 1 / N, 0.0
    for pos, *negatives in raw:
        total -= math.log(pos / z / (pos / z + K * pn + 1e-7))
        total -= sum(math.log(K * pn / (neg / z + K * pn + 1e-7)) for neg in negatives)
    scores = losses.log_scores(x, memory, rows, temperature=0.07)
    log_z = losses.log_normaliser(scores, nce_k=K, n_data=N)
    assert log_z.item() == pytest.approx(math.log(z), rel=1e-5)
    assert losses.contrast(scores - log_z, nce_k=K, n_data=N).item() == pytest.approx(total / 2, rel=1e-5)


def test_a_part_wants_the_positive_near_and_the_negatives_far():
    scores = torch.zeros(2, 1 + K, requires_grad=True)
    (grad,) = torch.autograd.grad(losses.contrast(scores, nce_k=K, n_data=N), scores)
    assert (grad[:, 0] < 0).all()
    assert (grad[:, 1:] > 0).all()


@pytest.mark.parametrize("temperature", [0.07, 1e-3])
def test_extreme_scores_give_numbers(temperature):
    x = torch.stack([units(1)[0], -units(1)[0]]).requires_grad_()
    memory = torch.cat([units(1), -units(1), units(N - 2, seed=1)])
    rows = torch.tensor([[1, 0, 3, 3, 0], [0, 1, 3, 4, 5]])  # the positive opposite, a negative in place
    scores = losses.log_scores(x, memory, rows, temperature=temperature)
    loss = losses.contrast(scores - losses.log_normaliser(scores, nce_k=K, n_data=N), nce_k=K, n_data=N)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_fewer_rows_may_count_for_all_negatives():
    x, memory = units(2), units(N, seed=1)
    rows = torch.tensor([[0, 3, 8], [5, 1, 2]])
    repeated = torch.cat([rows, rows[:, 1:], rows[:, 1:]], 1)  # each negative three times
    values = []
    for some in (rows, repeated):
        scores = losses.log_scores(x, memory, some, temperature=0.5)
        log_z = losses.log_normaliser(scores, nce_k=6, n_data=N)
        values.append(torch.stack([log_z, losses.contrast(scores - log_z, nce_k=6, n_data=N)]))
    torch.testing.assert_close(*values)


def test_remembered_rows():
    old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = losses.remembered(old, new, momentum=0.75)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25]]) / math.hypot(0.75, 0.25))
    torch.testing.assert_close(losses.remembered(old, new, momentum=0.0), new)


FIRST, COUNT = torch.tensor([0, 3, 4]), torch.tensor([3, 1, 5])  # rows of three classes among nine


def drawn(k: int, seed: int = 0, times: int = 1) -> Tensor:
    """[times, 3, k]: of a sample of each class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [losses.draw_negatives(FIRST, COUNT, n_data=N, draws=k, generator=generator) for _ in range(times)]
    )


@pytest.mark.parametrize("k", [1, 3, 4, 100])
def test_negatives_are_of_other_classes(k):
    rows = drawn(k, times=50)
    assert rows.shape == (50, 3, k)
    assert rows.min() >= 0
    assert rows.max() < N
    own = (rows >= FIRST[:, None]) & (rows < (FIRST + COUNT)[:, None])
    assert not own.any()


def test_no_negative_comes_twice_while_there_are_others():
    for sample in drawn(4, times=50).flatten(0, 1).tolist():  # 4 is as many as the last class has
        assert len(set(sample)) == 4


def test_where_more_are_asked_for_they_repeat_evenly():
    for per_class, others in zip(drawn(20, times=10).transpose(0, 1), (6, 8, 4), strict=True):
        for sample in per_class:
            counts = torch.bincount(sample, minlength=N)
            assert set(counts[counts > 0].tolist()) <= {20 // others, -(-20 // others)}
            assert (counts > 0).sum() == others


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_every_other_row_is_as_likely(k):
    times = 4000
    for rows, others in zip(drawn(k, times=times).transpose(0, 1), (6, 8, 4), strict=True):
        share = torch.bincount(rows.flatten(), minlength=N) / times
        share = share[share > 0]
        assert len(share) == others
        assert (share - k / others).abs().max() < 5 * math.sqrt(k / others / times)


def test_negatives_are_a_function_of_the_generator():
    assert torch.equal(drawn(3, seed=1), drawn(3, seed=1))
    assert not torch.equal(drawn(3, seed=1, times=5), drawn(3, seed=2, times=5))
