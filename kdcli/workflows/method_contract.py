"""The contract of methods: what `kdcli check --method` tests, on a classroom of small networks.

A check is a function of (toy, method's name, options). It returns if the method keeps the rule, raises `Broken` if it
does not, and `Idle` if the rule does not apply to the method. The file is long because all rules are in one place; what
the engine guarantees whatever the method is tested in tests/contract.
"""

import copy
import io
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F

from kdcli import methods
from kdcli.data import Batch
from kdcli.errors import RecipeError
from kdcli.mentors.mentors import rows_of
from kdcli.methods import Lesson, Method, Need, Phase
from kdcli.system import user_code
from kdcli.tasks import TASKS
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.student import save_student, student_of
from kdcli.workflows.toy_classroom import (
    CLASSES,
    FEATURES,
    Broken,
    Change,
    Check,
    Idle,
    Options,
    Subject,
    Toy,
    fingerprint,
    leaves,
    need,
    remade,
    train,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Verdict:
    """One row of what `kdcli check` prints about a method."""

    check: str
    result: str  # passed | failed | not applicable
    reason: str


def examine(name: str, options: Options, device: torch.device) -> Iterator[Verdict]:
    """Run every check: on the CPU, where equal means equal to the bit, and the one about synchronisation on a GPU.

    Raises RecipeError if the method cannot be created with these options.
    """
    task = task_of(methods.build(name, options))
    toy = Toy(torch.device("cpu"), task)
    for words, check in CHECKS.items():
        try:
            used = Toy(device, task) if check is no_step_waits and device.type == "cuda" else toy
            used.put(check, name, options)
        except Idle as why:
            yield Verdict(words, "not applicable", str(why))
        except Broken as how:
            yield Verdict(words, "failed", str(how))
        else:
            yield Verdict(words, "passed", "")


def task_of(method: Method) -> str:
    """The task on which a method is checked: the first one of TASKS that it is for."""
    return next(task for task in TASKS if task in method.tasks)


def hard_loss(one: Learner, batch: Batch) -> float:
    """The task's loss of the graduate in eval mode."""
    graduate = one.graduate()
    modes = {part: part.training for part in graduate.modules()}
    with torch.no_grad():
        loss = one.task.hard(graduate.eval()(batch.images), batch.target).mean().item()
    for part, mode in modes.items():
        part.training = mode
    return loss


def finite(terms: dict[str, float]) -> bool:
    return all(map(math.isfinite, terms.values()))


def close(a: float, b: float, share: float = 1.3e-6, least: float = 1e-5) -> bool:
    return abs(a - b) <= share * max(abs(a), abs(b)) + least


def all_close(a: dict[str, float], b: dict[str, float], share: float) -> bool:
    return a.keys() == b.keys() and all(close(a[key], b[key], share, 1e-6) for key in a)


# --- a method's loss alone --------------------------------------------------------------------------------------------


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float() for value in terms.values()]).sum()


