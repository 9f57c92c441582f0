"""Learning-rate schedules: timm's, and the two presets of the CIFAR papers written in timm's terms."""

from bisect import bisect_right

from timm.scheduler import create_scheduler_v2
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from kdcli.errors import RecipeError, did_you_mean
from kdcli.recipe import TrainConfig

TIMM = ("cosine", "tanh", "step", "multistep", "poly")
PRESETS = ("crd", "classroom", "constant")
MILESTONES = (150, 180, 210)  # of 240 epochs; other lengths keep the proportions
FALL = 5  # the classroom preset falls from lr to lr / 5 during the first half


class Milestones(MultiStepLRScheduler):
    """The rate falls once each number of epochs is over; timm's own lets the last of them have the lower rate too."""

    def get_curr_decay_steps(self, t: int) -> int:
        return bisect_right(self.decay_t, t)


def base_lr(config: TrainConfig) -> float:
    """The rate an optimiser starts from: the classroom preset begins above it and falls to it."""
    return config.lr / FALL if config.schedule == "classroom" else config.lr


def build(optimizer: Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int) -> Scheduler:
    """The timm scheduler that `set_lr` asks.

    crd: lr, then x0.1 after epochs 150, 180 and 210 of 240. classroom: what the ClassroomKD code's "120-epoch warm-up"
    comes to, a linear fall from lr to lr / 5 during epochs 1-120, flat to 150, then as crd (papers.md section 2.2).
    cosine, tanh and poly change at every update, the others once an epoch. With `cycles` cosine restarts (DiSK).
    Raises RecipeError for an unknown name.
    """
    name = config.schedule
    if config.cycles > 1 and name != "cosine":
        raise RecipeError(
            f'train.cycles = {config.cycles}: only schedule = "cosine" restarts, not {name!r}',
            hint="Leave the key out, or --set train.schedule=cosine.",
        )
    warm = (config.warmup_epochs, config.warmup_lr)
    if name in ("crd", "classroom"):
        idle = {"decay_epochs": config.decay_epochs, "min_lr": config.min_lr}
        idle |= {"warmup_epochs": config.warmup_epochs} if name == "classroom" else {}
        if given := [f"train.{key}" for key, value in idle.items() if value]:
            raise RecipeError(
                f'{", ".join(given)}: schedule = "{name}" is a published one and has its own',
                hint='Leave the key out, or use schedule = "multistep" or "cosine".',
            )
        falling = (epochs // 2, config.lr) if name == "classroom" else warm
        return _milestones(optimizer, [round(epochs * at / 240) for at in MILESTONES], 0.1, falling)
    if name not in (*TIMM, *PRESETS):
        known = (*PRESETS, *TIMM)
        raise RecipeError(f"train.schedule: no schedule called {name!r}", hint=did_you_mean(name, known))
    if name in ("step", "multistep") and not config.decay_epochs:
        raise RecipeError(
            f'train.decay_epochs: schedule = "{name}" needs the epochs at which the rate falls',
            hint='For example --set "train.decay_epochs=[30, 60, 90]".',
        )
    if name == "multistep":
        return _milestones(optimizer, sorted(config.decay_epochs), config.decay_rate, warm)
    by_update = name in ("cosine", "tanh", "poly")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if name == "constant" else name,
        num_epochs=epochs if config.cycles == 1 else epochs / config.cycles,  # pyright: ignore[reportArgumentType]
        cycle_limit=config.cycles,
        cycle_decay=1.0,
        decay_epochs=epochs + 1 if name == "constant" else (config.decay_epochs or [epochs + 1])[0],
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=not by_update,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def _milestones(optimizer: Optimizer, epochs: list[int], rate: float, warm: tuple[int, float]) -> Scheduler:
    """x `rate` after each of `epochs`, counted from the start of the training and not from the end of its warm-up."""
    return Milestones(
        optimizer, decay_t=epochs, decay_rate=rate, warmup_t=warm[0], warmup_lr_init=warm[1], warmup_prefix=False
    )


def set_lr(scheduler: Scheduler, epoch: int, update: int) -> None:
    """Set the optimiser's rate for update `update` (from 0), which lies in `epoch` (from 0): no state but these two."""
    scheduler.step(epoch)
    scheduler.step_update(update)
