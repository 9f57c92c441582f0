"""Records: what goes in comes out rounded to float16, and no change goes unseen."""

import math
import random

import pytest
import torch
from torch import Tensor

from kdcli.data.views import hashed
from kdcli.mentors.bank_format import HALF, Record


def logits(n: int = 20, k: int = 12, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "d"), [(1, 0), (2, 0), (7, 0), (10, 5), (11, 8), (100, 64)])
def test_a_record_gives_back_the_float16_of_what_it_was_given(k: int, d: int) -> None:
    out = logits(k=k)
    pooled = torch.rand(20, d) if d else None
    record = Record(k, d)
    packed = record.pack(out, pooled)
    assert packed.shape == (20, record.words)
    assert packed.dtype == torch.int16
    assert record.words % 2 == 0
    assert record.words <= k + d + 2
    back, features = record.unpack(packed)
    assert back.equal(out.half().float())
    assert back.dtype == torch.float32
    assert (features is None) == (pooled is None)
    if features is not None and pooled is not None:
        assert features.equal(pooled.half().float())
    assert record.pack(back, features).equal(packed)  # rounding twice is rounding once


def test_a_hundred_classes_take_two_bytes_each() -> None:
    assert 2 * Record(100).words == 200


EXTREME = {
    "huge": torch.tensor([1e4, -1e4, 0.0, 5.0]),
    "tied": torch.tensor([1e4, 1e4, 1e4, 1e4]),
    "flat": torch.zeros(4),
    "low": torch.full((4,), -1e4),
    "sure": torch.tensor([40.0, 0.0, 0.0, 0.0]),
    "tiny": torch.tensor([1e-9, 0.0, -1e-9, 0.0]),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_stay_finite_and_keep_their_probabilities(name: str) -> None:
    out, record = EXTREME[name][None], Record(4)
    packed = record.pack(out)
    assert record.in_range(packed).all()
    back, _ = record.unpack(packed)
    assert back.isfinite().all()
    assert (out.softmax(-1) - back.softmax(-1)).abs().max() < 2e-3
    assert (out.sigmoid() - back.sigmoid()).abs().max() < 2e-3


@pytest.mark.parametrize("bad", [HALF, 7e4, -7e4, math.inf, -math.inf, math.nan])
def test_numbers_beyond_float16_are_out_of_range(bad: float) -> None:
    out, record = logits(n=3, k=4), Record(4)
    out[1, 2] = bad
    assert record.in_range(record.pack(out)).tolist() == [True, False, True]
    with_pooled, pooled = Record(4, 3), torch.zeros(3, 3)
    pooled[2, 0] = bad
    assert with_pooled.in_range(with_pooled.pack(logits(3, 4), pooled)).tolist() == [True, True, False]


@pytest.mark.parametrize("k", [1, 2, 20])
def test_records_match_their_logits_and_no_others(k: int) -> None:
    out, record = logits(n=50, k=k), Record(k)
    packed = record.pack(out)
    assert record.matches(packed, out, 0.0).all()  # rounding alone
    near = 0.01 * out.abs() if k == 1 else 0.01 * torch.randn_like(out)
    assert record.matches(packed, out + near, 0.02 if k != 2 else 0.1).float().mean() > 0.9
    assert record.matches(packed, out * 1.2, 0.02).float().mean() < 0.2
    if k == 20:
        assert record.matches(packed, out + near, 0.02).all()
        assert not record.matches(packed, out.roll(1, 0), 0.02).any()
        assert not record.matches(packed, out.roll(1, 1), 0.25).any()


# --- checksums --------------------------------------------------------------------------------------------------------


def test_a_checksum_is_multiply_shift_over_unbounded_integers() -> None:
    record = Record(6)
    packed, rows = record.pack(logits(n=5, k=6)), torch.tensor([0, 1, 2, 10**9, 2**40])
    weights = [(2 * int(hashed(record.words, torch.tensor(n))) + 1) % 2**64 for n in range(4)]
    checks = record.checksum(packed, rows).tolist()
    for words, row, check in zip(packed.view(torch.int32).tolist(), rows.tolist(), checks, strict=True):
        total = row * weights[0] + sum(x * w for x, w in zip(words, weights[1:], strict=True))
        assert check % 2**32 == (total % 2**64 >> 32 or 1)


def test_every_flipped_bit_and_every_move_is_seen() -> None:
    record = Record(9, 4)
    packed = record.pack(logits(n=1, k=9), torch.rand(1, 4))
    row = torch.tensor([123])
    good = record.checksum(packed, row)
    for word in range(record.words):
        for bit in range(16):
            changed = packed.clone()
            changed[0, word] ^= 1 << bit if bit < 15 else -(2**15)
            assert int(record.checksum(changed, row)) != int(good), (word, bit)
    rows = torch.arange(10_000)
    elsewhere = record.checksum(packed.expand(10_000, -1), rows)
    assert (elsewhere == good).nonzero().flatten().tolist() == [123]


def test_random_damage_is_always_seen() -> None:
    rng = random.Random(0)
    record, row = Record(100), torch.tensor([7])
    packed = record.pack(logits(n=1, k=100))
    good = int(record.checksum(packed, row))
    raw = bytes(packed.numpy().tobytes())
    for _ in range(3000):
        damaged, n = bytearray(raw), rng.choice([1, 2, 3, 16, 100, 200])
        start = rng.randrange(len(raw) - n + 1)
        kind = rng.randrange(3)
        damaged[start : start + n] = bytes(n) if kind == 0 else b"\xff" * n if kind == 1 else rng.randbytes(n)
        if bytes(damaged) != raw:
            again = torch.frombuffer(damaged, dtype=torch.int16).view(1, -1)
            assert int(record.checksum(again, row)) != good


def test_a_checksum_is_never_0() -> None:
    packed = torch.zeros(100_000, Record(2).words, dtype=torch.int16)
    assert (Record(2).checksum(packed, torch.arange(100_000)) != 0).all()
    assert int(Record(2).checksum(packed[:1], torch.tensor([0]))) == 1  # all zeros at row 0 would give 0
