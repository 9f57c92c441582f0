"""Whether an exported file gives the network's answers: both run on the same real and random images."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import KdcliError, ParityError, WeightsError
from kdcli.export.base import Runtime, Same

RANDOM = 8  # images of noise, checked as well: they reach values that real images do not
TIE = 2e-5  # two outputs this near, relative to the largest one, are one answer in float32
DIFFERS = (
    "The exported file does not answer as the student does, so it was not kept. Try another `--opset`, or `--batch 1`."
)


def noise(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "8 3 H W"]:
    """Random images of the size of the given ones, always the same."""
    return torch.rand(RANDOM, *images.shape[1:], generator=torch.Generator().manual_seed(0))


def outputs(network: nn.Module, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
    """The network's answers in exact float32, 16 images at a time.

    Raises WeightsError when they are not finite, KdcliError when they are not [N, K].
    """
    with _exact_float32(), torch.inference_mode():
        out = torch.cat([network(part) for part in images.split(16)])
    if out.ndim != 2 or len(out) != len(images):
        message = f"the student answers {len(images)} images with {list(out.shape)}, not with [{len(images)},K]"
        raise KdcliError(message, hint="Export a network that gives K outputs for each image of any batch.")
    if not out.isfinite().all():
        raise WeightsError(
            "the student's outputs are not finite in torch", hint="Its training diverged: export an earlier epoch."
        )
    return out.float()


def compare(
    runtime: Runtime,
    real: Float[Tensor, "R 3 H W"],
    random: Float[Tensor, "N 3 H W"],
    wanted: Float[Tensor, "R+N K"],
    same: Same,
    tolerance: float,
) -> tuple[float, float]:
    """(largest difference relative to the largest output, percent of the real images with the same answer).

    `wanted`: the network's outputs for the real images, then for the random ones. Raises ParityError (exit 5) when the
    difference is larger than `tolerance`, or a real image has another answer.
    """
    # three batch sizes, which shows a batch size that only seemed to be free
    given = torch.cat([runtime(real[:1]), runtime(real[1:]), runtime(random)])

    scale = max(wanted.abs().max().item(), 1e-12)
    apart = (given - wanted).abs().amax(1).nan_to_num(nan=float("inf")) / scale
    worst, alike = apart.max().item(), same(wanted[: len(real)], given[: len(real)], TIE * scale)
    if worst > tolerance or not alike.all():
        wrong = apart > tolerance
        wrong[: len(real)] |= ~alike
        where = [
            f"real image {i}" if i < len(real) else f"random image {i - len(real)}"
            for i in wrong.nonzero()[:, 0].tolist()
        ]
        listed = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
        raise ParityError(
            f"the exported file and torch differ by {worst:.2g} of the largest output ({worst * scale:.3g} of "
            f"{scale:.3g}; allowed {tolerance:g}), the answer differs on {(~alike).sum().item()} of {len(real)} real "
            f"images; wrong on {listed}",
            hint=DIFFERS,
        )
    return worst, 100 * alike.float().mean().item()


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """No autocast and no bfloat16 products in torch, whatever the process has set."""
    # the legacy torch.get_float32_matmul_precision raises once anything has used these
    mkldnn: Any = torch.backends.mkldnn
    kinds = (mkldnn.matmul, mkldnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
