"""A learner: one student with its method and optimiser, and the step that teaches it (long: the step and what it leaves
behind belong together)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcli import device as devices, methods, schedule, zoo
from kdcli.classroom import Classroom, Member
from kdcli.data import Batch, DataSet
from kdcli.errors import DivergedError, RecipeError, did_you_mean
from kdcli.evaluate import Score
from kdcli.mentors import Mentors
from kdcli.methods import Lesson, Room, Terms, View
from kdcli.recipe import Recipe, TrainConfig
from kdcli.run import Run
from kdcli.tally import Tally
from kdcli.tasks import Classify
from kdcli.zoo import Card


class Learner:
    """One student with its method and optimiser. Everything random in it is a function of (train.seed, step)."""

    def __init__(self, name: str, recipe: Recipe, classroom: Classroom, steps_per_epoch: int) -> None:
        self.name, self.recipe, self.classroom = name, recipe, classroom
        self.device, self.config = classroom.device, recipe.train
        self.method = methods.build(recipe.method.name, recipe.method.options)
        check_method(self.method, recipe, classroom)
        mixing = bool(self.config.mixup or self.config.cutmix)
        data = classroom.data
        self.task = Classify(len(data.classes), 0.0 if mixing else self.config.label_smoothing)
        self.precision, self.precision_why = devices.precision(self.config.precision, self.device, frozen=False)
        self.generator = torch.Generator(self.device)
        self.student = classroom.student(self.config.seed)
        self.method.room = Room(self.student, classroom.mentors, data, self.task)
        _seed(self.config.seed, self.device)
        self.method.setup(self.method.room, self._first_lesson())
        self.method.to(self.device)
        self.steps_per_epoch = steps_per_epoch
        self.phases = self.method.phases(self.config)
        self.epochs = sum(phase.epochs for phase in self.phases)
        self.ema = ModelEmaV3(self.method.graduate(), decay=self.config.ema) if self.config.ema else None
        self.forward = torch.compile(self.student) if self.config.compile else self.student
        self.tally = Tally()
        self.first_bad: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {}
        self._enter(0)

    def _first_lesson(self) -> Lesson | None:
        """One real lesson for methods that size themselves by it."""
        if self.method.needs <= {"hard_target", "full_batches"}:
            return None
        batch = next(self.classroom.data.train.plain(2, self.device))
        mentors = Mentors(self.classroom.mentors, "fp32", self.device, pooled="pooled" in self.method.needs)
        return self._lesson(batch, {"student": self.look(batch)}, mentors.answer(batch), 0.0, 0)

    def _enter(self, number: int) -> None:
        """Begin a phase: an optimiser for its learners and the method's own parameters."""
        self.phase_number, self.phase = number, self.phases[number]
        learners = self.method.learners()
        taught = [learners[name] for name in self.phase.learners]
        for module in learners.values():
            module.requires_grad_(any(module is one for one in taught))
        parts = nn.ModuleList([*taught, self.method])
        config = self.phase.train
        self.optimizer = make_optimizer(parts, config)
        self.schedule = schedule.build(self.optimizer, config, self.phase.epochs, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # pyright: ignore
        self.parameters = [p for p in parts.parameters() if p.requires_grad]

    def begin_epoch(self, epoch: int, sweep: Callable[["Learner"], Iterator[Lesson]]) -> None:
        """Enter the phase of `epoch` (from 0) and put those who learn in it in training mode."""
        start, number = 0, 0
        while epoch >= start + self.phases[number].epochs:
            start, number = start + self.phases[number].epochs, number + 1
        if number != self.phase_number:
            self._enter(number)
        self.phase_start = start
        self.method.train()  # first, for learners may be parts of it
        for name, module in self.method.learners().items():
            module.train(name in self.phase.learners)  # who does not learn now keeps its batch statistics too
        self.method.begin_epoch(epoch, lambda: sweep(self))

    def step(self, batch: Batch, taught: View | None, epoch: int, number: int, step: int) -> None:
        """One update. `number` is the batch's place in the epoch, `step` counts all updates. Nothing is read back."""
        since = (epoch - self.phase_start) * self.steps_per_epoch + number
        schedule.set_lr(self.schedule, epoch - self.phase_start, since)
        _seed(_mix(self.config.seed, step), self.device)
        at = epoch + number / self.steps_per_epoch
        size = -(-len(batch.index) // self.config.accumulate)
        self.optimizer.zero_grad(set_to_none=True)
        lesson = None
        for part_number, lo in enumerate(range(0, len(batch.index), size)):
            part = batch if size >= len(batch.index) else _part(batch, slice(lo, lo + size))
            answers = taught if taught is None or part is batch else View(taught.out[:, lo : lo + size])
            with torch.autocast(self.device.type, devices.dtype_of(self.precision), enabled=self.precision != "fp32"):
                views = {"student": View(self.forward(part.pixels))}
                for name, module in self.method.learners().items():
                    if isinstance(module, Member) and module is not self.student:
                        views[name] = View(module(part.pixels))
            lesson = self._lesson(part, views, answers, at, step, part_number)
            terms = self.method.loss(lesson, self.phase)
            share = len(part.index) / len(batch.index)
            self.scaler.scale(sum(terms.values(), torch.zeros((), device=self.device)) * share).backward()
            self._note(lesson, terms, share, step)
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.method.graduate(), step=step)
        assert lesson is not None
        self.method.after(lesson)
        self.tally.batches += 1

    @torch.no_grad()
    def look(self, batch: Batch) -> View:
        """The student's answer to a batch that teaches it nothing: eval mode, no gradient; its mode is put back."""
        training = self.student.training
        view = View(self.student.eval()(batch.pixels))
        self.student.train(training)
        return view

    def _lesson(
        self, batch: Batch, views: dict[str, View], mentors: View | None, epoch: float, step: int, part: int = 0
    ) -> Lesson:
        self.generator.manual_seed(_mix(self.config.seed, step, 1 + part))  # micro-batches draw different noise
        student = views["student"]
        return Lesson(batch.target, batch.index, epoch, step, self.task, self.generator, student, views, mentors)

    @torch.no_grad()
    def _note(self, lesson: Lesson, terms: Terms, share: float, step: int) -> None:
        for name, value in terms.items():
            bad = torch.where(torch.isfinite(value.detach()), math.inf, float(step))
            self.first_bad[name] = torch.minimum(self.first_bad[name], bad) if name in self.first_bad else bad
        right = self.task.metrics(lesson.student.out, lesson.target)["top1"]
        self.tally.add({"right": right})
        self.tally.add({f"term/{name}": value * share for name, value in terms.items()})
        self.tally.add({f"note/{name}": value * share for name, value in lesson.notes.items()})
        self.tally.images += len(lesson.index)

    def check(self) -> None:
        """Raise DivergedError if a term was not a number since the last look; waits for the device."""
        bad = {name: int(step) for name, value in self.first_bad.items() if math.isfinite(step := value.item())}
        if bad:
            term, step = min(bad.items(), key=lambda item: item[1])
            raise DivergedError(
                f"{self.name}: the loss term {term!r} stopped being a finite number at step {step + 1} "
                f"(epoch {step // self.steps_per_epoch + 1})",
                hint="Lower --set train.lr, add --set train.clip_grad=1 or --set train.warmup_epochs=5; in fp16 try "
                "--set train.precision=bf16.",
            )

    def check_weights(self) -> None:
        """Raise DivergedError if the weights are not all numbers: a finite loss may end in an update that is not."""
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise DivergedError(
                f"{self.name}: the weights stopped being finite numbers in the last update",
                hint="Lower --set train.lr or add --set train.clip_grad=1; the last good checkpoint is kept.",
            )

    def graduate(self) -> Member:
        """What is scored and shipped: the method's graduate, or its moving average."""
        return self.ema.module if self.ema is not None else self.method.graduate()  # pyright: ignore

    def row(self, epoch: int, result: dict[str, Score]) -> dict[str, Any]:
        """The metrics of an epoch (counted from 1) under the names they are plotted by; starts a new tally."""
        means = self.tally.means()
        row: dict[str, Any] = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row["train/top1"] = 100 * means.pop("right") * self.tally.batches / max(self.tally.images, 1)
        models = ["student", *(member.name for member in self.classroom.mentors)]
        row["train/loss"] = sum(value for name, value in means.items() if name.startswith("term/"))
        for name, value in means.items():
            kind, _, short = name.partition("/")
            if isinstance(value, list):
                who = models if len(value) == len(models) else models[1:]
                row |= {f"{short}/{model}": number for model, number in zip(who, value, strict=True)}
            else:
                row[f"loss/{short}" if kind == "term" else short] = value
        for split, s in result.items():
            row |= {f"{split}/top1": s.top1, f"{split}/top5": s.top5, f"{split}/loss": s.loss}
        self.tally = Tally()
        return row

    def state(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "learners": {name: module.state_dict() for name, module in self.method.learners().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "phase": self.phase_number,
            "tally": self.tally.state(),
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`. Raises RuntimeError/KeyError when it belongs to another recipe."""
        if state["phase"] != self.phase_number:
            self._enter(state["phase"])
        self.method.load_state_dict(state["method"])
        for name, module in self.method.learners().items():
            module.load_state_dict(state["learners"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.tally.load(state["tally"], self.device)
        self.best = state["best"]


def keep(run: Run, stem: str, learner: Learner, epoch: int, result: Score) -> None:
    """Write a learner's graduate as `stem`.safetensors with its card beside it."""
    graduate = learner.graduate()
    state = {name: value.detach().cpu().contiguous() for name, value in graduate.net.state_dict().items()}
    zoo.save(run.path, stem, state, card(graduate, learner.classroom.data, epoch, result.top1, str(run.path)))


def card(member: Member, data: DataSet, epoch: int | None, top1: float, origin: str) -> Card:
    """The card that says what a trained network is and how it wants its input."""
    return Card(
        path=None,
        name=f"{member.name} on {data.name}",
        architecture=member.architecture.full,
        dataset=data.name,
        data_hash=data.hash,
        num_classes=len(data.classes),
        classes=data.classes,
        image_size=member.input_size,
        mean=member.mean,
        std=member.std,
        interpolation=member.interpolation,
        top1=round(top1, 4),
        origin=origin,
        epoch=epoch,
        params=sum(p.numel() for p in member.net.parameters()),
    )


def check_method(method: methods.Method, recipe: Recipe, classroom: Classroom) -> None:
    """Refuse, before anything is trained, settings that the method's equation cannot mean."""
    name = recipe.method.name
    if len(classroom.mentors) < method.teachers:
        raise RecipeError(
            f"method {name} learns from mentors, and none is named", hint="Add --teacher NAME (and --peers A,B)."
        )
    if "hard_target" in method.needs and (recipe.train.mixup or recipe.train.cutmix):
        raise RecipeError(
            f"method {name} marks answers by one true class, which mixup and cutmix take away",
            hint="--set train.mixup=0 --set train.cutmix=0, or a method without marks (kd, aver).",
        )
    if recipe.classroom.bank and method.teachers and "maps" in method.needs:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' intermediate maps, and a bank answers logits",
            hint="--set classroom.bank=false",
        )
    if recipe.classroom.bank and method.teachers and "pooled" in method.needs and not recipe.classroom.bank_pooled:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' pooled features, which this bank leaves out",
            hint="--set classroom.bank_pooled=true, or --set classroom.bank=false.",
        )
    if "full_batches" in method.needs and recipe.train.accumulate > 1:
        raise RecipeError(
            f"train.accumulate = {recipe.train.accumulate}: method {name} ranks whole batches, and micro-batches would "
            "be other batches",
            hint="--set train.accumulate=1, or --set method.ranking=sample.",
        )


def make_optimizer(parts: nn.Module, config: TrainConfig) -> Optimizer:
    """timm's optimiser over what may learn in `parts`. Raises RecipeError for one it cannot make."""
    try:
        return create_optimizer_v2(
            parts,
            opt=("sgd" if config.nesterov else "momentum") if config.optimizer == "sgd" else config.optimizer,
            lr=schedule.base_lr(config),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_norm_and_bias,
        )
    except ValueError as error:
        known = [str(name) for name in list_optimizers()]
        raise RecipeError(
            f"train.optimizer = {config.optimizer!r}: {error}", hint=did_you_mean(config.optimizer, known)
        ) from None


def _part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.pixels[rows], batch.target[rows], batch.index[rows], batch.view[rows])


def _seed(seed: int, device: torch.device) -> None:
    """Seed dropout and other noise of one learner's next step; cheaper than torch.manual_seed on all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _mix(*parts: int) -> int:
    """One 63-bit seed out of several numbers (the finaliser of splitmix64)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
