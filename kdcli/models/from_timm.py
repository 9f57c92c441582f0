"""Networks from timm, where the zoo's own CIFAR networks are registered too."""

from typing import Any

from kdcli.models.download import downloading, hub_reached
from kdcli.models.net import ModelName, Net
from kdcli.system.sizes import pair

ZOO_PREFIX = "cifar_"


def zoo_names() -> list[str]:
    """The zoo's architectures."""
    import timm

    import kdcli.models.cifar  # noqa: F401  registers the zoo with timm

    return timm.list_models(f"{ZOO_PREFIX}*")


def names(*, tags: bool = False) -> list[str]:
    """timm's architectures without the zoo's; with `tags` also its names of pretrained weights (`resnet18.a1_in1k`)."""
    import timm

    zoo = set(zoo_names())
    found = [name for name in timm.list_models() if name not in zoo]
    if tags:
        tagged = timm.list_models(pretrained=True)
        found += [name for name in tagged if "." in name and name.partition(".")[0] not in zoo]
    return found


def pretrained_classes(name: ModelName) -> int | None:
    """Class count of the pretrained weights, without downloading: 0 for weights without a head, None for no weights."""
    config = _config(name.arch)
    return int(config.num_classes) if name.source == "timm" and config.has_weights else None


def create(name: ModelName, num_classes: int | None, *, pretrained: bool) -> Net:
    """The network with `num_classes` outputs (None: the library's count), in float32 on the CPU."""
    import timm

    config = _config(name.arch)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if pretrained:
        with downloading(name, "HF_HOME"), hub_reached(config.hf_hub_id, config.hf_hub_filename):
            module = timm.create_model(name.arch, pretrained=True, **options)
    else:
        module = timm.create_model(name.arch, pretrained=False, **options)
    count = int(module.num_classes)  # pyright: ignore[reportArgumentType]
    classes = wnids = None
    if name.source == "timm" and config.has_weights and count == config.num_classes:
        classes, wnids = _imagenet_labels(config)
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (config.mean, config.std))
    return Net(
        module=module,
        mean=mean,
        std=std,
        input_size=pair(config.input_size[1:]),
        interpolation=config.interpolation,
        fixed_size=bool(config.fixed_input_size),
        num_classes=count,
        classes=classes,
        wnids=wnids,
    )


def _config(arch: str) -> Any:
    import timm

    import kdcli.models.cifar  # noqa: F401

    return timm.get_pretrained_cfg(arch, allow_unregistered=False)


def _imagenet_labels(config: Any) -> tuple[list[str] | None, list[str] | None]:
    """Descriptions and WordNet ids of the outputs; None for weights of no ImageNet subset that timm lists."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config.to_dict())
    if subset is None:
        return None, None
    info = ImageNetInfo(subset)
    wnids = info.label_names()
    if len(wnids) != config.num_classes:
        return None, None
    return [info.label_name_to_description(wnid) for wnid in wnids], wnids
