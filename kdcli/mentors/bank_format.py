"""How a mentor's answer to one view lies in a bank: a fixed number of 16-bit words, and a checksum over them."""

import torch
from jaxtyping import Bool, Float, Int, Int16, Int32
from torch import Tensor

from kdcli.data.views import hashed

HALF = 65504.0  # the largest float16
MOST_CLASSES = 2**16  # that a number of 16 bits can tell apart
FLOATS = 3  # a short record's float32 values, two words each
TRUST = 2**-10  # a smaller share of probability is not known to enough digits to scale other classes by


class Record:
    """One answer in `words` 16-bit words, the pooled vector (`width` numbers, float16) after the logits.

    Whole (`top` None): the `classes` logits in float16. Short: log-sum-exp, log-probability of all other classes
    together and of the true class in float32, then log-probability (float16) and number (16 bits) of the `top` most
    probable classes. What a short record gives back is the answer with those other classes made equal.
    """

    def __init__(self, classes: int, top: int | None = None, width: int = 0) -> None:
        self.classes, self.top, self.width = classes, top, width
        own = classes if top is None else 2 * FLOATS + 2 * top
        self.pooled_at = own + own % 2
        self.words = self.pooled_at + width + width % 2  # even: the checksum reads them in pairs
        self._weights: dict[torch.device, Tensor] = {}

    def pack(
        self, out: Float[Tensor, "n K"], pooled: Float[Tensor, "n D"] | None, target: Int[Tensor, " n"]
    ) -> Int16[Tensor, "n W"]:
        """Records of logits, pooled vectors (None unless `width`) and true classes, on the device they are on."""
        out = out.float()
        own = _halves(out) if self.top is None else self._short(out, target, self.top)
        parts = [own, own.new_zeros(len(own), self.pooled_at - own.shape[1])]
        if self.width:
            assert pooled is not None
            parts += [_halves(pooled.float()), own.new_zeros(len(own), self.width % 2)]
        return torch.cat(parts, 1)

    def _short(self, out: Tensor, target: Tensor, top: int) -> Int16[Tensor, "n w"]:
        log_p, true = out.log_softmax(-1), target[:, None]
        values, classes = log_p.topk(top)
        known = torch.zeros_like(out, dtype=torch.bool).scatter_(1, classes, True).scatter_(1, true, True)
        rest = log_p.masked_fill(known, -torch.inf).logsumexp(-1).clamp(min=-HALF)
        floats = torch.stack([out.logsumexp(-1), rest, log_p.gather(1, true)[:, 0]], 1)
        return torch.cat([floats.view(torch.int16), _halves(values), classes.to(torch.int16)], 1)

    def unpack(
        self, records: Int16[Tensor, "n W"], target: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n D"] | None]:
        """Float32 logits and pooled vectors: finite, the same for the same record, wherever and whenever read."""
        if self.top is None:
            out = records[:, : self.classes].view(torch.float16).float()
        else:
            out = self._lengthened(records, target)
        if not self.width:
            return out, None
        return out, records[:, self.pooled_at : self.pooled_at + self.width].view(torch.float16).float()

    def _lengthened(self, records: Tensor, target: Tensor) -> Float[Tensor, "n K"]:
        total, rest, true, values, classes = self._parts(records)
        at, true = target[:, None], true[:, None]
        known = torch.zeros(len(records), self.classes, dtype=torch.bool, device=records.device)
        known.scatter_(1, classes, True).scatter_(1, at, True)
        others = (~known).sum(-1).clamp(min=1)
        log_p = (rest - others.log())[:, None].repeat(1, self.classes)
        log_p.scatter_(1, classes, values).scatter_(1, at, true)
        # rounding made the listed classes a little more or less probable: together all but the true one have 1 - p
        share = -true.expm1()
        all_others = log_p.scatter(1, at, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = log_p + torch.where(share > TRUST, share.clamp(min=TRUST).log() - all_others, 0.0)
        return log_p.scatter(1, at, true) + total[:, None]

    def _parts(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A short record's log-sum-exp, the others' and the true class's log-probability, and the listed classes."""
        assert self.top is not None
        start = 2 * FLOATS
        total, rest, true = records[:, :start].contiguous().view(torch.float32).unbind(-1)
        values = records[:, start : start + self.top].view(torch.float16).float()
        return total, rest, true, values, records[:, start + self.top : start + 2 * self.top].long() & 0xFFFF

    def alike(self, records: Int16[Tensor, "n W"], out: Float[Tensor, "n K"], share: float) -> Bool[Tensor, " n"]:
        """Whether records may be of these live logits: as near as rounding to float16 and a difference of `share` of
        the logits' spread over classes allow."""
        if self.top is None:
            said, live = records[:, : self.classes].view(torch.float16).float(), out
        else:  # only what a record says outright: the classes it does not list need not be the same
            _, _, _, said, classes = self._parts(records)
            live = out.log_softmax(-1).gather(1, classes)
        off = (said - live).square().mean(-1).sqrt()
        return off <= share * out.std(-1) + 2**-10 * live.abs().amax(-1) + 1e-6

    def sound(self, records: Int16[Tensor, "n W"]) -> Bool[Tensor, " n"]:
        """Which records hold numbers that fitted: a float16 at its limit was larger before it was rounded."""
        if self.top is None:
            sound = _fits(records[:, : self.classes])
        else:
            sound = torch.stack(self._parts(records)[:3], 1).isfinite().all(-1)
        return sound & _fits(records[:, self.pooled_at : self.pooled_at + self.width]) if self.width else sound

    def checksum(self, records: Int16[Tensor, "n W"], rows: Int[Tensor, " n"]) -> Int32[Tensor, " n"]:
        """32 bits of each record and of its place, never 0; one change or move in 2^32 goes unseen.

        Multiply-shift hashing with 64-bit weights (Dietzfelbinger, STACS 1996).
        """
        here = records.device
        if here not in self._weights:
            self._weights[here] = hashed(self.words, torch.arange(self.words // 2 + 1, device=here)) * 2 + 1
        weights = self._weights[here]
        total = (records.contiguous().view(torch.int32) * weights[1:]).sum(-1) + rows.to(here) * weights[0]
        check = (total >> 32).to(torch.int32)
        return check.masked_fill(check == 0, 1)


def _halves(x: Tensor) -> Int16[Tensor, "n w"]:
    return x.clamp(-HALF, HALF).half().view(torch.int16)


def _fits(words: Tensor) -> Bool[Tensor, " n"]:
    return (words.view(torch.float16).float().abs() < HALF).all(-1)  # not a number is not smaller either
