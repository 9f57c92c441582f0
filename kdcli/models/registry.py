"""Model names -> networks: `[source:]architecture[@weights]`, source one of zoo, timm, torchvision.

The only file that knows timm and torchvision exist as registries; neither they nor torch are imported before a name is
looked up; that both stay behind this one door is why the file is long. DESIGN section 3, "Names".
"""

import fnmatch
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import RecipeError, WeightsError, did_you_mean, nearest
from kdcli.system.sizes import Size, pair, plain

if TYPE_CHECKING:
    from torch import nn

SOURCES = ("zoo", "timm", "torchvision")
ZOO_PREFIX = "cifar_"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATIENCE = 10.0  # seconds to wait for a server's next sign of life


@dataclass(frozen=True)
class ModelName:
    """A name that was found: where, what, and which weights were asked for."""

    source: str  # zoo | timm | torchvision
    arch: str  # as its registry spells it; a timm tag (`resnet18.a1_in1k`) is kept
    weights: str | None  # the text after `@`; None: left out
    typed: str  # as the user typed it

    @property
    def full(self) -> str:
        """`torchvision:mobilenet_v3_small`."""
        return f"{self.source}:{self.arch}"

    @property
    def guessed(self) -> bool:
        """Whether what was typed is not the name itself, so that the command should print what it became."""
        return self.typed.partition("@")[0].strip() not in (self.arch, self.full)


@dataclass
class Net:
    """A network and how it wants its input."""

    module: "nn.Module"  # normalised pixels [B,3,S,S] -> logits [B,num_classes]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: Size
    interpolation: str  # bilinear | bicubic | nearest | ...
    fixed_size: bool  # the input size cannot change (ViT, Swin)
    num_classes: int
    classes: list[str] | None = None  # what the library's weights call the outputs; None for another class count
    wnids: list[str] | None = None  # their WordNet ids, same order
    fresh_head: bool = False  # pretrained weights below a head for another class count


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
    found = _exact(arch, sources) or _folded(arch, sources, spec)
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
        for arch in _registry(place, tags="." in pattern)
        if any(fnmatch.fnmatchcase(text.lower(), glob) for text in (arch, f"{place}:{arch}"))
    ]


def create(name: ModelName, num_classes: int | None, *, pretrained: bool = False) -> Net:
    """Build the network with `num_classes` outputs (None: the library's own count), in float32 on the CPU.

    `pretrained` loads the library's weights from its cache or the network; with another class count the head is fresh
    and `Net.fresh_head` says so. Raises WeightsError (exit 3) when they cannot be had, within seconds when offline.
    """
    own = has_pretrained(name)
    if pretrained and own is None:
        raise WeightsError(
            f"{name.full} has no pretrained weights",
            hint=f"Train it: kdcli train --model {name.arch} --data DATA; or name a checkpoint: {name.arch}@PATH",
        )
    net = (_torchvision if name.source == "torchvision" else _timm)(name, num_classes, pretrained)
    net.fresh_head = pretrained and net.num_classes != own
    return net


def has_pretrained(name: ModelName) -> int | None:
    """Class count of the library's weights, without downloading: 0 for weights without a head, None for no weights."""
    if name.source == "torchvision":
        weights = _torchvision_weights(name)
        return None if weights is None else len(weights.meta["categories"])
    cfg = _timm_cfg(name.arch)
    return int(cfg.num_classes) if name.source == "timm" and cfg.has_weights else None


def facts(name: ModelName, num_classes: int | None = None, image_size: int | Size | None = None) -> dict[str, Any]:
    """params, macs (multiply-adds of one image), input_size, num_classes, pretrained; nothing is downloaded.

    `image_size` (pixels) counts at that size where the architecture allows it. The network is built without memory
    where it can be.
    """
    import torch

    try:
        with torch.device("meta"):
            net = create(name, num_classes)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # an initialiser that reads its own weights
        net = create(name, num_classes)
    size = net.input_size if image_size is None or net.fixed_size else pair(image_size)
    params, macs = count(net.module, size)
    return {
        "params": params,
        "macs": macs,
        "input_size": plain(size),
        "num_classes": net.num_classes,
        "pretrained": has_pretrained(name) is not None,
    }


