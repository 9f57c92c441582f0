"""Records: what goes in comes out rounded, short ones keep what they promise, and no change goes unseen."""

import math
import random

import pytest
import torch
from torch import Tensor

from kdcli.data.views import hashed
from kdcli.mentors.bank_format import HALF, Record


def logits(n: int = 20, k: int = 12, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, k, generator=generator), torch.randint(k, (n,), generator=generator)


@pytest.mark.parametrize(("k", "d"), [(2, 0), (7, 0), (10, 5), (11, 8), (100, 64)])
def test_a_whole_record_gives_back_the_float16_of_what_it_was_given(k: int, d: int) -> None:
    out, target = logits(k=k)
    pooled = torch.rand(20, d) if d else None
    record = Record(k, None, d)
    packed = record.pack(out, pooled, target)
    assert packed.shape == (20, record.words)
    assert record.words % 2 == 0
    assert record.words <= k + d + 2
    back, features = record.unpack(packed, target)
    assert back.equal(out.half().float())
    assert back.dtype == torch.float32
    assert (features is None) == (pooled is None)
    if features is not None and pooled is not None:
        assert features.equal(pooled.half().float())
    assert record.pack(back, features, target).equal(packed)  # rounding twice is rounding once


def independent(out: list[float], true: int, top: int) -> tuple[list[float], float]:
    """A short record's answer worked out by hand in float64: log-probabilities, and the log-sum-exp."""
    total = max(out) + math.log(sum(math.exp(x - max(out)) for x in out))
    log_p = [x - total for x in out]
    listed = sorted(range(len(out)), key=lambda c: -log_p[c])[:top]
    others = [c for c in range(len(out)) if c not in listed and c != true]
    rest = sum(math.exp(log_p[c]) for c in others)
    return [math.log(rest / len(others)) if c in others else log_p[c] for c in range(len(out))], total


@pytest.mark.parametrize("top", [1, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_a_short_record_is_what_an_independent_computation_says(top: int, scale: float) -> None:
    out, target = logits(n=40, k=30, scale=scale)
    record = Record(30, top)
    back, _ = record.unpack(record.pack(out, None, target), target)
    for row in range(40):
        expected, total = independent(out[row].tolist(), int(target[row]), top)
        found = back[row].double() - total
        assert float(back[row].double().logsumexp(0)) == pytest.approx(total, abs=2e-5 * max(1, abs(total)))
        for c in range(30):
            # float16 keeps 11 bits; all classes but the true one may then move together, to sum to one
            assert float(found[c]) == pytest.approx(expected[c], abs=2e-3 + 2**-9 * abs(expected[c]))
        true = int(target[row])
        assert float(found[true]) == pytest.approx(expected[true], abs=1e-5 + 1e-6 * abs(total))


def test_a_short_record_is_small() -> None:
    assert 2 * Record(1000, 8).words == 44
    assert 2 * Record(100).words == 200


@pytest.mark.parametrize("k", [2, 9, 40_000, 65_536])
def test_class_numbers_of_sixteen_bits_come_back(k: int) -> None:
    out = torch.zeros(3, k)
    out[0, k - 1] = out[1, 0] = out[2, k // 2] = 30
    target = torch.tensor([0, k - 1, 1])
    back, _ = Record(k, 1).unpack(Record(k, 1).pack(out, None, target), target)
    assert back.argmax(1).tolist() == [k - 1, 0, k // 2]


EXTREME = {
    "huge": torch.tensor([1e4, -1e4, 0.0, 5.0]),
    "tied": torch.tensor([1e4, 1e4, 1e4, 1e4]),
    "flat": torch.zeros(4),
    "low": torch.full((4,), -1e4),
    "sure": torch.tensor([40.0, 0.0, 0.0, 0.0]),
    "tiny": torch.tensor([1e-9, 0.0, -1e-9, 0.0]),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("top", [None, 1, 3])
@pytest.mark.parametrize("true", range(4))
def test_extreme_answers_stay_finite_and_keep_their_winner(name: str, top: int | None, true: int) -> None:
    out, target = EXTREME[name][None], torch.tensor([true])
    record = Record(4, top)
    packed = record.pack(out, None, target)
    assert record.sound(packed).all()
    back, _ = record.unpack(packed, target)
    assert back.isfinite().all()
    p, q = out.softmax(-1), back.softmax(-1)
    assert float((p - q)[0, true].abs()) < 2e-3
    assert float(q.max()) == pytest.approx(float(p.max()), abs=2e-3)


@pytest.mark.parametrize("bad", [HALF, 7e4, -7e4, math.inf, math.nan])
def test_numbers_that_do_not_fit_are_unsound(bad: float) -> None:
    out, target = logits(n=3, k=4)
    record = Record(4)
    out[1, 2] = bad
    assert record.sound(record.pack(out, None, target)).tolist() == [True, False, True]
    with_pooled, pooled = Record(4, None, 3), torch.zeros(3, 3)
    pooled[2, 0] = bad
    assert with_pooled.sound(with_pooled.pack(logits(3, 4)[0], pooled, target)).tolist() == [True, True, False]
    if not math.isfinite(bad):
        short = Record(4, 2)
        assert short.sound(short.pack(out, None, target)).tolist() == [True, False, True]


@pytest.mark.parametrize("top", [None, 3])
def test_records_are_told_from_those_of_other_answers(top: int | None) -> None:
    out, target = logits(n=50, k=20)
    record = Record(20, top)
    packed = record.pack(out, None, target)
    assert record.alike(packed, out, 0.0).all()  # rounding alone
    assert record.alike(packed, out + 0.01 * torch.randn_like(out), 0.02).all()
    assert not record.alike(packed, out.roll(1, 0), 0.02).any()
    assert not record.alike(packed, out.roll(1, 1), 0.25).any()
    assert record.alike(packed, out * 1.2, 0.02).float().mean() < 0.2


# --- checksums --------------------------------------------------------------------------------------------------------


def test_a_checksum_is_multiply_shift_over_unbounded_integers() -> None:
    out, target = logits(n=5, k=6)
    record = Record(6)
    packed, rows = record.pack(out, None, target), torch.tensor([0, 1, 2, 10**9, 2**40])
    weights = [(2 * int(hashed(record.words, torch.tensor(n))) + 1) % 2**64 for n in range(4)]
    checks = record.checksum(packed, rows).tolist()
    for words, row, check in zip(packed.view(torch.int32).tolist(), rows.tolist(), checks, strict=True):
        total = row * weights[0] + sum(x * w for x, w in zip(words, weights[1:], strict=True))
        assert check % 2**32 == (total % 2**64 >> 32 or 1)


def test_every_flipped_bit_and_every_move_is_seen() -> None:
    out, target = logits(n=1, k=9)
    record = Record(9, None, 4)
    packed = record.pack(out, torch.rand(1, 4), target)
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
    out, target = logits(n=1, k=100)
    record, row = Record(100), torch.tensor([7])
    packed = record.pack(out, None, target)
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


def test_a_checksum_is_never_nought() -> None:
    packed = torch.zeros(100_000, Record(2).words, dtype=torch.int16)
    assert (Record(2).checksum(packed, torch.arange(100_000)) != 0).all()
    assert int(Record(2).checksum(packed[:1], torch.tensor([0]))) == 1  # all zeros at row 0 would have been nought
