"""The optimizer of a phase."""

from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim import Optimizer

from kdcli.errors import RecipeError, did_you_mean
from kdcli.recipe import TrainConfig
from kdcli.training import schedule


def make_optimizer(parts: nn.Module, config: TrainConfig) -> Optimizer:
    """timm's optimizer over the parameters of `parts` that require a gradient.

    Raises RecipeError for one that timm cannot make.
    """
    try:
        return create_optimizer_v2(
            parts,
            opt=("sgd" if config.nesterov else "momentum") if config.optimizer == "sgd" else config.optimizer,
            lr=schedule.base_lr(config),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_norm_and_bias,
            **({"fused": True} if config.cuda_graph else {}),  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        known = [str(name) for name in list_optimizers()]
        raise RecipeError(
            f"train.optimizer = {config.optimizer!r}: {error}", hint=did_you_mean(config.optimizer, known)
        ) from None