def count(module: "nn.Module", input_size: Size) -> tuple[int, int]:
    """All parameters, and the multiply-adds of one image [1,3,H,W] in eval mode.

    Convolutions, products and attention as torch.utils.flop_counter counts them, two operations to a multiply-add.
    `module` is not touched: a copy without memory answers.
    """
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    params = sum(p.numel() for p in module.parameters())
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")

    def flops(net: "nn.Module", device: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(torch.zeros(1, 3, *input_size, device=device))
        return counter.get_total_flops() // 2

    try:
        return params, flops(copy.deepcopy(module, memo), "meta")
    except (RuntimeError, NotImplementedError):  # a forward pass that asks for values
        return params, flops(copy.deepcopy(module).cpu().float(), "cpu")


# --- registries ---------------------------------------------------------------------------------------------------


def _registry(source: str, tags: bool = False) -> list[str]:
    """The architectures of a source as it spells them; with `tags` timm's pretrained names too."""
    if source == "torchvision":
        import torchvision

        return torchvision.models.list_models(module=torchvision.models)
    import timm

    import kdcli.models.cifar  # noqa: F401  registers the zoo with timm

    ours = timm.list_models(f"{ZOO_PREFIX}*")
    if source == "zoo":
        return ours
    mine = set(ours)
    names = [n for n in timm.list_models() if n not in mine]
    if tags:
        names += [n for n in timm.list_models(pretrained=True) if "." in n and n.partition(".")[0] not in mine]
    return names


def _exact(arch: str, sources: tuple[str, ...]) -> tuple[str, str] | None:
    zoo = _registry("zoo")
    if sources == ("zoo",) and f"{ZOO_PREFIX}{arch}" in zoo:
        return "zoo", f"{ZOO_PREFIX}{arch}"  # the source says what the prefix says
    if arch in zoo and "torchvision" not in sources[:1]:
        return "zoo", arch  # `timm:cifar_resnet20` too: it is registered there, and is the zoo's all the same
    for source in sources:
        if arch in _registry(source, tags="." in arch):
            return source, arch
    return None


def _folded(arch: str, sources: tuple[str, ...], spec: str) -> tuple[str, str] | None:
    wanted = _fold(arch)
    hits = [(s, n) for s in sources for n in _registry(s, tags=True) if _fold(n) == wanted]
    if not hits and sources == ("zoo",):
        hits = [("zoo", n) for n in _registry("zoo") if _fold(n) == _fold(ZOO_PREFIX) + wanted]
    if len(hits) > 1:
        names = " or ".join(f"{s}:{n}" for s, n in hits)
        raise RecipeError(f"{spec}: several models go by that name", hint=f"Did you mean {names}?")
    return hits[0] if hits else None


def _fold(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", "_-."))


def _suggest(arch: str, sources: tuple[str, ...]) -> str:
    if Path(arch).suffix in (".pth", ".pt", ".th", ".ckpt", ".safetensors", ".onnx") or "/" in arch:
        return "A checkpoint goes after its architecture: ARCHITECTURE@PATH, e.g. cifar_resnet20@student.safetensors"
    pool = [n for s in sources for n in _registry(s)]
    best = [n for n in pool if _fold(n) == _fold(ZOO_PREFIX + arch)]  # resnet20 -> cifar_resnet20
    best += nearest(arch, pool) + [n for n in pool if _fold(arch) in _fold(n)][:2]
    text = f"Did you mean {', '.join(list(dict.fromkeys(best))[:4])}? " if best else ""
    return f"{text}`kdcli models {arch}` searches, `kdcli models` lists all."


# --- timm and the zoo ---------------------------------------------------------------------------------------------


def _timm_cfg(arch: str) -> Any:
    import timm

    import kdcli.models.cifar  # noqa: F401

    return timm.get_pretrained_cfg(arch, allow_unregistered=False)


def _timm(name: ModelName, num_classes: int | None, pretrained: bool) -> Net:
    import timm

    cfg = _timm_cfg(name.arch)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if pretrained:
        with _downloading(name, "HF_HOME"), _hub_ready(cfg):
            module = timm.create_model(name.arch, pretrained=True, **options)
    else:
        module = timm.create_model(name.arch, pretrained=False, **options)
    count = int(module.num_classes)  # pyright: ignore[reportArgumentType]
    classes = wnids = None
    if name.source == "timm" and cfg.has_weights and count == cfg.num_classes:
        classes, wnids = _imagenet_names(cfg)
    return Net(
        module=module,
        mean=_three(cfg.mean),
        std=_three(cfg.std),
        input_size=pair(cfg.input_size[1:]),
        interpolation=cfg.interpolation,
        fixed_size=bool(cfg.fixed_input_size),
        num_classes=count,
        classes=classes,
        wnids=wnids,
    )


def _imagenet_names(cfg: Any) -> tuple[list[str] | None, list[str] | None]:
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(cfg.to_dict())
    if subset is None:
        return None, None
    info = ImageNetInfo(subset)
    wnids = info.label_names()
    return (
        ([info.label_name_to_description(w) for w in wnids], wnids) if len(wnids) == cfg.num_classes else (None, None)
    )


@contextmanager
def _hub_ready(cfg: Any) -> Iterator[None]:
    """Ask the hub once before timm does: its client would try for a minute when there is no network.

    What is in its cache is read without asking at all.
    """
    if not cfg.hf_hub_id:
        yield
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    repo, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
    cached = any(isinstance(try_to_load_from_cache(repo, f, revision=revision or None), str) for f in files)
    before = constants.HF_HUB_OFFLINE
    try:
        if cached:
            constants.HF_HUB_OFFLINE = True
        else:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# --- torchvision --------------------------------------------------------------------------------------------------


def _torchvision_weights(name: ModelName) -> Any:
    """The weights a name asks for (`@IMAGENET1K_V1`), else the library's best; None where it has none."""
    import torchvision

    every = torchvision.models.get_model_weights(name.arch)
    return every[name.weights] if names_weights(name) else getattr(every, "DEFAULT", None)  # pyright: ignore


def names_weights(name: ModelName) -> bool:
    """Whether `@weights` is one of torchvision's own names for weights of this architecture."""
    import torchvision

    return name.source == "torchvision" and name.weights in torchvision.models.get_model_weights(name.arch).__members__


def _torchvision(name: ModelName, num_classes: int | None, pretrained: bool) -> Net:
    from torchvision.models import get_model

    weights = _torchvision_weights(name)
    own = 1000 if weights is None else len(weights.meta["categories"])
    count = own if num_classes is None else num_classes
    mean, std, size, interpolation = _torchvision_input(weights)
    options: dict[str, Any] = {}
    if name.arch in ("googlenet", "inception_v3"):
        # Their weights want mean and std of a half, which torchvision arranges by rescaling ImageNet-normalised input
        # inside the network; here the input says so itself. The auxiliary heads are not part of the answer.
        options = {"aux_logits": False, "transform_input": False}
        mean = std = (0.5, 0.5, 0.5)
    elif name.arch.startswith("vit_"):
        options = {"image_size": size[0]}
    initialise = {"init_weights": True} if name.arch in ("googlenet", "inception_v3") else {}
    if pretrained:
        with _downloading(name, "TORCH_HOME"):
            module = _torchvision_pretrained(name.arch, weights, options)
        if count != own:
            module = _behead(module, get_model(name.arch, num_classes=count, **options, **initialise), own, count)
    else:
        module = get_model(name.arch, num_classes=count, **options, **initialise)
    names = list(weights.meta["categories"]) if weights is not None and count == own else None
    return Net(
        module=module,
        mean=mean,
        std=std,
        input_size=size,
        interpolation=interpolation,
        fixed_size=name.arch.startswith(("vit_", "swin", "maxvit")),
        num_classes=count,
        classes=names,
        wnids=_imagenet_wnids() if names is not None and len(names) == 1000 else None,
    )


def _torchvision_pretrained(arch: str, weights: Any, options: dict[str, Any]) -> "nn.Module":
    """torchvision's own builder and its weights, with every broken file named."""
    import torch
    from torchvision.models import get_model

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    there = file.is_file()
    # inception_v3's builder refuses transform_input=False beside weights: set it afterwards
    given = {k: v for k, v in options.items() if k != "transform_input"}
    try:
        module = get_model(arch, weights=weights, progress=False, **given)
    except Exception as error:
        if not there:
            raise
        raise WeightsError(
            f"{file} is broken: {_first_line(error)}", hint="Delete it, and it is downloaded again."
        ) from error
    if hasattr(module, "transform_input"):
        module.transform_input = False  # pyright: ignore[reportArgumentType]
    return module


def _behead(trained: "nn.Module", fresh: "nn.Module", own: int, count: int) -> "nn.Module":
    """Everything but the head's tensors (those that count classes) from `trained` into `fresh`."""
    state, target = trained.state_dict(), fresh.state_dict()
    for key, value in target.items():
        if state[key].shape == value.shape:
            target[key] = state[key]
        elif not (state[key].shape[0] == own and value.shape[0] == count):
            raise AssertionError(f"{key}: {tuple(state[key].shape)} and {tuple(value.shape)} differ beyond the head")
    fresh.load_state_dict(target)
    return fresh


def _torchvision_input(weights: Any) -> tuple[tuple[float, float, float], tuple[float, float, float], Size, str]:
    if weights is None:
        return IMAGENET_MEAN, IMAGENET_STD, (224, 224), "bilinear"
    how = weights.transforms()
    return _three(how.mean), _three(how.std), pair(int(how.crop_size[-1])), str(how.interpolation.value)


@lru_cache(maxsize=1)
def _imagenet_wnids() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


# --- small --------------------------------------------------------------------------------------------------------


@contextmanager
def _downloading(name: ModelName, cache: str) -> Iterator[None]:
    """Turn whatever a download raises into one WeightsError with a cure, and never wait without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"cannot get {name.full}'s pretrained weights: {type(error).__name__}: {_first_line(error)}",
            hint=f"Check the network, or set {cache} to a folder where they were downloaded before, or name a "
            f"checkpoint ({name.arch}@PATH), or train it (kdcli train --model {name.arch} --data DATA).",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c
