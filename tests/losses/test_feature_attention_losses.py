"""Attention over stages and over positions, against loops."""

import math

import pytest
import torch

from kdcli.losses.feature_attention import semckd_loss, similarity, spatial_matching, stage_attention


def softmax(row):
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [power / sum(powers) for power in powers]


def test_similarity_is_the_gram_matrix():
    x = torch.randn(3, 2, 2, 1, generator=torch.Generator().manual_seed(0))
    wanted = [
        [sum(a * b for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)) for q in x] for p in x
    ]
    torch.testing.assert_close(similarity(x), torch.tensor(wanted))


@pytest.mark.parametrize("soft", [1.0, 0.3])
def test_stage_attention_by_hand(soft):
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 3, 4, generator=generator), torch.randn(3, 3, 4, generator=generator)
    got = stage_attention(query, key, soft=soft)
    assert got.shape == (3, 2, 3)
    for b in range(3):
        for s in range(2):
            scores = [sum(query[s, b, d].item() * key[t, b, d].item() for d in range(4)) / soft for t in range(3)]
            assert got[b, s].tolist() == pytest.approx(softmax(scores), rel=1e-4)


def test_semckd_by_hand():
    generator = torch.Generator().manual_seed(2)
    attention, distance = torch.rand(3, 2, 4, generator=generator), torch.rand(3, 2, 4, generator=generator)
    total = sum(
        attention[b, s, t].item() * distance[b, s, t].item() for b in range(3) for s in range(2) for t in range(4)
    )
    assert semckd_loss(attention, distance).item() == pytest.approx(total / (3 * 2), rel=1e-5)


@pytest.mark.parametrize("form", ["official", "transposed"])
def test_spatial_matching_by_hand(form):
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 3, 2, 2, generator=generator)
    got = spatial_matching(query, key, value, form=form)
    for b in range(2):
        q, k, v = (x[b].flatten(1).T.tolist() for x in (query, key, value))  # position by position
        score = [[sum(a * c for a, c in zip(q[i], k[j], strict=True)) for j in range(4)] for i in range(4)]
        for place in range(4):
            if form == "official":  # place is the student's: shares of the teacher's positions
                share = softmax(score[place])
            else:  # place is the teacher's: shares of the student's positions
                share = softmax([score[i][place] for i in range(4)])
            wanted = [sum(share[n] * v[n][c] for n in range(4)) for c in range(3)]
            assert got[b, :, place // 2, place % 2].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_spatial_matching_finds_what_moved():
    """Where queries point at their own places, transposed matching gives the teacher's map back, wherever it went."""
    value = 9 * torch.eye(4).reshape(1, 4, 2, 2)
    moved = value.flip(3)
    torch.testing.assert_close(spatial_matching(value, moved, value, form="transposed"), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["official", "transposed"])
def test_large_features_stay_finite(form):
    query = (1e4 * torch.randn(2, 3, 2, 2)).requires_grad_()
    out = spatial_matching(query, 1e4 * torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), form=form)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
