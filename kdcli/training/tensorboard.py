"""TensorBoard (an optional extra): the rows of metrics.jsonl as event files."""

from pathlib import Path
from typing import Any

from kdcli.errors import RecipeError
from kdcli.system.files import unwritable


def check() -> None:
    """Raise RecipeError, before anything is trained, where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise RecipeError(
            "train.tensorboard: TensorBoard is not installed",
            hint='pip install "kdcli[tensorboard]", or --set train.tensorboard=false (metrics.jsonl holds the same).',
        ) from None


def write(folder: Path, row: dict[str, Any]) -> None:
    """Append one epoch's metrics under the names they have in metrics.jsonl; `tensorboard --logdir runs` shows them.

    An epoch that a resumed run repeats replaces the earlier one. Raises DataError when the disk is full.
    """
    from torch.utils.tensorboard import SummaryWriter

    place = folder / "tensorboard"
    try:
        with SummaryWriter(str(place), purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])
    except OSError as error:
        raise unwritable(place, error) from None
