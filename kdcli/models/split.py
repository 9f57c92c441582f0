"""The tail of a network after one of its stages: what branches that share a beginning are made of."""

import math
from typing import Any

import torch
import torchvision
from jaxtyping import Float
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from kdcli.errors import RecipeError, first_line
from kdcli.models.taps import Taps, probe
from kdcli.system.sizes import Size


class Tail:
    """The tail of `net` after stage `after`: `tail(map)` equals `net(x)` when `map` is that stage's map of x.

    Returns (logits [B, K], the classifier's input [B, D], the last stage's map [B, C, h, w]); maps and tokens before
    the classifier are averaged; the last is None where no step of the network returns that map. It runs the network's
    modules and follows its training mode.

    net: in any mode and on any device, which stay as they are. head: its linear classifier. size: (height, width) of
    its input in pixels. name: for messages. after: a tap, `stage2`.
    Raises RecipeError (exit 2) for a network that cannot be divided after that stage.
    """

    def __init__(self, net: nn.Module, head: nn.Module, size: Size, name: str, after: str) -> None:
        self.net, self.refused = net, f"{name} cannot be divided after {after}"
        modes = {id(module): module.training for module in net.modules()}
        head_path = next(path for path, module in net.named_modules() if module is head)
        try:
            cut, last, steps = self._find(net, size, name, after)
            self.graphs = {mode: _after(net.train(mode), head_path, steps, cut, last) for mode in (False, True)}
            self.has_last_map, self.clones = last is not None, False
            self._check(net.eval(), size, name, after)
        except RecipeError:
            raise
        except Exception as error:  # torch.fx raises many types for control flow that depends on values
            raise self._refusal(first_line(error)) from None
        finally:
            for module in net.modules():
                module.training = modes[id(module)]

    def __call__(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor, Tensor | None]:
        out, vectors, last = self.graphs[self.net.training](x.clone() if self.clones else x)
        if vectors.ndim > 2:
            vectors = vectors.mean((2, 3)) if vectors.ndim == 4 else vectors.flatten(1, -2).mean(1)
        return out, vectors, last

    def share_beginning(self, other: nn.Module) -> None:
        """Replace every tensor of the network that is not in the tail by `other`'s: both then hold the same ones."""
        in_tail = {id(x) for x in (*self.graphs[False].parameters(), *self.graphs[False].buffers())}
        for path, module in self.net.named_modules():
            source = other.get_submodule(path)
            for held, given in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
                for name, x in held.items():
                    if x is not None and id(x) not in in_tail:
                        held[name] = given[name]  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def _find(self, net: nn.Module, size: Size, name: str, after: str) -> tuple[int, int | None, list[str]]:
        """The numbers of the steps that return the stage's map and the last stage's, and all steps of the network.

        A step is recognised by the tensor it returns. In a fresh network a residual block may return its input, so
        norms and scales are random meanwhile.
        """
        scales = [(p, p.clone()) for p in net.eval().parameters() if p.ndim == 1]
        for p, _ in scales:
            nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator(p.device).manual_seed(0))
        try:
            x = probe(net, size)
            _, maps = Taps(net, size, name)(x)
            graph = _trace(net)
            finder = _Finder(fx.GraphModule(net, graph), maps[after], list(maps.values())[-1])
            finder.run(x)
        finally:
            for p, value in scales:
                p.copy_(value)
        cut, last = finder.found
        if cut is None:
            raise self._refusal("none of its steps returns that stage's map")
        return cut, last, _steps(graph)

    @torch.no_grad()
    def _check(self, net: nn.Module, size: Size, name: str, after: str) -> None:
        """Raise unless the tail of the stage's map equals the network."""
        x = probe(net, size)
        plain, (_, maps) = net(x), Taps(net, size, name)(x)
        before = maps[after].clone()
        out, _, _ = self(maps[after])
        self.clones = not torch.equal(before, maps[after])  # the tail's first step changes its input in place
        if not torch.allclose(out, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise self._refusal("its tail gives other outputs than the whole network")

    def _refusal(self, why: str) -> RecipeError:
        return RecipeError(
            f"method: {self.refused} into a shared beginning and branches: {why}",
            hint="--set method.form=networks trains whole networks side by side (okddip, ffl), or choose a "
            "convolutional student, such as a resnet.",
        )


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(
            autowrap_modules=(math, torchvision.ops),  # pyright: ignore[reportArgumentType]
            autowrap_functions=tuple(get_notrace_functions()),
        )
        self.whole = (*get_notrace_modules(), torchvision.ops.StochasticDepth)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.Conv2d, *self.whole)) or super().is_leaf_module(m, module_qualified_name)


class _Finder(fx.Interpreter):
    """Runs a network step by step, and records for each of some tensors the first step that returns it."""

    def __init__(self, module: fx.GraphModule, *wanted: Tensor) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.found: list[int | None] = [None] * len(wanted)
        self.number: dict[fx.Node, int] = {node: n for n, node in enumerate(module.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for which, x in enumerate(self.wanted):
            equal = isinstance(out, Tensor) and out.shape == x.shape and torch.allclose(out, x, rtol=1e-4, atol=1e-5)
            if equal and self.found[which] is None:
                self.found[which] = self.number[n]
        return out


def _trace(net: nn.Module) -> fx.Graph:
    return _Tracer().trace(net)


def _steps(graph: fx.Graph) -> list[str]:
    return [f"{node.op} {node.target}" for node in graph.nodes]


def _after(net: nn.Module, head: str, steps: list[str], cut: int, last: int | None) -> fx.GraphModule:
    """The steps after number `cut` as a module: that step's map in; logits, the head's input and the last map out."""
    graph = _trace(net)
    nodes = list(graph.nodes)
    if _steps(graph) != steps:
        raise ValueError("it takes other steps in training than in evaluation")
    with graph.inserting_before(nodes[0]):
        given = graph.placeholder("given")
    nodes[cut].replace_all_uses_with(given)
    heads = [node for node in nodes if node.op == "call_module" and node.target == head]
    if len(heads) != 1:
        raise ValueError("its classifier is not called exactly once")
    last_map = None if last is None else given if last == cut else nodes[last]
    nodes[-1].args = ((nodes[-1].args[0], heads[0].args[0], last_map),)
    for node in reversed(nodes[:-1]):
        if not node.users:
            graph.erase_node(node)
    if any(node.op == "placeholder" and node is not given for node in graph.nodes):
        raise ValueError("the image also reaches the output on a path around that stage")
    graph.lint()
    return fx.GraphModule(net, graph)
