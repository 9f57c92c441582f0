"""Taps: a network's intermediate maps, read in the same forward pass, under names that mean the same in every network.

`stage1` to `stage4` are the maps at a network's last four sizes (or its only three); the last is the input of its
pooling. For a transformer, which keeps one size, they are the tokens after each quarter of its blocks, as a grid.
timm's networks and the zoo's are read through `forward_intermediates`, torchvision's and others through torchvision's
feature extractor.
"""

import math
import threading
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import WeightsError, first_line
from kdcli.models.outputs import Maps
from kdcli.system.sizes import Size

STAGES = 4  # at most
PROBE = 128  # pixels: small enough to be quick, large enough that sizes differ where a network halves them
DEPTH = 2  # of the modules whose outputs may be stages: `layer1` has 1, `features.3` has 2
PRE = ".pre"


def is_pre(tap: str) -> bool:
    """Whether a tap is the input of a stage's last activation."""
    return tap.endswith(PRE)


class Taps:
    """Reads a network's stages: `taps(x)` returns `net(x)` and the maps [B, C, h, w] by tap.

    size: (height, width) of the network's input in pixels. name: for messages.
    pre: also the input of each stage's last activation, as `stage1.pre` and so on; for a stage that does not end in an
        activation (a linear bottleneck, a transformer's block) the stage's map again.
    Raises WeightsError (exit 3) for a network whose maps cannot be read.
    """

    def __init__(self, net: nn.Module, size: Size, name: str, *, pre: bool = False) -> None:
        self.net, self.name = net, name
        self.reader: _Intermediates | _Extracted
        training = net.training
        net.eval()
        try:
            with torch.no_grad():
                self.reader = _reader(net, size, name)
                self.pre = _PreActivations(self.reader, net, size) if pre else None
                self._check(size)
        finally:
            net.train(training)

    def __call__(self, x: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B K"], Maps]:
        before: list[Tensor] = []
        if self.pre is None:
            out, maps = self.reader(x)
        else:
            with self.pre:
                out, maps = self.reader(x)
                before = self.pre.found(maps)
        named = {f"stage{n}": x for n, x in enumerate(maps, 1)}
        return out, named | {f"stage{n}{PRE}": x for n, x in enumerate(before, 1)}

    def _check(self, size: Size) -> None:
        """Raise unless the output with maps equals the network's."""
        x = probe(self.net, size)
        out, maps = self(x)
        plain = self.net(x)
        if not torch.allclose(out, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise _unreadable(self.name, "its outputs change when they are read")
        if any(one.ndim != 4 for one in maps.values()):
            raise _unreadable(self.name, "its stages are not [B, C, H, W]")


def probe(net: nn.Module, size: Size) -> Float[Tensor, "2 3 H W"]:
    """Two fixed random inputs of that size, of the network's device and type."""
    like = next(net.parameters())
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _unreadable(name: str, why: str) -> WeightsError:
    return WeightsError(
        f"the intermediate maps of {name} cannot be read: {why}",
        hint="Choose another network, or a method that needs logits only (kd, dkd, dist, classroom).",
    )


def _reader(net: nn.Module, size: Size, name: str) -> "_Intermediates | _Extracted":
    """What reads this network's maps."""
    if hasattr(net, "forward_intermediates") and hasattr(net, "forward_head"):
        return _Intermediates(net, size)
    try:
        return _Extracted(net, size, name)
    except WeightsError:
        raise
    except Exception as error:  # torch.fx raises many types for control flow that depends on values
        raise _unreadable(name, first_line(error)) from None


def _chosen(sizes: list[tuple[int, ...]]) -> list[int]:
    """Which of a network's maps are its stages: the last four; the ends of its quarters if all have one size."""
    n = len(sizes)
    if n > STAGES and len(set(sizes)) == 1:
        return [math.ceil(n * quarter / STAGES) - 1 for quarter in range(1, STAGES + 1)]
    return list(range(max(n - STAGES, 0), n))


class _Intermediates:
    """Reads maps through timm's interface, which the zoo's networks have too."""

    def __init__(self, net: Any, size: Size) -> None:
        self.net = net
        _, maps = net.forward_intermediates(probe(net, size))
        self.indices = _chosen([tuple(x.shape[2:]) for x in maps])

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, maps = self.net.forward_intermediates(x, indices=self.indices)
        return self.net.forward_head(features), maps


class _Extracted:
    """Reads maps through torchvision's feature extractor: the same modules in a traced graph with more outputs."""

    def __init__(self, net: nn.Module, size: Size, name: str) -> None:
        from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        training, evaluating = get_graph_node_names(net)
        self.kind = "maps"
        if isinstance(net, VisionTransformer):
            self.kind, blocks = "tokens", [name for name, _ in net.encoder.layers.named_children()]
            nodes = [f"encoder.layers.{blocks[n]}" for n in _chosen([()] * len(blocks))]
        elif isinstance(net, SwinTransformer):
            self.kind, nodes = "channels last", [f"features.{n}" for n in range(1, len(net.features), 2)]
        elif isinstance(net, MaxVit):
            nodes = [f"blocks.{n}" for n in range(len(net.blocks))]
        else:
            blocks = _blocks(net, [node for node in evaluating if node in set(training)])
            every = create_feature_extractor(net, blocks, suppress_diff_warning=True).eval()
            nodes = _last_of_each_size(every(probe(net, (max(size[0], PROBE), max(size[1], PROBE)))))
        if not nodes:
            raise _unreadable(name, "it has no maps")
        self.net = net
        ends = {"train_return_nodes": [*nodes, training[-1]], "eval_return_nodes": [*nodes, evaluating[-1]]}
        self.graph = create_feature_extractor(net, **ends, suppress_diff_warning=True)  # pyright: ignore
        self.graph.train(net.training)

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.graph.training != self.net.training:  # there is one graph for each mode
            self.graph.train(self.net.training)
        *maps, out = self.graph(x).values()
        if self.kind == "tokens":  # the first is the class token; torchvision's ViT takes square images only
            side = math.isqrt(maps[0].shape[1] - 1)
            maps = [x[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for x in maps]
        elif self.kind == "channels last":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return out, maps


def _blocks(net: nn.Module, nodes: list[str]) -> list[str]:
    """The modules whose outputs may be stages: the network's children and theirs (`layer1`, `features.3`), without the
    classifier. Deeper modules are inside a block, whose outputs are not yet a stage's."""
    paths = [path for path, _ in net.named_modules() if 0 < path.count(".") + 1 <= DEPTH]
    parts = [path for path in paths if path.partition(".")[0] not in ("classifier", "fc", "head", "heads")]
    return [path for path in parts if path and any(f"{node}.".startswith(f"{path}.") for node in nodes)]


def _last_of_each_size(found: dict[str, Any]) -> list[str]:
    """The last block at each of a network's last four map sizes, in order. Where a map grows, the features end."""
    last: dict[tuple[int, int], str] = {}
    for node, x in found.items():
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] * x.shape[3] > 1:
            size = (x.shape[2], x.shape[3])
            height, width = next(reversed(last), size)
            if size[0] > height or size[1] > width:
                break
            last.pop(size, None)
            last[size] = node
    return list(last.values())[-STAGES:]


class _PreActivations:
    """The inputs of the stages' last activations, kept during a forward pass, for each thread separately."""

    def __init__(self, reader: "_Intermediates | _Extracted", net: nn.Module, size: Size) -> None:
        self.kept: dict[int, dict[int, list[Tensor]]] = {}  # thread -> activation -> its inputs, call by call
        outputs: list[tuple[int, int, Tensor]] = []  # (activation, number of the call, output)
        acts = [module for module in net.modules() if _is_activation(module)]
        calls = dict.fromkeys(range(len(acts)), 0)

        def note(n: int, out: Any) -> None:
            outputs.append((n, calls[n], out))
            calls[n] += 1

        hooks = [act.register_forward_hook(lambda _, __, out, n=n: note(n, out)) for n, act in enumerate(acts)]
        _, maps = reader(probe(net, size))
        for hook in hooks:
            hook.remove()
        # an activation ends a stage when its output is the stage's map itself
        self.ends = [next(((n, call) for n, call, out in outputs if _same_memory(out, x)), None) for x in maps]
        """For each stage (activation, number of the call); None where no activation ends it."""
        for n in sorted({end[0] for end in self.ends if end}):
            acts[n].register_forward_pre_hook(partial(self._keep, n))

    def _keep(self, n: int, act: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        if (kept := self.kept.get(threading.get_ident())) is not None:
            kept.setdefault(n, []).append(x.clone() if getattr(act, "inplace", False) else x)

    def __enter__(self) -> None:
        self.kept[threading.get_ident()] = {}

    def __exit__(self, *_: object) -> None:
        self.kept.pop(threading.get_ident())

    def found(self, maps: list[Tensor]) -> list[Tensor]:
        """The input of each stage's last activation; its map where no activation ends it."""
        kept = self.kept[threading.get_ident()]
        return [x if end is None else kept[end[0]][end[1]] for end, x in zip(self.ends, maps, strict=True)]


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
    return known and not any(True for _ in module.parameters())


def _same_memory(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and a.data_ptr() == b.data_ptr()
