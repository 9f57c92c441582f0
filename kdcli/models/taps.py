"""Taps: a network's intermediate maps, read in the pass that answers, under names that mean the same everywhere.

`stage1` to `stage4` are the maps at a network's last four sizes (or its only three), the last of them what its pooling
is given; of a network that keeps one size, a transformer, the tokens after each quarter of its blocks, as a grid.
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

from kdcli.errors import WeightsError
from kdcli.models.outputs import Maps
from kdcli.system.sizes import Size

MOST = 4  # stages
PROBE = 128  # pixels: small enough to be quick, large enough that sizes differ where a network halves them
DEPTH = 2
PRE = ".pre"


def is_pre(tap: str) -> bool:
    """Whether a tap is what came before a stage's last activation."""
    return tap.endswith(PRE)


class Taps:
    """Reads a network's stages: `taps(x)` is what `net(x)` is, and the maps [B, C, H, W] by tap.

    pre: also what came before each stage's last activation, as `stage1.pre` and so on; of a stage that ends in none
        (a linear bottleneck, a transformer's block) its map once more.
    Raises WeightsError for a network whose maps cannot be read.
    """

    def __init__(self, net: nn.Module, size: Size, name: str, *, pre: bool = False) -> None:
        self.net, self.name = net, name
        self.way: _Intermediates | _Extracted
        training = net.training
        net.eval()
        try:
            with torch.no_grad():
                self.way = _way(net, size, name)
                self.inputs = _Inputs(self, net, size) if pre else None
                self._check(size)
        finally:
            net.train(training)

    def __call__(self, x: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B K"], Maps]:
        if self.inputs is None:
            out, maps = self.way(x)
        else:
            with self.inputs:
                out, maps = self.way(x)
                before = self.inputs.found(maps)
        named = {f"stage{n}": x for n, x in enumerate(maps, 1)}
        if self.inputs is not None:
            named |= {f"stage{n}{PRE}": x for n, x in enumerate(before, 1)}  # pyright: ignore
        return out, named

    def _check(self, size: Size) -> None:
        """What reads the maps must answer as the network does."""
        x = _probe(self.net, size)
        out, maps = self(x)
        plain = self.net(x)
        if not torch.allclose(out, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise _unreadable(self.name, "read stage by stage it answers otherwise")
        if any(one.ndim != 4 for one in maps.values()):
            raise _unreadable(self.name, "its stages are no maps")


def _probe(net: nn.Module, size: Size) -> Tensor:
    like = next(net.parameters())
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _unreadable(name: str, why: str) -> WeightsError:
    return WeightsError(
        f"the intermediate maps of {name} cannot be read: {why}",
        hint="Choose another network, or a method that learns from logits alone (kd, dkd, dist, classroom).",
    )


def _way(net: nn.Module, size: Size, name: str) -> "_Intermediates | _Extracted":
    """How to read this network."""
    if hasattr(net, "forward_intermediates") and hasattr(net, "forward_head"):
        return _Intermediates(net, size)
    try:
        return _Extracted(net, size, name)
    except WeightsError:
        raise
    except Exception as error:  # torch.fx raises many kinds for control flow that depends on values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _unreadable(name, reason) from None


def _chosen(sizes: list[tuple[int, ...]]) -> list[int]:
    """Which of a network's maps are its stages: the last four; the ends of its quarters where all are of one size."""
    n = len(sizes)
    if n > MOST and len(set(sizes)) == 1:
        return [math.ceil(n * quarter / MOST) - 1 for quarter in range(1, MOST + 1)]
    return list(range(max(n - MOST, 0), n))


class _Intermediates:
    """Through timm's interface, which the zoo's networks have too."""

    def __init__(self, net: Any, size: Size) -> None:
        self.net = net
        _, maps = net.forward_intermediates(_probe(net, size))
        self.indices = _chosen([tuple(x.shape[2:]) for x in maps])

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, maps = self.net.forward_intermediates(x, indices=self.indices)
        return self.net.forward_head(features), maps


class _Extracted:
    """Through torchvision's feature extractor: the same modules, called by a traced graph that hands out more."""

    def __init__(self, net: nn.Module, size: Size, name: str) -> None:
        from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        training, evaluating = get_graph_node_names(net)
        self.kind = "maps"
        if isinstance(net, VisionTransformer):
            self.kind, blocks = "tokens", [name for name, _ in net.encoder.layers.named_children()]
            nodes = [f"encoder.layers.{blocks[n]}" for n in _chosen([()] * len(blocks))]
        elif isinstance(net, SwinTransformer):
            self.kind, nodes = "last", [f"features.{n}" for n in range(1, len(net.features), 2)]
        elif isinstance(net, MaxVit):
            nodes = [f"blocks.{n}" for n in range(len(net.blocks))]
        else:
            blocks = _blocks(net, [node for node in evaluating if node in set(training)])
            every = create_feature_extractor(net, blocks, suppress_diff_warning=True).eval()
            nodes = _last_of_each_size(every(_probe(net, (max(size[0], PROBE), max(size[1], PROBE)))))
        if not nodes:
            raise _unreadable(name, "it has none")
        self.nodes, self.net = nodes, net
        ends = {"train_return_nodes": [*nodes, training[-1]], "eval_return_nodes": [*nodes, evaluating[-1]]}
        self.reader = create_feature_extractor(net, **ends, suppress_diff_warning=True)  # pyright: ignore
        self.reader.train(net.training)

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.reader.training != self.net.training:  # it has a graph for each
            self.reader.train(self.net.training)
        *maps, out = self.reader(x).values()
        if self.kind == "tokens":  # the first is the class token
            side = math.isqrt(maps[0].shape[1] - 1)
            maps = [one[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for one in maps]
        elif self.kind == "last":
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return out, maps


def _blocks(net: nn.Module, nodes: list[str]) -> list[str]:
    """The modules whose answers may be stages: a network's parts and theirs (`layer1`, `features.3`), but for the part
    that classifies. What lies deeper is inside a block, where a map may already be on its way to the next."""
    paths = [path for path, _ in net.named_modules() if 0 < path.count(".") + 1 <= DEPTH]
    parts = [path for path in paths if path.partition(".")[0] not in ("classifier", "fc", "head", "heads")]
    return [path for path in parts if path and any(f"{node}.".startswith(f"{path}.") for node in nodes)]


def _last_of_each_size(found: dict[str, Any]) -> list[str]:
    """Of a network's blocks the last of each of its last four sizes; where a map grows, the features have ended."""
    last: dict[int, str] = {}
    for node, x in found.items():
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] * x.shape[3] > 1:
            if last and x.shape[2] > next(reversed(last)):
                break
            last.pop(x.shape[2], None)
            last[x.shape[2]] = node
    return list(last.values())[-MOST:]


class _Inputs:
    """What the stages' last activations are given, kept while a pass is under way, for each thread by itself."""

    def __init__(self, taps: Taps, net: nn.Module, size: Size) -> None:
        self.kept: dict[int, dict[int, list[Tensor]]] = {}  # thread -> activation -> its inputs, call by call
        self.ends: list[tuple[int, int] | None] = []  # of each stage: which activation ended it, and at which call
        given: list[tuple[int, int, Tensor]] = []
        acts = [one for one in net.modules() if _is_activation(one)]
        calls = dict.fromkeys(range(len(acts)), 0)

        def note(n: int, out: Any) -> None:
            given.append((n, calls[n], out))
            calls[n] += 1

        hooks = [one.register_forward_hook(lambda _, __, out, n=n: note(n, out)) for n, one in enumerate(acts)]
        _, maps = taps.way(_probe(net, size))
        for hook in hooks:
            hook.remove()
        for x in maps:  # an activation ended the stage when its answer is the map itself
            self.ends.append(next(((n, call) for n, call, out in given if _one(out, x)), None))
        self.acts = [acts[n] for n in sorted({end[0] for end in self.ends if end})]
        order = {n: place for place, n in enumerate(sorted({end[0] for end in self.ends if end}))}
        self.ends = [None if end is None else (order[end[0]], end[1]) for end in self.ends]
        for place, act in enumerate(self.acts):
            act.register_forward_pre_hook(partial(self._keep, place))

    def _keep(self, place: int, act: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        if (mine := self.kept.get(threading.get_ident())) is not None:
            mine.setdefault(place, []).append(x.clone() if getattr(act, "inplace", False) else x)

    def __enter__(self) -> None:
        self.kept[threading.get_ident()] = {}

    def __exit__(self, *_: object) -> None:
        self.kept.pop(threading.get_ident())

    def found(self, maps: list[Tensor]) -> list[Tensor]:
        mine = self.kept[threading.get_ident()]
        return [x if end is None else mine[end[0]][end[1]] for end, x in zip(self.ends, maps, strict=True)]


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
    return known and not any(True for _ in module.parameters())


def _one(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and a.data_ptr() == b.data_ptr()
