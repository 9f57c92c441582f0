"""A learner: one student with its method and optimizer, and the step that trains it.

The file is long because everything that happens in a step is here.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from kdcli import methods
from kdcli.data import Batch
from kdcli.errors import DivergedError
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import rows_of
from kdcli.methods import Lesson, Need, SetupContext, Terms
from kdcli.models.member import FEATURES, Member
from kdcli.models.outputs import Output
from kdcli.models.taps import is_pre
from kdcli.recipe import Recipe
from kdcli.system import device as devices, distributed
from kdcli.system.cuda_graph import Captured
from kdcli.tasks import TASKS, Score, Task
from kdcli.tasks.base import plain
from kdcli.training import schedule
from kdcli.training.checks import check_graph, check_method, check_task
from kdcli.training.gather import all_rows
from kdcli.training.meters import EpochMeter
from kdcli.training.optim import make_optimizer
from kdcli.training.out_of_memory import FEWEST, Snapshot, out_of_memory


class Learner:
    """One student with its method and optimizer. Everything random in it is a function of (train.seed, step)."""

    def __init__(self, name: str, recipe: Recipe, classroom: Classroom, steps_per_epoch: int) -> None:
        self.name, self.recipe, self.classroom = name, recipe, classroom
        self.device, self.config = classroom.device, recipe.train
        check_task(TASKS[recipe.task], self.config)
        _seed(self.config.seed, self.device)  # for parameters that the method creates in its constructor or setup
        self.method = methods.build(recipe.method.name, recipe.method.options)
        data = classroom.data
        check_method(self.method, recipe, data, len(classroom.mentors))
        mixing = bool(self.config.mixup or self.config.cutmix)  # these apply label smoothing to the targets
        self.task: Task = TASKS[recipe.task](len(data.classes), 0.0 if mixing else self.config.label_smoothing)
        self.precision, self.precision_why = devices.precision(self.config.precision, self.device, frozen=False)
        check_graph(self.method, recipe, self.device, self.precision)
        self.generator = torch.Generator(self.device)
        self.student = classroom.student(self.config.seed)
        self.needs, self.readers = self.method.needs & FEATURES, {"student": self.student}
        self.method.context = SetupContext(
            self.student, classroom.mentors, data, self.task, self.config, self.device, classroom.student
        )
        self.method.setup(self.method.context, self._first_lesson())
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
        self.accumulate = self.config.accumulate  # micro-batches per update; more after an out-of-memory error
        self.fitted: set[tuple[int, ...]] = set()  # (phase, micro-batches, images) of steps that memory held
        self.updating = False  # in the part of a step after the gradients, which cannot be undone
        self.trained: dict[str, tuple[Optimizer, Scheduler, GradScaler]] = {}  # by name: phases of one name share it
        self._enter(0)

    def _first_lesson(self) -> Lesson | None:
        """A real lesson of two images, by which a method sizes its parts; None for methods that read only logits."""
        if not self.method.needs - {Need.HARD_TARGET, Need.FULL_BATCHES, Need.PAIRS}:
            return None
        batch, two = next(self.classroom.data.train.plain(2, self.device)), Need.TWO_VIEWS in self.method.needs
        batch.strong = batch.images if two else None
        with torch.no_grad():
            mentors = [mentor.see(batch.images, self.needs) for mentor in self.classroom.mentors]
            mentors = [Output(one.out.float(), one.pooled, one.maps) for one in mentors]
        for one in mentors:
            one.strong = Output(one.out, one.pooled, one.maps) if two else None
        return self.lesson(batch, mentors, 0.0, 0)

    def _enter(self, number: int) -> None:
        """Begin a phase: an optimizer for its learners and the method's own parameters."""
        self.phase_number, self.phase = number, self.phases[number]
        learners = self.method.learners()
        learning = [learners[name] for name in self.phase.learners]
        for module in learners.values():
            module.requires_grad_(any(module is one for one in learning))
        parts = nn.ModuleList([*learning, self.method])
        config, of_name = self.phase.train, [phase for phase in self.phases if phase.name == self.phase.name]
        if self.phase.name not in self.trained:
            optimizer = make_optimizer(parts, config)
            rates = schedule.build(optimizer, config, sum(phase.epochs for phase in of_name), self.steps_per_epoch)
            scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # pyright: ignore
            self.trained[self.phase.name] = optimizer, rates, scaler
        self.optimizer, self.schedule, self.scaler = self.trained[self.phase.name]
        self.rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
        self.parameters = [p for p in parts.parameters() if p.requires_grad]
        self.meter, self.first_bad = EpochMeter(), {}
        self.captured = Captured(self._learn_leaves, (self.generator,)) if config.cuda_graph else None
        self.readers |= {name: module for name, module in learners.items() if isinstance(module, Member)}
        self.forward = {
            name: distributed.data_parallel(
                self.compiled if module is self.student else module, name in self.phase.learners
            )
            for name, module in self.readers.items()
        }
        averaged = {p for module in self.forward.values() for p in module.parameters()}
        self.replicated = [p for p in self.parameters if p not in averaged]

    def begin_epoch(self, epoch: int, train_pass: Callable[[], Iterator[Lesson]], *, again: bool = False) -> None:
        """Enter the phase of `epoch` (from 0) and put its learners in training mode.

        `again`: the epoch had begun when the loaded checkpoint was written; the method's `begin_epoch` is not called.
        """
        start, number = 0, 0
        while epoch >= start + self.phases[number].epochs:
            start, number = start + self.phases[number].epochs, number + 1
        if number != self.phase_number:
            self._enter(number)
        before = sum(phase.epochs for phase in self.phases[:number] if phase.name == self.phase.name)
        self.phase_start = start - before  # as if the phases of this name were one, with no others in between
        self.method.train()  # first, since learners may be submodules of it
        for name, module in self.method.learners().items():
            module.train(name in self.phase.learners)  # in eval mode the others keep their batch statistics
        if not again:
            _seed(_mix(self.config.seed, epoch, 0), self.device)  # steps mix in 1 and more
            self.method.begin_epoch(epoch, train_pass)

    def step(self, batch: Batch, mentors: list[Output], epoch: int, number: int, step: int) -> str:
        """One update, without copying any value to the host.

        `number` is the batch's place in the epoch, `step` counts all updates. If memory runs out, this and all later
        steps use micro-batches of half the size; returns a notice of that, else an empty string. Raises OutOfMemory
        where that would change the loss or does not help.
        """
        mentors, images, notice = self._select(mentors), len(batch.global_batch.index), ""
        schedule.set_lr(
            self.schedule, epoch - self.phase_start, (epoch - self.phase_start) * self.steps_per_epoch + number
        )
        if self.config.cuda_graph:  # a captured update reads its rates from these tensors
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])
        self.now.fill_(step)
        self.step_number, self.at = step, epoch + number / self.steps_per_epoch
        while True:
            size = (self.phase_number, self.accumulate, images)
            snapshot = None if size in self.fitted else Snapshot([*self.method.learners().values(), self.method])
            meter = self.meter.state()
            try:
                _seed(_mix(self.config.seed, step, *distributed.seed_offset()), self.device)
                self._seed_noise(step)
                if self.captured is not None and self.accumulate == 1:  # the captured step has no micro-batches
                    self._replay(batch, mentors)
                else:
                    self._learn(batch, mentors)
                if self.ema is not None:
                    self.ema.update(self.method.graduate(), step=step)
                break
            except RuntimeError as error:
                if not devices.out_of_memory(error):
                    raise
            # after the except block, since the error keeps the failed step's tensors
            notice = self._smaller(images, snapshot, meter)
        self.fitted.add(size)
        self.meter.batches += 1
        self.updating = False
        return notice

    def _smaller(self, images: int, snapshot: Snapshot | None, meter: dict[str, Any]) -> str:
        """After an out-of-memory error: undo the failed step and halve its micro-batches; returns what to report."""
        size = -(-images // self.accumulate)
        if self.updating:
            what, cure = "in the optimizer's update", "--set train.optimizer=sgd keeps one number per weight, adamw two"
            raise out_of_memory(self.name, what, self.device, f"{cure}; or a smaller student.")
        if self.needs_full_batch or not distributed.alone():
            couples = f" Method {self.recipe.method.label} couples the samples of a batch, so it cannot be split."
            cure = f"--set train.batch_size={max(images // 2, 1)} or a smaller one."
            what = f"in a step of {images} images"
            raise out_of_memory(self.name, what, self.device, cure + (couples if self.needs_full_batch else ""))
        if size < 2 * FEWEST:
            cure = f"Not even {size} images fit: a smaller student or image size, or fewer mentors."
            raise out_of_memory(self.name, f"in a step of {size} images", self.device, cure)
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.load(meter, self.device)
        if snapshot is not None:
            snapshot.restore()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.accumulate *= 2
        return (
            f"{self.name}: out of memory, so batches of {images} are trained in {self.accumulate} micro-batches of "
            f"{-(-images // self.accumulate)} from here on (train.accumulate = {self.accumulate}); gradients stay "
            "those of the whole batch, batch-norm statistics are now the micro-batches'"
        )

    def _replay(self, batch: Batch, mentors: list[Output]) -> None:
        """`_learn` as a CUDA graph, whose inputs can only be tensors."""
        assert self.captured is not None
        leaves, self._spec = tree_flatten(((batch.images, batch.target, batch.index, batch.view), mentors))
        self._present = [leaf is not None for leaf in leaves]
        self.captured(*(leaf for leaf in leaves if leaf is not None))

    def _learn_leaves(self, *tensors: Tensor) -> None:
        """`_learn` with the batch and the mentors' outputs as a flat list of tensors, those that are None left out."""
        given = iter(tensors)
        fields, mentors = tree_unflatten([next(given) if there else None for there in self._present], self._spec)
        self._learn(Batch(*fields), mentors)

    def _learn(self, batch: Batch, mentors: list[Output]) -> None:
        """The arithmetic of a step: forward, loss, backward, optimizer."""
        count = len(batch.global_batch.index)
        size = -(-count // self.accumulate)
        self.optimizer.zero_grad(set_to_none=True)
        lesson = None
        for part_number, start in enumerate(range(0, count, size)):
            end = min(start + size, count)
            part, outputs = batch.micro(start, end), rows_of(mentors, slice(start, end))
            with distributed.no_sync(self.forward, last=end >= count):
                lesson = self._add_gradients(part, outputs, part_number, (end - start) / count)
        if batch.whole is not None:
            distributed.sync_stats_and_grads(self.forward, self.replicated, len(batch.index) / batch.whole.size)
        self.updating = True
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert lesson is not None
        self.method.after(lesson)

    def _add_gradients(self, part: Batch, mentors: list[Output], number: int, share: float) -> Lesson:
        """Add a micro-batch's gradient and meter values times its `share` of the batch; `number` counts from 0."""
        # compiled for whole batches only, so that the short last one is not compiled again
        whole = len(part.global_batch.index) == self.config.batch_size // self.config.accumulate
        with torch.autocast(self.device.type, devices.dtype_of(self.precision), enabled=self.precision != "fp32"):
            own = {name: self._forward(name, part.images, whole) for name in self.forward}
            for name, output in own.items():
                strong = part.strong if Need.TWO_VIEWS in self.method.needs else None  # or it is for another learner
                output.strong = None if strong is None else self._forward(name, strong, whole)
        outputs = own if part.whole is None else all_rows(own, part.whole.layout)
        if number:  # micro-batches draw different noise
            self._seed_noise(self.step_number, number)
        lesson = self._lesson(part, outputs, mentors, self.at, self.step_number)
        terms = self.method.loss(lesson, self.phase)
        self.scaler.scale(sum(terms.values(), torch.zeros((), device=self.device)) * share).backward()
        self._note(lesson, terms, share)
        return lesson

    def _forward(self, name: str, images: Tensor, whole: bool) -> Output:
        """A learner's output."""
        eager = name == "student" and not whole and distributed.alone()
        module = self.student if eager else self.forward[name]
        if not self.needs:
            return Output(module(images))
        out, maps, pooled = module(images, self.needs)
        return Output(out, pooled, maps)

    @property
    def needs_full_batch(self) -> bool:
        """True if the loss couples samples, so that gradient accumulation would change it."""
        return Need.FULL_BATCHES in self.method.needs

    @torch.no_grad()
    def eval_forward(self, member: Member, batch: Batch) -> Output:
        """Forward in eval mode without gradient; restores the mode."""
        training = member.training
        output = member.eval().see(batch.images, self.needs)
        strong = batch.strong if Need.TWO_VIEWS in self.method.needs else None
        output.strong = None if strong is None else member.see(strong, self.needs)
        member.train(training)
        return output

    def lesson(self, batch: Batch, mentors: list[Output], epoch: float, step: int) -> Lesson:
        """A lesson outside training: outputs in eval mode, without gradient."""
        self._seed_noise(step)
        outputs = {name: self.eval_forward(one, batch) for name, one in self.readers.items()}
        return self._lesson(batch, outputs, self._select(mentors), epoch, step)

    def _select(self, mentors: list[Output]) -> list[Output]:
        """The mentor outputs that this learner needs, the same as if it trained alone."""
        if Need.PRE in self.needs or not any(one.maps for one in mentors):
            return mentors
        stages = [{tap: x for tap, x in (one.maps or {}).items() if not is_pre(tap)} for one in mentors]
        return [Output(one.out, one.pooled, maps, one.strong) for one, maps in zip(mentors, stages, strict=True)]

    def _lesson(
        self, batch: Batch, outputs: dict[str, Output], mentors: list[Output], epoch: float, step: int
    ) -> Lesson:
        student, names = outputs["student"], batch.global_batch
        return Lesson(names.target, names.index, epoch, step, self.task, self.generator, student, outputs, mentors)

    def _seed_noise(self, step: int, part: int = 0) -> None:
        self.generator.manual_seed(_mix(self.config.seed, step, 1 + part))

    @torch.no_grad()
    def _note(self, lesson: Lesson, terms: Terms, share: float) -> None:
        for name, value in terms.items():
            bad = torch.where(torch.isfinite(value.detach()), math.inf, self.now)
            known = self.first_bad.setdefault(name, bad.clone())
            torch.minimum(known, bad, out=known)  # in place: a captured step always writes to the same memory
        self.meter.add({f"sum/{name}": x for name, x in self.task.sums(lesson.student.out, lesson.target).items()})
        self.meter.add({f"term/{name}": value * share for name, value in terms.items()})
        self.meter.add({f"note/{name}": value * share for name, value in lesson.notes.items()})

    def check(self) -> None:
        """Raise DivergedError if a term was not finite since the last check; waits for the device."""
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
        """Raise DivergedError unless all weights are finite: an update can overflow after a finite loss."""
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

    def training_score(self) -> Score:
        """The task's metrics over the training batches of this epoch so far; waits for the device."""
        return self.task.score(plain(self.meter.totals("sum/")))

    def note_best(self, epoch: int, chosen: float, test: Score, keep_weights: bool) -> None:
        """Remember an epoch (counted from 1) if its `chosen` figure is the best so far."""
        sign = 1 if test.primary.higher else -1
        if sign * chosen > sign * self.best.get("chosen", -sign * math.inf):
            self.best = {"epoch": epoch, "chosen": chosen, "score": dict(test)}
            if keep_weights:  # only a held-out slice may choose the weights, never the test set
                self.best["weights"] = self.weights()

    def row(self, epoch: int, scores: dict[str, Score]) -> dict[str, Any]:
        """The metrics of an epoch (counted from 1) under the names they are plotted by; clears the meter."""
        row: dict[str, Any] = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        primary, terms = self.task.metrics[0], self.meter.means("term/")
        row[f"train/{primary.name}"] = self.training_score().value
        row["train/loss"] = sum(terms.values())
        row |= {f"loss/{name}": value for name, value in terms.items()}
        models = ["student", *(member.name for member in self.classroom.mentors)]
        for name, value in self.meter.means("note/").items():
            if isinstance(value, list):
                who = models if len(value) == len(models) else models[1:]
                row |= {f"{name}/{model}": number for model, number in zip(who, value, strict=True)}
            else:
                row[name] = value
        for split, found in scores.items():
            row |= {f"{split}/{metric}": value for metric, value in found.items()}
        self.meter.clear()
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
            "meter": self.meter.state(),
            "best": self.best,
            "accumulate": self.accumulate,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`. Raises RuntimeError or KeyError when it belongs to another recipe."""
        for number in range(state["phase"] + 1 if state["phase"] != self.phase_number else 0):
            self._enter(number)  # in order, since each may have its own optimizer
        self.method.load_state_dict(state["method"])
        for name, module in self.method.learners().items():
            module.load_state_dict(state["learners"][name])
        for name, kept in state["trained"].items():
            optimizer, _, scaler = self.trained[name]
            optimizer.load_state_dict(kept["optimizer"])
            scaler.load_state_dict(kept["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.meter.load(state["meter"], self.device)
        self.best, self.accumulate = state["best"], state["accumulate"]


def _seed(seed: int, device: torch.device) -> None:
    """Seed dropout and other noise of one learner's next step; cheaper than torch.manual_seed on all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _mix(*parts: int) -> int:
    """One 63-bit seed from several numbers (the finaliser of splitmix64)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
