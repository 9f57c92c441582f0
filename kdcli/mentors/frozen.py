"""A frozen network made faster with the same outputs: batch norms folded, channels last, lower precision, compiled."""

import copy
import warnings
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._pytree import tree_map

from kdcli.models.member import FEATURES, NOTHING, Member
from kdcli.models.outputs import Output
from kdcli.system.device import dtype_of

PROBES = 8  # random images for the parity check; oneDNN computes fewer than five in another order
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3}  # of the largest logit: far above rounding, far below a wrong net


class Frozen:
    """A faster copy of a mentor's network; the mentor itself is only frozen and set to eval mode.

    Called with images [B, 3, H, W] in [0, 1] it returns its Output in float32: logits, and the features in `needs`.

    Batch norms are folded into the convolutions before them where torch.fx can trace the network and no features are
    needed; weights are channels-last in `precision`. The folded network is compared with the original on random images
    and used only if they agree up to rounding.
    """

    def __init__(
        self, member: Member, precision: str, device: torch.device, *, needs: frozenset[str] = NOTHING
    ) -> None:
        self.member = member.requires_grad_(False).eval()
        self.precision, self.device, self.dtype = precision, device, dtype_of(precision)
        self.folded = False
        net, self.needs = copy.deepcopy(member.net), needs & FEATURES
        folded = None if self.needs else _folded(net)  # folding may remove the layers whose features are read
        if folded is not None and self._agrees(folded, net):
            net, self.folded = folded, True
        self.net = net.to(dtype=self.dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.twin = member.with_net(self.net) if self.needs else None
        if self.twin is not None:
            self.twin.prepare(self.needs)
        self.compiled: nn.Module | None = None
        self.shape: torch.Size | None = None

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Output:
        if self.twin is None:
            return Output(self._logits(images).clone())  # a backward pass cannot save tensors of inference mode
        with torch.no_grad():  # not inference mode, for the same reason
            return tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, self.twin.see(images, self.needs))

    @torch.inference_mode()
    def _logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.member.read(images).to(self.dtype, memory_format=torch.channels_last)
        net = self.compiled if self.compiled is not None and x.shape == self.shape else self.net
        out = net(x).float()
        return out if self.member.class_index is None else out.index_select(-1, self.member.class_index)

    def compile(self, batch_size: int) -> str:
        """Compile for batches of this size; other sizes run uncompiled. Returns why it was not compiled, or "".

        Must be called in the thread that will run it: the generated code depends on the thread's number of cores.
        """
        if self.twin is not None:
            return "its features are read, not only its logits"
        probe = _probe((batch_size, 3, *self.member.input_size), self.device).to(
            self.dtype, memory_format=torch.channels_last
        )
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = torch.compile(self.net, dynamic=False, options={"freezing": True})
                good = _near(compiled(probe).float(), self.net(probe).float(), TOLERANCE[self.precision])
        except Exception as error:  # no compiler, or a network it cannot trace
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not good:
            return "the compiled network's outputs differ"
        self.compiled, self.shape = compiled, probe.shape  # pyright: ignore[reportAttributeAccessIssue]
        return ""

    @torch.inference_mode()
    def _agrees(self, folded: nn.Module, net: nn.Module) -> bool:
        probe = _probe((PROBES, 3, *self.member.input_size), self.device)
        try:
            return _near(folded(probe), net(probe), TOLERANCE["fp32"])
        except Exception:  # traced for another shape
            return False


def _folded(net: nn.Module) -> nn.Module | None:
    """`net` with its batch norms folded into its convolutions; None if torch.fx cannot trace it."""
    copied = copy.deepcopy(net)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is BatchNormAct2d:
                setattr(module, name, _norm_then_act(child))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fuse(copied)
    except Exception:  # torch.fx raises many kinds for control flow that depends on values
        return None


def _norm_then_act(both: Any) -> nn.Sequential:
    """timm's combined norm and activation as two modules: torch folds plain norms only."""
    norm = nn.BatchNorm2d(both.num_features, both.eps, both.momentum, both.affine, both.track_running_stats)
    norm.load_state_dict({key: value for key, value in both.state_dict().items() if key in norm.state_dict()})
    return nn.Sequential(norm.to(both.weight.device), both.drop, both.act).eval()


def _probe(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
