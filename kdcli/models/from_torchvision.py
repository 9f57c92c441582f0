"""Networks from torchvision: its classifiers, and its pretrained weights by their own names."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import WeightsError, first_line
from kdcli.models.download import downloading
from kdcli.models.net import IMAGENET_MEAN, IMAGENET_STD, RGB, ModelName, Net
from kdcli.system.sizes import Size, pair

if TYPE_CHECKING:
    from torch import nn

INCEPTIONS = ("googlenet", "inception_v3")


def names() -> list[str]:
    """torchvision's image classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def names_weights(name: ModelName) -> bool:
    """Whether `@weights` is one of torchvision's own names for weights of this architecture."""
    import torchvision

    return name.source == "torchvision" and name.weights in torchvision.models.get_model_weights(name.arch).__members__


def weights_of(name: ModelName) -> Any:
    """The weights that a name asks for (`@IMAGENET1K_V1`), else the library's default; None where it has none."""
    import torchvision

    every = torchvision.models.get_model_weights(name.arch)
    return every[name.weights] if names_weights(name) else getattr(every, "DEFAULT", None)  # pyright: ignore


def pretrained_classes(name: ModelName) -> int | None:
    """Class count of the pretrained weights, without downloading; None for no weights."""
    weights = weights_of(name)
    return None if weights is None else len(weights.meta["categories"])


def create(name: ModelName, num_classes: int | None, *, pretrained: bool) -> Net:
    """The network with `num_classes` outputs (None: the library's count), in float32 on the CPU."""
    from torchvision.models import get_model

    weights = weights_of(name)
    trained = 1000 if weights is None else len(weights.meta["categories"])
    count = trained if num_classes is None else num_classes
    mean, std, size, interpolation = _input(weights)
    options: dict[str, Any] = {}
    initialise: dict[str, Any] = {}
    if name.arch in INCEPTIONS:
        # Their weights expect mean and std 0.5. torchvision rescales ImageNet-normalised input inside the network;
        # here the input is normalised with 0.5 instead. The auxiliary heads are for training only.
        options = {"aux_logits": False, "transform_input": False}
        initialise = {"init_weights": True}
        mean = std = (0.5, 0.5, 0.5)
    elif name.arch.startswith("vit_"):
        options = {"image_size": size[0]}
    if pretrained:
        with downloading(name, "TORCH_HOME"):
            module = _pretrained(name.arch, weights, options)
        if count != trained:
            fresh = get_model(name.arch, num_classes=count, **options, **initialise)
            module = _with_fresh_head(module, fresh, trained, count)
    else:
        module = get_model(name.arch, num_classes=count, **options, **initialise)
    classes = list(weights.meta["categories"]) if weights is not None and count == trained else None
    return Net(
        module=module,
        mean=mean,
        std=std,
        input_size=size,
        interpolation=interpolation,
        fixed_size=name.arch.startswith(("vit_", "swin", "maxvit")),
        num_classes=count,
        classes=classes,
        wnids=_imagenet_wnids() if classes is not None and len(classes) == 1000 else None,
    )


def _pretrained(arch: str, weights: Any, options: dict[str, Any]) -> "nn.Module":
    """The network with its weights, from torchvision's cache or the network; a broken file is named."""
    import torch
    from torchvision.models import get_model

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    cached = file.is_file()
    # inception_v3's builder refuses transform_input=False together with weights: it is set afterwards
    given = {key: value for key, value in options.items() if key != "transform_input"}
    try:
        module = get_model(arch, weights=weights, progress=False, **given)
    except Exception as error:
        if not cached:
            raise
        raise WeightsError(
            f"{file} is broken: {first_line(error)}", hint="Delete it, and it is downloaded again."
        ) from error
    if hasattr(module, "transform_input"):
        module.transform_input = False  # pyright: ignore[reportArgumentType]
    return module


def _with_fresh_head(trained: "nn.Module", fresh: "nn.Module", classes: int, count: int) -> "nn.Module":
    """`fresh` with the tensors of `trained`, but for the head's (`classes` rows in one, `count` in the other)."""
    state, target = trained.state_dict(), fresh.state_dict()
    for key, value in target.items():
        if state[key].shape == value.shape:
            target[key] = state[key]
        elif not (state[key].shape[0] == classes and value.shape[0] == count):
            raise AssertionError(f"{key}: {tuple(state[key].shape)} and {tuple(value.shape)} differ beyond the head")
    fresh.load_state_dict(target)
    return fresh


def _input(weights: Any) -> tuple[RGB, RGB, Size, str]:
    """Mean, std, input size and interpolation that weights expect."""
    if weights is None:
        return IMAGENET_MEAN, IMAGENET_STD, (224, 224), "bilinear"
    preset = weights.transforms()
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (preset.mean, preset.std))
    return mean, std, pair(int(preset.crop_size[-1])), str(preset.interpolation.value)


@lru_cache(maxsize=1)
def _imagenet_wnids() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()
