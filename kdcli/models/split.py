"""The rest of a network after one of its stages: what branches that share a beginning are made of."""

import math
from typing import Any

import torch
import torchvision
from jaxtyping import Float
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from kdcli.errors import RecipeError
from kdcli.models.taps import Taps
from kdcli.system.sizes import Size


class Rest:
    """`rest(map)` is what `net(x)` is, when `map` is what one of the network's stages says to x.

    Returned are the logits, what the classifier is given (maps and tokens averaged), and the last stage's map (None
    where the network does not pass it on as it is). It is made of the network's own modules, and follows its mode.
    Raises RecipeError for a network that cannot be divided after that stage.
    """

    def __init__(self, net: nn.Module, head: nn.Module, size: Size, name: str, after: str) -> None:
        self.net, self.what = net, f"{name} cannot be divided after {after}"
        modes = {id(module): module.training for module in net.modules()}
        path = next(path for path, module in net.named_modules() if module is head)
        try:
            ends = self._find(net, size, name, after)
            self.graphs = {mode: _after(net.train(mode), path, *ends) for mode in (False, True)}
            self.tells_last, self.copies = ends[2] is not None, False
            self._check(net.eval(), size, name, after)
        except RecipeError:
            raise
        except Exception as error:  # torch.fx raises many kinds for control flow that depends on values
            raise self._refusal((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from None
        finally:
            for module in net.modules():
                module.training = modes[id(module)]

    def __call__(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor, Tensor | None]:
        out, given, last = self.graphs[self.net.training](x.clone() if self.copies else x)
        if given.ndim > 2:
            given = given.mean((2, 3)) if given.ndim == 4 else given.flatten(1, -2).mean(1)
        return out, given, last

    def share_beginning(self, other: nn.Module) -> None:
        """Everything of the network that is not the rest becomes `other`'s own: the same tensors in both."""
        own = {id(x) for x in (*self.graphs[False].parameters(), *self.graphs[False].buffers())}
        for path, module in self.net.named_modules():
            theirs = other.get_submodule(path)
            for held, given in ((module._parameters, theirs._parameters), (module._buffers, theirs._buffers)):
                for name, x in held.items():
                    if x is not None and id(x) not in own:
                        held[name] = given[name]  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def _find(self, net: nn.Module, size: Size, name: str, after: str) -> tuple[list[str], int, int | None]:
        """What the network does, step by step, and after which steps the stage and the last one are there.

        A step is known by its answer. In a fresh network blocks may do nothing yet, so meanwhile norms and scales are
        given values with which they do.
        """
        scales = [(p, p.clone()) for p in net.eval().parameters() if p.ndim == 1]
        for p, _ in scales:
            nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator(p.device).manual_seed(0))
        try:
            x = _probe(net, size)
            _, maps = Taps(net, size, name)(x)
            graph = _trace(net)
            finder = _Finder(fx.GraphModule(net, graph), maps[after], list(maps.values())[-1])
            finder.run(x)
        finally:
            for p, value in scales:
                p.copy_(value)
        if finder.found[0] is None:
            raise self._refusal("no step of it answers that stage's map")
        return _steps(graph), finder.found[0], finder.found[1]

    @torch.no_grad()
    def _check(self, net: nn.Module, size: Size, name: str, after: str) -> None:
        x = _probe(net, size)
        plain, (_, maps) = net(x), Taps(net, size, name)(x)
        before = maps[after].clone()
        out, _, _ = self(maps[after])
        self.copies = not torch.equal(before, maps[after])  # its first step works in place
        if not torch.allclose(out, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            raise self._refusal("the rest answers otherwise than the whole")

    def _refusal(self, why: str) -> RecipeError:
        return RecipeError(
            f"method: {self.what} for branches that share what is before: {why}",
            hint="--set method.form=networks trains whole networks side by side (okddip, ffl), or choose a "
            "convolutional student, such as a resnet.",
        )


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=tuple(get_notrace_functions()))
        self.whole = (*get_notrace_modules(), torchvision.ops.StochasticDepth)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.Conv2d, *self.whole)) or super().is_leaf_module(m, module_qualified_name)


class _Finder(fx.Interpreter):
    """Runs a network step by step, and notes the first step that answers each of some tensors."""

    def __init__(self, module: fx.GraphModule, *wanted: Tensor) -> None:
        super().__init__(module)
        self.wanted, self.found = wanted, [None] * len(wanted)
        self.number: dict[fx.Node, int] = {node: n for n, node in enumerate(module.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for which, x in enumerate(self.wanted):
            alike = isinstance(out, Tensor) and out.shape == x.shape and torch.allclose(out, x, rtol=1e-4, atol=1e-5)
            if alike and self.found[which] is None:
                self.found[which] = self.number[n]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return out


def _trace(net: nn.Module) -> fx.Graph:
    return _Tracer().trace(net)


def _steps(graph: fx.Graph) -> list[str]:
    return [f"{node.op} {node.target}" for node in graph.nodes]


def _after(net: nn.Module, head: str, steps: list[str], cut: int, last: int | None) -> fx.GraphModule:
    """The steps after number `cut` as a module of their own: its map in; logits, the head's input, the last map out."""
    graph = _trace(net)
    nodes = list(graph.nodes)
    if _steps(graph) != steps:
        raise ValueError("in training it takes other steps")
    with graph.inserting_before(nodes[0]):
        given = graph.placeholder("given")
    nodes[cut].replace_all_uses_with(given)
    ends = [node for node in nodes if node.op == "call_module" and node.target == head]
    if len(ends) != 1:
        raise ValueError("its classifier is not called once")
    kept = None if last is None else given if last == cut else nodes[last]
    nodes[-1].args = ((nodes[-1].args[0], ends[0].args[0], kept),)
    for node in reversed(nodes[:-1]):
        if not node.users:
            graph.erase_node(node)
    if any(node.op == "placeholder" and node is not given for node in graph.nodes):
        raise ValueError("something of the picture goes around it")
    graph.lint()
    return fx.GraphModule(net, graph)


def _probe(net: nn.Module, size: Size) -> Tensor:
    like = next(net.parameters())
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
