"""Learning-rate schedules: timm's, and the two presets of the CIFAR papers written in timm's terms."""

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


def base_lr(config: TrainConfig) -> float:
    """The rate an optimiser starts from: the classroom preset begins above it and falls to it."""
    return config.lr / FALL if config.schedule == "classroom" else config.lr


def build(optimizer: Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int) -> Scheduler:
    """The timm scheduler that `set_lr` asks.

    crd: lr, then x0.1 after epochs 150, 180 and 210 of 240. classroom: what the ClassroomKD code's "120-epoch warm-up"
    comes to, a linear fall from lr to lr / 5 during epochs 1-120, flat to 150, then as crd (papers.md section 2.2).
    cosine, tanh and poly change at every update, the others once an epoch.
    Raises RecipeError for an unknown name.
    """
    name = config.schedule
    if name in ("crd", "classroom"):
        falling = {"warmup_t": epochs // 2, "warmup_lr_init": config.lr} if name == "classroom" else {}
        warm = {"warmup_t": config.warmup_epochs, "warmup_lr_init": config.warmup_lr} if config.warmup_epochs else {}
        milestones = [round(epochs * at / 240) for at in MILESTONES]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, **(falling or warm))
    if name not in (*TIMM, *PRESETS):
        known = (*PRESETS, *TIMM)
        raise RecipeError(f"train.schedule: no schedule called {name!r}", hint=did_you_mean(name, known))
    if name in ("step", "multistep") and not config.decay_epochs:
        raise RecipeError(
            f'train.decay_epochs: schedule = "{name}" needs the epochs at which the rate falls',
            hint='For example --set "train.decay_epochs=[30, 60, 90]".',
        )
    by_update = name in ("cosine", "tanh", "poly")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if name == "constant" else name,
        num_epochs=epochs,
        decay_epochs=epochs + 1 if name == "constant" else (config.decay_epochs or [epochs + 1])[0],
        decay_milestones=config.decay_epochs,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=not by_update,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def set_lr(scheduler: Scheduler, epoch: int, update: int) -> None:
    """Set the optimiser's rate for update `update` (from 0), which lies in `epoch` (from 0): no state but these two."""
    scheduler.step(epoch)
    scheduler.step_update(update)