def terms_are_sound(toy: Toy, name: str, options: Options) -> None:
    """Named scalars of float32, `hard` among them (at the latest in the last phase), with a gradient to what learns;
    notes that can be logged."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        lesson = remade(given)
        terms = subject.terms(phase, lesson)
        missing = f"loss gives {', '.join(terms) or 'nothing'}: the task's own term `hard` is missing"
        need("hard" in terms or (terms and phase is not subject.lessons[-1][0]), missing)
        for key, value in terms.items():
            shape = "x".join(map(str, value.shape))
            need(value.shape == (), f"the term {key!r} is not a scalar but [{shape}]")
            need(value.dtype == torch.float32, f"the term {key!r} is {value.dtype}: losses are float32")
            need(torch.isfinite(value), f"the term {key!r} is {value.item()}")
        count = len(lesson.mentors)
        for key, note in lesson.notes.items():
            fits = f"the note {key!r} is {list(note.shape)}: [], [{count}] (mentors) or [{count + 1}] (student first)"
            need(note.shape in {(), (count,), (count + 1,)}, fits)
            need(not note.requires_grad, f"the note {key!r} keeps the graph: detach it")
            need(torch.isfinite(note).all(), f"the note {key!r} is not finite")
        loss = total(terms)
        need(loss.requires_grad, f"nothing learns from the loss of phase {phase.name}")
        reached = [x for x in (*leaves(lesson).values(), *subject.weights(phase)) if x.requires_grad]
        found = [grad for grad in torch.autograd.grad(loss, reached, allow_unused=True) if grad is not None]
        need(all(torch.isfinite(grad).all() for grad in found), "a gradient is not finite")
        need(any(grad.abs().max() > 0 for grad in found), f"the gradient of phase {phase.name} is zero everywhere")


EXTREMES = (
    ("wrong", ("right", "wrong", "right")),
    ("wrong", ("wrong", "spike", "wrong")),
    ("right", ("wrong", "wrong", "spike")),
    ("spike", ("right", "onehot", "low")),
    ("high", ("low", "wrong", "onehot")),
    ("onehot", ("mixed", "high", "wrong")),
    ("mixed", ("right", "mixed", "spike")),
    ("right", ("right", "right", "right")),
)
"""Patterns of logits: the student's and the three mentors'."""


def pattern(kind: str, right: Tensor) -> Tensor:
    """Logits [B, K] at the limits of half precision; `right` is one-hot (multilabel: several classes)."""
    wrong = right.roll(1, -1)
    halves = torch.arange(len(right), device=right.device)[:, None] % 2 == 0
    return {
        "right": 2e4 * right - 1e4,
        "wrong": 2e4 * wrong - 1e4,
        "spike": 1e4 * wrong,
        "high": torch.full_like(right, 1e4),
        "low": torch.full_like(right, -1e4),
        "onehot": right,
        "mixed": torch.where(halves, 2e4 * right - 1e4, 2e4 * wrong - 1e4),
    }[kind]


def extremes_stay_finite(toy: Toy, name: str, options: Options) -> None:
    """Logits up to 1e4 in float32, bfloat16 and float16, and features that are zero, large or equal: loss and gradient
    are finite."""
    subject = toy.subject(name, options)
    deep = bool(subject.method.needs & FEATURES)
    for phase, given in subject.lessons:
        number = torch.arange(len(given.target), device=toy.device) % CLASSES
        target = number if given.target.ndim == 1 else given.target
        right = F.one_hot(number, CLASSES).float() if given.target.ndim == 1 else given.target

        def check(change: Change, what: str, phase: Phase = phase, given: Lesson = given, y: Tensor = target) -> None:
            lesson = remade(given, change, target=y)
            terms = subject.terms(phase, lesson)
            bad = [key for key, value in terms.items() if not torch.isfinite(value)]
            need(not bad, f"{what}: the term {' and '.join(bad)} is not finite")
            reached = [x for x in (*leaves(lesson).values(), *subject.weights(phase)) if x.requires_grad]
            if (loss := total(terms)).requires_grad:
                for x, grad in zip(reached, torch.autograd.grad(loss, reached, allow_unused=True), strict=True):
                    need(grad is None or torch.isfinite(grad).all(), f"{what}: a gradient is not finite")
                    need(grad is None or grad.dtype == x.dtype, f"{what}: a gradient is not {x.dtype}")
            need(all(torch.isfinite(note).all() for note in lesson.notes.values()), f"{what}: a note is not finite")

        pairs = [*itertools.product(EXTREMES, DTYPES)]  # every second pair still has all extremes and all types
        for (student, mentors), dtype in pairs[::2] if deep else pairs:
            patterns = {f"mentors[{m}]": pattern(kind, right) for m, kind in enumerate(mentors)}
            own = pattern(student, right)

            def logits(where: str, x: Tensor, patterns: Any = patterns, own: Tensor = own, dtype: Any = dtype) -> Any:
                if where.endswith(".out"):
                    x = patterns.get(where.partition(".")[0], own)
                return x.to(dtype)

            check(logits, f"student's logits {student!r}, mentors' {mentors} in {dtype}")
        for what, dtype in itertools.product(("zero", "large", "equal"), DTYPES) if deep else ():

            def features(where: str, x: Tensor, what: str = what, dtype: Any = dtype) -> Tensor:
                if not where.endswith(".out"):
                    x = {"zero": 0 * x, "large": x.clamp(-1, 1) * 1e4, "equal": x[:1].expand_as(x)}[what]
                return x.to(dtype)

            check(features, f"features {what} in {dtype}")


def half_is_float(toy: Toy, name: str, options: Options) -> None:
    """The loss of bfloat16 outputs equals the loss of the same values in float32."""
    subject = toy.subject(name, options)
    share = 1e-2 if subject.method.runs_networks else 1.3e-6
    for phase, given in subject.lessons:
        low = subject.terms(phase, remade(given, lambda _, x: x.bfloat16()))
        for key, value in subject.terms(phase, remade(given, lambda _, x: x.bfloat16().float())).items():
            need(
                close(low[key].item(), value.item(), share),
                f"{key}: {low[key].item():.6g} in bfloat16, {value.item():.6g} in float32 from the same numbers: "
                "compute in .float()",
            )


def steps_are_alike(toy: Toy, name: str, options: Options) -> None:
    """Unless it has `capturable = False`, a loss reads neither epoch nor step and counts nothing outside of tensors."""
    subject = toy.subject(name, options)
    if not subject.method.capturable:
        raise Idle("capturable = False")
    for phase, given in subject.lessons:
        lessons = remade(given), remade(given, epoch=given.epoch + 7.5, step=given.step + 750)
        here, there = ({k: v.item() for k, v in subject.terms(phase, lesson).items()} for lesson in lessons)
        need(
            all_close(here, there, 1e-6),
            "the same lesson at another step has another loss: capturable = False is missing",
        )


def nothing_is_read_back(toy: Toy, name: str, options: Options) -> None:
    """`loss` and `after` copy no value to the host (`.item()`, `if tensor`, masks as index): fake tensors have none."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        subject.restore(phase)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                target, index = mode.from_tensor(given.target), mode.from_tensor(given.index)
                lesson = remade(given, lambda _, x: mode.from_tensor(x), target=target, index=index)
                terms = subject.method.loss(lesson, phase)
                need(all(value.shape == () for value in terms.values()), "a term is not a scalar")
                subject.method.after(lesson)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            where = user_code.blame(error) or f"phase {phase.name}: "
            raise Broken(f"{where}a value is read back to the host, or decides a shape ({error.func})") from error
        finally:
            subject.restore(phase)


