"""One frozen network made quick without changing what it says: folded, channels last, cast, compiled."""

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

PROBES = 8  # images that a quick form is compared on; oneDNN computes fewer than five in another order
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.3}  # of the largest logit: far above rounding, far below a wrong net


class Frozen:
    """A copy of a mentor's network that answers faster; the mentor itself is left alone but for being frozen.

    Called with images in [0, 1] it gives its Output in float32: logits, and what `needs` asks beside them.

    Batch norms are folded into the convolutions before them wherever torch.fx can follow the network, weights lie with
    channels last, in `precision`. Answers agree with the mentor's own up to rounding, which is checked here.
    """

    def __init__(
        self, member: Member, precision: str, device: torch.device, *, needs: frozenset[str] = NOTHING
    ) -> None:
        self.member = member.requires_grad_(False).eval()
        self.precision, self.device, self.dtype = precision, device, dtype_of(precision)
        self.folded = False
        net, self.needs = copy.deepcopy(member.net), needs & FEATURES
        quick = None if self.needs else _folded(net)  # folded, it need not have the layers that are to be read
        if quick is not None and self._agrees(quick, net):
            net, self.folded = quick, True
        self.net = net.to(dtype=self.dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.twin = member.with_net(self.net) if self.needs else None
        if self.twin is not None:
            self.twin.prepare(self.needs)
        self.compiled: nn.Module | None = None
        self.shape: torch.Size | None = None

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Output:
        if self.twin is None:
            return Output(self._logits(images).clone())  # a copy from outside inference mode, which a loss can save
        with torch.no_grad():  # not inference mode, whose tensors no loss could save
            return tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, self.twin.see(images, self.needs))

    @torch.inference_mode()
    def _logits(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.member.read(images).to(self.dtype, memory_format=torch.channels_last)
        net = self.compiled if self.compiled is not None and x.shape == self.shape else self.net
        out = net(x).float()
        return out if self.member.class_index is None else out.index_select(-1, self.member.class_index)

    def compile(self, batch_size: int) -> str:
        """Compile for batches of this size alone; other sizes go the old way. Returns why not, or nothing.

        Called in the thread that is to answer, since the code is made for its number of cores.
        """
        if self.twin is not None:
            return "more than its logits is read"
        probe = _probe((batch_size, 3, *self.member.input_size), self.device).to(
            self.dtype, memory_format=torch.channels_last
        )
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quick = torch.compile(self.net, dynamic=False, options={"freezing": True})
                good = _near(quick(probe).float(), self.net(probe).float(), TOLERANCE[self.precision])
        except Exception as error:  # no compiler here, or a network it cannot follow
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not good:
            return "the compiled network answers otherwise"
        self.compiled, self.shape = quick, probe.shape  # pyright: ignore[reportAttributeAccessIssue]
        return ""

    @torch.inference_mode()
    def _agrees(self, quick: nn.Module, net: nn.Module) -> bool:
        probe = _probe((PROBES, 3, *self.member.input_size), self.device)
        try:
            return _near(quick(probe), net(probe), TOLERANCE["fp32"])
        except Exception:  # followed at the wrong shape
            return False


def _folded(net: nn.Module) -> nn.Module | None:
    """`net` with its batch norms folded into its convolutions; None where torch.fx cannot follow it."""
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if type(child) is BatchNormAct2d:
                setattr(module, name, _apart(child))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fuse(plain)
    except Exception:  # torch.fx raises many kinds for control flow that depends on values
        return None


def _apart(both: Any) -> nn.Sequential:
    """timm's norm and activation in one, as two modules: torch folds only the plain norm."""
    norm = nn.BatchNorm2d(both.num_features, both.eps, both.momentum, both.affine, both.track_running_stats)
    norm.load_state_dict({key: value for key, value in both.state_dict().items() if key in norm.state_dict()})
    return nn.Sequential(norm.to(both.weight.device), both.drop, both.act).eval()


def _probe(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
