"""Lessons and setup contexts made by hand, for methods that read maps and pooled vectors."""

from typing import Any, cast

import torch
from torch import Tensor

from kdcli.data import DataSet, Split
from kdcli.methods import Lesson, Method, Phase, SetupContext, build
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

K = 3  # classes
PHASE = Phase("main", 1, ("student",), TrainConfig())
CIFAR3 = [(4, 8, 8), (6, 4, 4), (8, 2, 2)]  # three stages, the first at full size
TIMM4 = [(3, 6, 6), (5, 3, 3), (7, 2, 2), (9, 2, 2)]  # four, the first small
VIT = [(6, 3, 3)] * 4  # a transformer's tokens: one size, one width
ODD = [(4, 7, 5), (6, 5, 3), (8, 3, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(shapes: list[tuple[int, int, int]], dims: int, batch: int, seed: int, *, learns: bool = False) -> Output:
    maps = {f"stage{n}": random(batch, *shape, seed=seed + n) for n, shape in enumerate(shapes, 1)}
    pooled, out = random(batch, dims, seed=seed + 8), random(batch, K, seed=seed + 9)
    if learns:
        for x in (*maps.values(), pooled, out):
            x.requires_grad_()
    return Output(out, pooled, maps)


def each(outs: Any, strong: Any = None) -> list[Output]:
    """One Output per mentor from logits [M, B, K], and from those of a second view."""
    views = [None if strong is None else Output(torch.as_tensor(one)) for one in (outs if strong is None else strong)]
    return [Output(torch.as_tensor(out), strong=view) for out, view in zip(outs, views, strict=True)]


def lesson(student=CIFAR3, teacher=TIMM4, batch: int = 4, seed: int = 0, index: list[int] | None = None) -> Lesson:
    """A student with 5 pooled numbers that learns, a teacher with 7; maps of the given shapes."""
    batch = batch if index is None else len(index)
    mine = output(student, 5, batch, 10 * seed, learns=True)
    theirs = output(teacher, 7, batch, 1000 + 10 * seed)
    numbers = torch.arange(batch) if index is None else torch.tensor(index)
    generator = torch.Generator().manual_seed(seed)
    return Lesson(numbers % K, numbers, 0.0, 0, Classify(K), generator, mine, {"student": mine}, [theirs])


def room(targets: list[int] | None = None, index: list[int] | None = None, **over: Any) -> SetupContext:
    """A context with nothing but data: image i is of class i mod K."""
    targets = [i % K for i in range(12)] if targets is None else targets
    split = Split(
        cast(Any, None), torch.tensor(targets), None if index is None else torch.tensor(index), max(30, len(targets))
    )
    data = DataSet("toy", [str(k) for k in range(K)], None, "", (0, 0, 0), (1, 1, 1), (8, 8), "none", split, split)
    nobody = cast(Any, None)
    given = {"student": nobody, "mentors": [], "data": data, "task": Classify(K), "train": TrainConfig(batch_size=4)}
    return SetupContext(**{**given, "device": torch.device("cpu"), "new_student": nobody, **over})


def ready(name: str, given: Lesson, at: SetupContext | None = None, **options: Any) -> Method:
    """The method, set up from `given`."""
    torch.manual_seed(0)
    method = build(name, options)
    method.context = at or room()
    method.setup(method.context, given)
    return method.train()


def leaves(of: Output) -> list[Tensor]:
    """All tensors of an output."""
    assert of.pooled is not None
    assert of.maps is not None
    return [of.out, of.pooled, *of.maps.values()]


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
