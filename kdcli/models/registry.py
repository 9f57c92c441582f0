"""Model names -> networks: `[source:]architecture[@weights]`, source one of zoo, timm, torchvision.

Neither torch nor the libraries are imported before a name is looked up. DESIGN section 3, "Names".
"""

import fnmatch
from pathlib import Path

from kdcli.errors import RecipeError, WeightsError, did_you_mean, nearest
from kdcli.models import from_timm, from_torchvision
from kdcli.models.from_timm import ZOO_PREFIX
from kdcli.models.net import ModelName, Net

SOURCES = ("zoo", "timm", "torchvision")


def resolve(spec: str) -> ModelName:
    """The one model that `[source:]architecture[@weights]` names.

    Exact names first (zoo, timm, torchvision in this order), then all three ignoring case, `_`, `-` and `.`, where a
    unique hit wins. Raises RecipeError (exit 2) with the nearest names when there are none or several.
    """
    name, at, weights = spec.strip().partition("@")
    source, colon, arch = name.strip().rpartition(":")
    if colon and source not in SOURCES:
        raise RecipeError(f"{spec}: no model source called {source!r}", hint=did_you_mean(source, SOURCES))
    if not arch or (at and not weights.strip()):
        raise RecipeError(
            f"{spec!r} is not a model name", hint="Write [source:]architecture[@weights], e.g. resnet18@none"
        )
    sources = (source,) if colon else SOURCES
    found = _exact(arch, sources) or _loose(arch, sources, spec)
    if found is None:
        places = source or "the zoo, timm or torchvision"
        raise RecipeError(f"no model called {arch!r} in {places}", hint=_suggest(arch, sources))
    return ModelName(found[0], found[1], weights.strip() if at else None, spec.strip())


def search(pattern: str = "*", source: str | None = None) -> list[ModelName]:
    """Every model whose name matches a glob or contains a text, ignoring case; zoo, timm, torchvision in this order.

    timm's pretrained tags (`resnet18.a1_in1k`) are listed when the pattern has a dot.
    """
    if source is not None and source not in SOURCES:
        raise RecipeError(f"no model source called {source!r}", hint=did_you_mean(source, SOURCES))
    glob = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    return [
        ModelName(place, arch, None, f"{place}:{arch}")
        for place in ((source,) if source else SOURCES)
        for arch in _names(place, tags="." in pattern)
        if any(fnmatch.fnmatchcase(text.lower(), glob) for text in (arch, f"{place}:{arch}"))
    ]


def create(name: ModelName, num_classes: int | None, *, pretrained: bool = False) -> Net:
    """Build the network with `num_classes` outputs (None: the library's count), in float32 on the CPU.

    `pretrained` loads the library's weights from its cache or the network; with another class count the head is fresh
    and `Net.fresh_head` says so. Raises WeightsError (exit 3) when they cannot be had, within seconds when offline.
    """
    trained = pretrained_classes(name)
    if pretrained and trained is None:
        raise WeightsError(
            f"{name.full} has no pretrained weights",
            hint=f"Train it: kdcli train --model {name.arch} --data DATA; or name a checkpoint: {name.arch}@PATH",
        )
    source = from_torchvision if name.source == "torchvision" else from_timm
    net = source.create(name, num_classes, pretrained=pretrained)
    net.fresh_head = pretrained and net.num_classes != trained
    return net


def create_on_meta(name: ModelName, num_classes: int | None) -> Net:
    """`create` on the meta device, so that no memory is used and no weights are drawn; on the CPU where that fails."""
    import torch

    try:
        with torch.device("meta"):
            return create(name, num_classes)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # an initialiser that reads weights
        return create(name, num_classes)


def pretrained_classes(name: ModelName) -> int | None:
    """Class count of the library's weights, without downloading: 0 for weights without a head, None for no weights."""
    source = from_torchvision if name.source == "torchvision" else from_timm
    return source.pretrained_classes(name)


def _names(source: str, *, tags: bool = False) -> list[str]:
    """The architectures of a source as it spells them; with `tags` timm's names of pretrained weights too."""
    if source == "torchvision":
        return from_torchvision.names()
    return from_timm.zoo_names() if source == "zoo" else from_timm.names(tags=tags)


def _exact(arch: str, sources: tuple[str, ...]) -> tuple[str, str] | None:
    """(source, architecture) of the first source that spells it so."""
    zoo = _names("zoo")
    if sources == ("zoo",) and f"{ZOO_PREFIX}{arch}" in zoo:
        return "zoo", f"{ZOO_PREFIX}{arch}"  # `zoo:resnet20`: the source stands for the prefix
    if arch in zoo and "torchvision" not in sources[:1]:
        return "zoo", arch  # `timm:cifar_resnet20` too: it is registered there, and still the zoo's
    for source in sources:
        if arch in _names(source, tags="." in arch):
            return source, arch
    return None


def _loose(arch: str, sources: tuple[str, ...], spec: str) -> tuple[str, str] | None:
    """(source, architecture) of the only name that is the same but for case, `_`, `-` and `.`."""
    wanted = _folded(arch)
    hits = [(source, name) for source in sources for name in _names(source, tags=True) if _folded(name) == wanted]
    if not hits and sources == ("zoo",):
        hits = [("zoo", name) for name in _names("zoo") if _folded(name) == _folded(ZOO_PREFIX) + wanted]
    if len(hits) > 1:
        names = " or ".join(f"{source}:{name}" for source, name in hits)
        raise RecipeError(f"{spec}: several models match this name", hint=f"Did you mean {names}?")
    return hits[0] if hits else None


def _folded(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", "_-."))


def _suggest(arch: str, sources: tuple[str, ...]) -> str:
    if Path(arch).suffix in (".pth", ".pt", ".th", ".ckpt", ".safetensors", ".onnx") or "/" in arch:
        return "A checkpoint goes after its architecture: ARCHITECTURE@PATH, e.g. cifar_resnet20@student.safetensors"
    known = [name for source in sources for name in _names(source)]
    best = [name for name in known if _folded(name) == _folded(ZOO_PREFIX + arch)]  # resnet20 -> cifar_resnet20
    best += nearest(arch, known) + [name for name in known if _folded(arch) in _folded(name)][:2]
    text = f"Did you mean {', '.join(list(dict.fromkeys(best))[:4])}? " if best else ""
    return f"{text}`kdcli models {arch}` searches, `kdcli models` lists all."
