"""A learner: one student with its method and optimiser, and the step that teaches it (long: the step and what it leaves
behind belong together)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from kdcli import methods
from kdcli.data import Batch, DataSet
from kdcli.errors import DivergedError, RecipeError, did_you_mean
from kdcli.mentors.classroom import READ, Classroom, Member
from kdcli.methods import Lesson, Room, Terms, View
from kdcli.models import cards, graduates
from kdcli.models.cards import Card
from kdcli.models.taps import is_pre
from kdcli.recipe import Recipe, TrainConfig
from kdcli.system import device as devices, distributed, shards
from kdcli.system.cuda_graph import Captured
from kdcli.tasks import Classify
from kdcli.training import schedule
from kdcli.training.evaluate import Score
from kdcli.training.meters import Tally
from kdcli.training.run import Run

GRAPHED = ("sgd", "adam", "adamw")  # optimisers whose fused kernels read their rate from the device


class Learner:
    """One student with its method and optimiser. Everything random in it is a function of (train.seed, step)."""

    def __init__(self, name: str, recipe: Recipe, classroom: Classroom, steps_per_epoch: int) -> None:
        self.name, self.recipe, self.classroom = name, recipe, classroom
        self.device, self.config = classroom.device, recipe.train
        _seed(self.config.seed, self.device)  # for parameters that a method makes, at once or in its setup
        self.method = methods.build(recipe.method.name, recipe.method.options)
        check_method(self.method, recipe, classroom)
        mixing = bool(self.config.mixup or self.config.cutmix)
        data = classroom.data
        self.task = Classify(len(data.classes), 0.0 if mixing else self.config.label_smoothing)
        self.precision, self.precision_why = devices.precision(self.config.precision, self.device, frozen=False)
        check_graph(self.method, recipe, self.device, self.precision)
        self.generator = torch.Generator(self.device)
        self.student = classroom.student(self.config.seed)
        self.needs, self.readers = self.method.needs & READ, {"student": self.student}
        self.method.room = Room(
            self.student, classroom.mentors, data, self.task, self.config, self.device, classroom.student
        )
        self.method.setup(self.method.room, self._first_lesson())
        self.method.to(self.device)
        if self.config.sync_bn:
            for module in (self.student, *self.method.learners().values()):
                distributed.sync_norms(module)
                if isinstance(module, Member):
                    module.forget()
        self.steps_per_epoch = steps_per_epoch
        self.phases = self.method.phases(self.config)
        self.epochs = sum(phase.epochs for phase in self.phases)
        self.ema = ModelEmaV3(self.method.graduate(), decay=self.config.ema) if self.config.ema else None
        self.compiled = self.student
        if self.config.compile:
            self.compiled = cast(nn.Module, torch.compile(self.student, dynamic=False))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.now = torch.zeros((), dtype=torch.float32 if self.device.type == "mps" else torch.float64).to(self.device)
        self.best: dict[str, Any] = {}
        self.accumulate = self.config.accumulate  # micro-batches per update; more where memory ran out
        self.fitted: set[tuple[int, ...]] = set()  # phase, micro-batches and images of steps that memory held
        self.updating = False  # between the gradients and the end of a step: not to be done twice
        self.trained: dict[str, tuple[Optimizer, Scheduler, GradScaler]] = {}  # what phases of a name go on with
        self._enter(0)

    def _first_lesson(self) -> Lesson | None:
        """One real lesson for methods that size themselves by it."""
        asked = self.method.needs - {"hard_target", "full_batches", "pairs"}
        if not asked:
            return None
        batch = next(self.classroom.data.train.plain(2, self.device))
        if "two_views" in asked:
            batch.strong = batch.pixels
        with torch.no_grad():
            seen = [mentor.see(batch.pixels, self.needs) for mentor in self.classroom.mentors]
        view = None
        if seen:
            vectors = tuple(one.vectors for one in seen) if "pooled" in self.needs else None
            maps = tuple(one.stages for one in seen) if self.needs & {"maps", "pre"} else None
            view = View(torch.stack([one.out.float() for one in seen]), vectors, maps)
            view.strong = replace(view) if "two_views" in asked else None
        return self.lesson(batch, view, 0.0, 0)

    def _enter(self, number: int) -> None:
        """Begin a phase: an optimiser for its learners and the method's own parameters."""
        self.phase_number, self.phase = number, self.phases[number]
        learners = self.method.learners()
        taught = [learners[name] for name in self.phase.learners]
        for module in learners.values():
            module.requires_grad_(any(module is one for one in taught))
        parts = nn.ModuleList([*taught, self.method])
        config, of_name = self.phase.train, [phase for phase in self.phases if phase.name == self.phase.name]
        if self.phase.name not in self.trained:
            optimizer = make_optimizer(parts, config)
            rates = schedule.build(optimizer, config, sum(phase.epochs for phase in of_name), self.steps_per_epoch)
            scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # pyright: ignore
            self.trained[self.phase.name] = optimizer, rates, scaler
        self.optimizer, self.schedule, self.scaler = self.trained[self.phase.name]
        self.rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
        self.parameters = [p for p in parts.parameters() if p.requires_grad]
        self.tally, self.first_bad = Tally(), {}
        self.recorded = Captured(self._learn_tensors, (self.generator,)) if config.cuda_graph else None
        self.readers |= {name: module for name, module in learners.items() if isinstance(module, Member)}
        self.forward = {
            name: distributed.parallel(self.compiled if module is self.student else module, name in self.phase.learners)
            for name, module in self.readers.items()
        }
        averaged = {p for module in self.forward.values() for p in module.parameters()}
        self.replicated = [p for p in self.parameters if p not in averaged]

    def begin_epoch(self, epoch: int, sweep: Callable[["Learner"], Iterator[Lesson]], *, again: bool = False) -> None:
        """Enter the phase of `epoch` (from 0) and put those who learn in it in training mode.

        `again`: the epoch was begun before the checkpoint that was loaded, which holds what the method did then.
        """
        start, number = 0, 0
        while epoch >= start + self.phases[number].epochs:
            start, number = start + self.phases[number].epochs, number + 1
        if number != self.phase_number:
            self._enter(number)
        before = sum(phase.epochs for phase in self.phases[:number] if phase.name == self.phase.name)
        self.phase_start = start - before  # as if the phases of this name had been one, with no others in between
        self.method.train()  # first, for learners may be parts of it
        for name, module in self.method.learners().items():
            module.train(name in self.phase.learners)  # who does not learn now keeps its batch statistics too
        if not again:
            _seed(_mix(self.config.seed, epoch, 0), self.device)  # steps mix in 1 and more
            self.method.begin_epoch(epoch, lambda: sweep(self))

    def step(self, batch: Batch, taught: View | None, epoch: int, number: int, step: int) -> None:
        """One update. `number` is the batch's place in the epoch, `step` counts all updates. Nothing is read back."""
        taught = self._mine(taught)
        since = (epoch - self.phase_start) * self.steps_per_epoch + number
        schedule.set_lr(self.schedule, epoch - self.phase_start, since)
        if self.config.cuda_graph:  # a recorded update reads its rates from where they lay then
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])
        _seed(_mix(self.config.seed, step, *distributed.noise()), self.device)
        self._seed_noise(step)
        self.now.fill_(step)
        self.step_number, self.at = step, epoch + number / self.steps_per_epoch
        if self.recorded is not None and self.accumulate == 1:  # what was recorded has no parts
            names = (batch.pixels, batch.target, batch.index, batch.view)
            self.recorded(*names, *(() if taught is None else (taught.out, *(taught.pooled or ()))))  # pyright: ignore
        else:
            self._learn(batch, taught)
        if self.ema is not None:
            self.ema.update(self.method.graduate(), step=step)
        self.tally.images += len(batch.names.index)
        self.tally.batches += 1
        self.updating = False

    def _learn_tensors(self, *given: Tensor) -> None:
        """`_learn` of a batch's four tensors, the mentors' logits and pooled vectors."""
        pixels, target, index, view, *answers = given
        taught = View(answers[0], tuple(answers[1:]) or None) if answers else None
        self._learn(Batch(pixels, target, index, view), taught)

    def _learn(self, batch: Batch, taught: View | None) -> None:
        """The arithmetic of a step: forward, loss, backward, optimiser."""
        count = len(batch.names.index)
        size = -(-count // self.accumulate)
        self.optimizer.zero_grad(set_to_none=True)
        lesson = None
        for part_number, lo in enumerate(range(0, count, size)):
            part, answers = take(batch, taught, slice(lo, lo + size))
            with distributed.quiet(self.forward, last=lo + size >= count):
                share = len(part.names.index) / count
                lesson = self.gradients(part, answers, self.at, self.step_number, part_number, share)
        distributed.even_out(self.forward, self.replicated, batch)
        self.updating = True
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert lesson is not None
        self.method.after(lesson)

    def gradients(self, part: Batch, answers: View | None, at: float, step: int, number: int, share: float) -> Lesson:
        """Add a micro-batch's `share` of the gradient and of the tally; `number` is its place in the batch."""
        # compiled for whole batches only, so that the short last one compiles nothing anew
        whole = len(part.names.index) == self.config.batch_size // self.config.accumulate
        with torch.autocast(self.device.type, devices.dtype_of(self.precision), enabled=self.precision != "fp32"):
            own = {name: self._forward(name, part.pixels, whole) for name in self.forward}
            for name, view in own.items():
                strong = part.strong if "two_views" in self.method.needs else None  # else it is a neighbour's
                view.strong = None if strong is None else self._forward(name, strong, whole)
        views = {name: shards.whole(view, part) for name, view in own.items()}
        if number:  # micro-batches draw different noise
            self._seed_noise(step, number)
        lesson = self._lesson(part, views, answers, at, step)
        terms = self.method.loss(lesson, self.phase)
        self.scaler.scale(sum(terms.values(), torch.zeros((), device=self.device)) * share).backward()
        self._note(lesson, terms, share)
        return lesson

    def _forward(self, name: str, pixels: Tensor, whole: bool) -> View:
        """A learner's answer."""
        eager = name == "student" and not whole and distributed.alone()
        module = self.student if eager else self.forward[name]
        if not self.needs:
            return View(module(pixels))
        out, maps, pooled = module(pixels, self.needs)
        return View(out, pooled, maps)

    @property
    def coupled(self) -> bool:
        """Whether a micro-batch would be another batch to the method's equation."""
        return "full_batches" in self.method.needs

    def look(self, batch: Batch) -> View:
        """The student's answer to a batch that teaches it nothing."""
        return self._look(self.student, batch)

    @torch.no_grad()
    def _look(self, member: Member, batch: Batch) -> View:
        """A learner's answer in eval mode, without gradient; its mode is put back."""
        training = member.training
        view = member.eval().see(batch.pixels, self.needs)
        strong = batch.strong if "two_views" in self.method.needs else None
        view.strong = None if strong is None else member.see(strong, self.needs)
        member.train(training)
        return view

    def lesson(self, batch: Batch, mentors: View | None, epoch: float, step: int) -> Lesson:
        """A lesson that teaches the student nothing: its answer in eval mode, without gradient."""
        self._seed_noise(step)
        views = {name: self._look(one, batch) for name, one in self.readers.items()}
        return self._lesson(batch, views, self._mine(mentors), epoch, step)

    def _mine(self, mentors: View | None) -> View | None:
        """Of the mentors' answer what this learner would be given if it were alone."""
        view = mentors.deep if mentors is not None and mentors.deep is not None and self.needs else mentors
        if view is None or not isinstance(view.maps, tuple) or "pre" in self.needs:
            return view
        return replace(view, maps=tuple({tap: x for tap, x in each.items() if not is_pre(tap)} for each in view.maps))

    def _lesson(self, batch: Batch, views: dict[str, View], mentors: View | None, epoch: float, step: int) -> Lesson:
        student, names = views["student"], batch.names
        return Lesson(names.target, names.index, epoch, step, self.task, self.generator, student, views, mentors)

    def _seed_noise(self, step: int, part: int = 0) -> None:
        self.generator.manual_seed(_mix(self.config.seed, step, 1 + part))

    @torch.no_grad()
    def _note(self, lesson: Lesson, terms: Terms, share: float) -> None:
        for name, value in terms.items():
            bad = torch.where(torch.isfinite(value.detach()), math.inf, self.now)
            known = self.first_bad.setdefault(name, bad.clone())
            torch.minimum(known, bad, out=known)  # in place: a recorded step writes where it wrote before
        right = self.task.metrics(lesson.student.out, lesson.target)["top1"]
        self.tally.add({"right": right})
        self.tally.add({f"term/{name}": value * share for name, value in terms.items()})
        self.tally.add({f"note/{name}": value * share for name, value in lesson.notes.items()})

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

    def weights(self) -> dict[str, Tensor]:
        """A copy of the graduate's weights, on the CPU, under the names it ships with."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.graduate().net.state_dict().items()}

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
        self.tally.clear()
        return row

    def state(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "learners": {name: module.state_dict() for name, module in self.method.learners().items()},
            "trained": {
                name: {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                for name, (optimizer, _, scaler) in self.trained.items()
            },
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "phase": self.phase_number,
            "tally": self.tally.state(),
            "best": self.best,
            "accumulate": self.accumulate,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`. Raises RuntimeError/KeyError when it belongs to another recipe."""
        for number in range(state["phase"] + 1 if state["phase"] != self.phase_number else 0):
            self._enter(number)  # one after the other, for each may have an optimiser of its own
        self.method.load_state_dict(state["method"])
        for name, module in self.method.learners().items():
            module.load_state_dict(state["learners"][name])
        for name, kept in state["trained"].items():
            optimizer, _, scaler = self.trained[name]
            optimizer.load_state_dict(kept["optimizer"])
            scaler.load_state_dict(kept["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.tally.load(state["tally"], self.device)
        self.best, self.accumulate = state["best"], state["accumulate"]


def keep(run: Run, stem: str, learner: Learner, epoch: int, top1: float, state: dict[str, Tensor]) -> None:
    """Write a graduate's `weights` as `stem`.safetensors with its card beside it."""
    cards.save(run.path, stem, state, card(learner.graduate(), learner.classroom.data, epoch, top1, str(run.path)))


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
        created=cards.stamp(),
        epoch=epoch,
        params=sum(p.numel() for p in member.net.parameters()),
        graduate=graduates.told(member.net),
    )


def check_method(method: methods.Method, recipe: Recipe, classroom: Classroom) -> None:
    """Refuse, before anything is trained, settings that the method's equation cannot mean."""
    name = recipe.method.label
    if len(classroom.mentors) < method.teachers:
        raise RecipeError(
            f"method {name} learns from mentors, and {len(classroom.mentors) or 'none'} is named, where it needs "
            f"{method.teachers}",
            hint="Add --teacher NAME (and --peers A,B).",
        )
    if "hard_target" in method.needs and (recipe.train.mixup or recipe.train.cutmix):
        raise RecipeError(
            f"method {name} marks answers by one true class, which mixup and cutmix take away",
            hint="--set train.mixup=0 --set train.cutmix=0, or a method without marks (kd, aver).",
        )
    mixing = recipe.train.mixup or recipe.train.cutmix
    if method.needs & {"index", "two_views"} and mixing:
        what = "remembers single images by their number" if "index" in method.needs else "reads each image twice"
        raise RecipeError(
            f"method {name} {what}, and mixup and cutmix make one of two",
            hint="--set train.mixup=0 --set train.cutmix=0",
        )
    few, left = recipe.train.batch_size // recipe.train.accumulate, len(classroom.data.train) % recipe.train.batch_size
    if "pairs" in method.needs and (few < 2 or (left == 1 and not recipe.train.drop_last)):
        where = "the last batch of an epoch" if few >= 2 else "a batch"
        raise RecipeError(
            f"method {name} compares the images of a batch, and {where} is one image "
            f"({len(classroom.data.train)} images in batches of {recipe.train.batch_size})",
            hint="--set train.drop_last=true"
            if few >= 2
            else "A larger --set train.batch_size, and train.accumulate=1.",
        )
    if recipe.classroom.bank and method.teachers and method.needs & {"maps", "pre", "two_views"}:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' intermediate maps or a second view, and a bank "
            "keeps logits (and pooled vectors) of one",
            hint="--set classroom.bank=false",
        )
    if recipe.classroom.bank and method.teachers and "pooled" in method.needs and not recipe.classroom.bank_pooled:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' pooled features, which this bank leaves out",
            hint="--set classroom.bank_pooled=true, or --set classroom.bank=false.",
        )
    if "full_batches" in method.needs and recipe.train.accumulate > 1:
        raise RecipeError(
            f"train.accumulate = {recipe.train.accumulate}: method {name} looks at a whole batch at once, and "
            "micro-batches would be other batches",
            hint="--set train.accumulate=1" + (", or --set method.ranking=sample." if name == "classroom" else ""),
        )