def no_step_waits(toy: Toy, name: str, options: Options) -> None:
    """On a GPU neither loss nor backward nor `after` makes the host wait."""
    if toy.device.type != "cuda":
        raise Idle("only on CUDA")
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        total(subject.terms(phase, remade(given))).backward()  # a first time: handles that torch creates on first use
        subject.restore(phase)
        lesson = remade(given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            total(subject.method.loss(lesson, phase)).backward()
            subject.method.after(lesson)
        except RuntimeError as error:
            raise Broken(f"phase {phase.name}: {user_code.words(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
            subject.method.zero_grad()


def peers_targets_are_detached(toy: Toy, name: str, options: Options) -> None:
    """If learners teach each other, a term's gradient to one learner's output does not depend, in the graph, on
    another's: targets are detached."""
    subject = toy.subject(name, options)
    if len(subject.lessons[0][1].outputs) == 1:
        raise Idle("only one learner reads images")
    for phase, given in subject.lessons:
        lesson = remade(given)
        places = leaves(lesson)
        for (key, value), who in itertools.product(subject.terms(phase, lesson).items(), lesson.outputs):
            mine = [x for place, x in places.items() if place.startswith(f"{who}.")]
            others = {place: x for place, x in places.items() if not place.startswith(f"{who}.")}
            if not value.requires_grad:
                continue
            first = torch.autograd.grad(value, mine, create_graph=True, allow_unused=True)
            found = [(grad * torch.rand_like(grad)).sum() for grad in first if grad is not None]
            if not found or not (mixed := torch.stack(found).sum()).requires_grad:
                continue
            back = torch.autograd.grad(mixed, list(others.values()), retain_graph=True, allow_unused=True)
            for place, grad in zip(others, back, strict=True):
                need(
                    grad is None or grad.abs().max() == 0,
                    f"the term {key!r}, in which {who} learns, sends a gradient to {place} too: detach the target",
                )


# --- in training ------------------------------------------------------------------------------------------------------


def loss_falls(toy: Toy, name: str, options: Options) -> None:
    """In 20 to 60 steps on one batch the loss of every phase falls, in the last phase by a tenth; so does the
    graduate's loss with the labels, unless features teach, whose weights may dominate at first."""
    one = toy.learner(name, options)
    given = toy.batches(one, 1)
    before = hard_loss(one, given[0][0])
    for phase, epoch in toy.phases(one):
        terms = train(one, given, epoch)
        share = 0.1 if phase.name == one.phases[-1].name else 0.01
        first = sum(terms[0].values())
        wanted = first - share * abs(first)
        while len(terms) < 60 and (len(terms) == 1 or not sum(terms[-1].values()) < wanted):
            terms += train(one, given * 20, epoch)  # a memory that is still filling may need more than 20 steps
        need(all(map(finite, terms)), f"phase {phase.name}: the loss is not finite")
        last, steps = sum(terms[-1].values()), len(terms) - 1
        need(last < wanted, f"phase {phase.name}: {first:.4g} at first, {last:.4g} after {steps} steps")
    after = hard_loss(one, given[0][0])
    need(
        after < before or one.method.needs & FEATURES,
        f"the graduate's loss with the labels goes from {before:.4g} to {after:.4g}",
    )
    one.check()
    one.check_weights()


def only_learners_learn(toy: Toy, name: str, options: Options) -> None:
    """In every phase only the learners that it names change; the others and the mentors get no gradient."""
    one = toy.learner(name, options)
    given = toy.batches(one, 1)
    need(not any(output.out.requires_grad for output in given[0][1]), "mentors' outputs require gradients")
    for phase, epoch in toy.phases(one):
        learners = one.method.learners()
        before = {key: copy.deepcopy(module.state_dict()) for key, module in learners.items()}
        idle = {key: fingerprint([module]) for key, module in learners.items() if key not in phase.learners}
        for module in learners.values():
            module.zero_grad()
        train(one, given, epoch)
        parts = [one.method, *(learners[key] for key in phase.learners)]
        may = {id(p) for module in parts for p in module.parameters() if p.requires_grad}
        optimised = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
        need(optimised == may, f"phase {phase.name} optimises parameters of others than its learners")
        for key in phase.learners:
            now = learners[key].state_dict()
            changed = any(not torch.equal(now[place], old) for place, old in before[key].items())
            need(changed, f"phase {phase.name}: {key} does not learn")
            reached = all(parameter.grad is not None for parameter in learners[key].parameters())
            need(reached or one.method.needs & FEATURES, f"phase {phase.name}: a part of {key} gets no gradient")
        for key, old in idle.items():
            quiet = all(p.grad is None for p in learners[key].parameters())
            need(
                quiet and fingerprint([learners[key]]) == old,
                f"phase {phase.name} changes {key}, which is not one of its learners",
            )
        for member in one.classroom.mentors:
            need(not any(part.training for part in member.modules()), f"{member.name} is not in eval mode")
            for parameter in member.parameters():
                need(parameter.grad is None and not parameter.requires_grad, f"{member.name} gets a gradient")
                need(id(parameter) not in optimised, f"{member.name} is optimised")


def goes_on_as_saved(toy: Toy, name: str, options: Options, **settings: Any) -> None:
    """Saved after some steps of every phase, loaded and continued, it has the same losses and weights."""
    one = toy.learner(name, options, **settings)
    given = toy.batches(one, 4)
    for phase, epoch in toy.phases(one):
        train(one, given[:2], epoch)
        file = io.BytesIO()
        torch.save(one.state(), file)
        two = toy.learner(name, options, **settings)
        two.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        two.begin_epoch(epoch, lambda two=two: toy.train_pass(two), again=True)
        here, there = (train(each, given[2:], epoch, 2) for each in (one, two))
        need(
            here == there,
            f"phase {phase.name}: after loading, the loss is {there[0]} instead of {here[0]}: keep state in buffers, "
            "and draw noise from lesson.generator",
        )
        parts = {**one.method.learners(), "the graduate": one.graduate(), "the method": one.method}
        others = {**two.method.learners(), "the graduate": two.graduate(), "the method": two.method}
        for key, module in parts.items():
            same = fingerprint([module]) == fingerprint([others[key]])
            need(same, f"phase {phase.name}: loaded and continued, {key} has other weights")


def mixup_trains(toy: Toy, name: str, options: Options) -> None:
    """Targets may be shares of classes [B, K], unless its needs refuse mixup and cutmix."""
    if methods.build(name, options).needs & {Need.HARD_TARGET, Need.INDEX, Need.TWO_VIEWS}:
        return
    if not toy.task.mixable:
        raise Idle(f"task {toy.task.name} has no mixed labels")
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        one_hot = F.one_hot(given.target, CLASSES).float()
        plain = subject.terms(phase, remade(given))
        pure = subject.terms(phase, remade(given, target=one_hot))
        need(close(total(pure).item(), total(plain).item()), "one-hot shares have another loss than class numbers")
        mixed = subject.terms(phase, remade(given, target=0.6 * one_hot + 0.4 * one_hot.flip(0)))
        if "hard" in plain:
            other = subject.terms(phase, remade(given, target=given.target.flip(0)))["hard"]
            mixture = 0.6 * plain["hard"].item() + 0.4 * other.item()
            need(close(mixed["hard"].item(), mixture), "`hard` of mixed targets is not the mixture")
    one = toy.learner(name, options, mixup=0.2)
    need(all(map(finite, train(one, toy.batches(one, 2, mixup=0.2)))), "the loss is not finite")


def micro_batches_add_up(toy: Toy, name: str, options: Options) -> None:
    """Two halves of a batch make the update of the whole batch, unless it needs whole batches."""
    if Need.FULL_BATCHES in methods.build(name, options).needs:
        return
    whole, parts = toy.learner(name, options), toy.learner(name, options, accumulate=2)
    given = toy.batches(whole, 1)
    draws = _draws_noise(toy.subject(name, options))
    for phase, epoch in toy.phases(whole, parts):
        for one in (whole, parts):
            one.method.eval()  # batch norm and dropout are not part of the equation
            for module in one.method.learners().values():
                module.eval()
        (here,), (there,) = (train(one, given, epoch) for one in (whole, parts))
        if draws:
            need(finite(there), "the loss of micro-batches is not finite")
            continue
        need(
            all_close(here, there, 1e-4),
            f"phase {phase.name}: {there} in halves, {here} whole: Need.FULL_BATCHES is missing",
        )
        for key, module in whole.method.learners().items():
            for a, b in zip(module.parameters(), parts.method.learners()[key].parameters(), strict=True):
                need(torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"phase {phase.name}: {key} is updated differently")
    if draws:
        raise Idle("it draws noise, which differs between a batch and its halves")


def _draws_noise(subject: Subject) -> bool:
    for phase, given in subject.lessons:
        lesson = remade(given)
        subject.terms(phase, lesson)
        if not torch.equal(lesson.generator.get_state(), remade(given).generator.get_state()):
            return True
    return False


def one_image_is_enough(toy: Toy, name: str, options: Options) -> None:
    """A batch of one image has a finite loss, unless it needs at least two images."""
    if Need.PAIRS in methods.build(name, options).needs:
        return
    one = toy.learner(name, options)
    batch, outputs = toy.batches(one, 1)[0]
    for phase, epoch in toy.phases(one):
        try:
            (terms,) = train(one, [(batch.micro(0, 1), rows_of(outputs, slice(0, 1)))], epoch)
        except Exception as error:
            raise Broken(f"phase {phase.name}: Need.PAIRS is missing: {user_code.words(error)}") from error
        need(finite(terms), f"phase {phase.name}: the loss of one image is {terms}: Need.PAIRS is missing")


def fewest_mentors_suffice(toy: Toy, name: str, options: Options) -> None:
    """It trains with the smallest number of mentors that it names."""
    least = methods.build(name, options).teachers
    one = toy.learner(name, options, mentors=least)
    given = [(batch, outputs[:least]) for batch, outputs in toy.batches(one, 1)]
    need(all(map(finite, train(one, given))), f"the loss with {least} mentors is not finite")


def what_is_logged_is_the_loss(toy: Toy, name: str, options: Options) -> None:
    """An epoch's row has finite numbers under plain names; its terms add up to the loss."""
    one = toy.learner(name, options)
    for step, (batch, outputs) in enumerate(toy.batches(one, 2)):
        one.step(batch, outputs, 0, step, step)
    row = one.row(1, {})
    for key, value in row.items():
        need(isinstance(value, int | float) and math.isfinite(value), f"{key} is logged as {value!r}")
    parts = sum(value for key, value in row.items() if key.startswith("loss/"))
    need(close(row["train/loss"], parts, 1e-6, 1e-9), "the terms do not add up")


def graduate_is_what_ships(toy: Toy, name: str, options: Options) -> None:
    """The graduate gives an output of the task's size, and the same one after it was saved and loaded."""
    one = toy.learner(name, options, student="cifar_resnet10_xxs")
    given = toy.batches(one, 2)
    train(one, given)
    images = given[0][0].images
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        out = one.graduate().eval()(images)
        need(
            out.shape == (len(images), CLASSES), f"the graduate gives {list(out.shape)}, not [{len(images)}, {CLASSES}]"
        )
        need(torch.isfinite(out).all(), "the graduate's output is not finite")
        run, data = Run(Path(folder)), one.classroom.data
        save_student(
            run, "student", one.graduate(), data, task=toy.task.name, epoch=1, score={}, weights=one.weights()
        )  # fmt: skip
        again = student_of(run).to(toy.device)(images)
    need(torch.allclose(out, again, rtol=1e-4, atol=1e-4), "the saved student gives another output than the graduate")


def options_are_typed(toy: Toy, name: str, options: Options) -> None:
    """Every option refuses some kind of value, by its name."""
    for key in methods.options(name):
        refused = False
        for probe in ({"zzz": None}, "zzz", math.nan, [None]):
            try:
                methods.build(name, {**options, key: probe}, "toy")
            except RecipeError as error:
                need(f"method.{key}" in error.message, f"{key} = {probe!r} is refused without its name")
                refused = True
        need(refused, f"{key} takes any value: give it a type")


CHECKS: dict[str, Check] = {
    "options are typed": options_are_typed,
    "terms are finite scalars": terms_are_sound,
    "extreme outputs stay finite": extremes_stay_finite,
    "half precision is float32": half_is_float,
    "steps are alike": steps_are_alike,
    "nothing is read back to the host": nothing_is_read_back,
    "no step waits for the GPU": no_step_waits,
    "peers' targets are detached": peers_targets_are_detached,
    "the loss falls": loss_falls,
    "only learners learn": only_learners_learn,
    "it continues as it was saved": goes_on_as_saved,
    "mixup": mixup_trains,
    "micro-batches": micro_batches_add_up,
    "one image": one_image_is_enough,
    "the fewest mentors suffice": fewest_mentors_suffice,
    "what is logged": what_is_logged_is_the_loss,
    "the graduate is what ships": graduate_is_what_ships,
}
"""Every check by the name that a table shows."""
