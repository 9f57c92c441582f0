"""How a bank stores a mentor's output for one view: a record of 16-bit words, and a checksum of it."""

import torch
from jaxtyping import Bool, Float, Int, Int16, Int32
from torch import Tensor

from kdcli.data.views import hashed

HALF = 65504.0  # the largest float16


class Record:
    """`words` 16-bit words: `classes` logits in float16, then the `width` numbers of the pooled vector in float16."""

    def __init__(self, classes: int, width: int = 0) -> None:
        self.classes, self.width = classes, width
        self.pooled_at = classes + classes % 2
        self.words = self.pooled_at + width + width % 2  # even: the checksum reads them in pairs
        self._weights: dict[torch.device, Tensor] = {}

    def pack(self, out: Float[Tensor, "n K"], pooled: Float[Tensor, "n D"] | None = None) -> Int16[Tensor, "n W"]:
        """Records of logits and, where `width` is not 0, pooled vectors; on their device."""
        parts = [_halves(out), out.new_zeros(len(out), self.classes % 2, dtype=torch.int16)]
        if self.width:
            assert pooled is not None
            parts += [_halves(pooled), out.new_zeros(len(out), self.width % 2, dtype=torch.int16)]
        return torch.cat(parts, 1)

    def unpack(self, records: Int16[Tensor, "n W"]) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n D"] | None]:
        """Logits and pooled vectors in float32: a function of the record alone, so the same bits on every device."""
        out = records[:, : self.classes].view(torch.float16).float()
        if not self.width:
            return out, None
        return out, records[:, self.pooled_at : self.pooled_at + self.width].view(torch.float16).float()

    def matches(self, records: Int16[Tensor, "n W"], out: Float[Tensor, "n K"], share: float) -> Bool[Tensor, " n"]:
        """Whether records may hold these live logits: the root mean square difference is within the rounding to float16
        plus `share` of the logits' spread over the classes (of a single logit: of its size)."""
        spread = out.std(-1) if self.classes > 1 else out[:, 0].abs()
        off = (self.unpack(records)[0] - out).square().mean(-1).sqrt()
        return off <= share * spread + 2**-10 * out.abs().amax(-1) + 1e-6

    def in_range(self, records: Int16[Tensor, "n W"]) -> Bool[Tensor, " n"]:
        """Which records hold only numbers below float16's largest, to which `pack` clamps larger ones."""
        return torch.cat([x for x in self.unpack(records) if x is not None], 1).abs().amax(-1) < HALF  # NaN is not

    def checksum(self, records: Int16[Tensor, "n W"], rows: Int[Tensor, " n"]) -> Int32[Tensor, " n"]:
        """32 bits of each record and its row, never 0; one change or move in 2^32 goes unseen.

        Multiply-shift hashing with 64-bit weights (Dietzfelbinger, STACS 1996).
        """
        device = records.device
        if device not in self._weights:
            self._weights[device] = hashed(self.words, torch.arange(self.words // 2 + 1, device=device)) * 2 + 1
        weights = self._weights[device]
        total = (records.contiguous().view(torch.int32) * weights[1:]).sum(-1) + rows.to(device) * weights[0]
        check = (total >> 32).to(torch.int32)
        return check.masked_fill(check == 0, 1)


def _halves(x: Tensor) -> Int16[Tensor, "n w"]:
    return x.float().clamp(-HALF, HALF).half().view(torch.int16)