def check_graph(method: methods.Method, recipe: Recipe, device: torch.device, precision: str) -> None:
    """Refuse to record a step as a CUDA graph where it would not be the same arithmetic every time."""
    train = recipe.train
    reasons = {
        f"{device.type} has none": device.type != "cuda",
        "fp16 skips updates": precision == "fp16",
        f"train.accumulate = {train.accumulate} seeds in between": train.accumulate > 1,
        f"train.optimizer = {train.optimizer!r} is not sgd, adam or adamw": train.optimizer not in GRAPHED,
        f"method {recipe.method.label} counts steps on the host": not method.capturable,
        "several ranks exchange answers within a step": not distributed.alone(),
        f"method {recipe.method.name} reads intermediate maps or two views": bool(
            method.needs & {"maps", "pre", "two_views"}
        ),
    }
    if train.cuda_graph and (why := [reason for reason, true in reasons.items() if true]):
        raise RecipeError(f"train.cuda_graph: {'; '.join(why)}", hint="--set train.cuda_graph=false")


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
            **({"fused": True} if config.cuda_graph else {}),  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        known = [str(name) for name in list_optimizers()]
        raise RecipeError(
            f"train.optimizer = {config.optimizer!r}: {error}", hint=did_you_mean(config.optimizer, known)
        ) from None


def take(batch: Batch, taught: View | None, rows: slice) -> tuple[Batch, View | None]:
    """Some rows of a batch, with the mentors' answers to them."""
    if rows.start == 0 and rows.stop >= len(batch.names.index):
        return batch, taught
    return shards.micro(batch, rows.start, rows.stop), None if taught is None else taught.of_mentors(rows)


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
