"""When memory runs out: the step again in smaller parts where the loss allows it, or an account of who took what."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from kdcli.data import Batch
from kdcli.errors import OutOfMemory
from kdcli.methods import View
from kdcli.system import device as devices, distributed

if TYPE_CHECKING:
    from kdcli.training.learner import Learner
    from kdcli.training.loop import Session

T = TypeVar("T")
FEWEST = 2  # images a micro-batch keeps: batch norm needs two values a channel
Norm = nn.modules.batchnorm._NormBase


def step(
    session: "Session", learner: "Learner", batch: Batch, taught: View | None, epoch: int, number: int, at: int
) -> str:
    """`learner.step`; where memory runs out, again in micro-batches of half the size, kept for the rest of the run.

    A loss that couples the batch is not halved, nor an update that has begun, nor a micro-batch of fewer than 4.
    A failed try leaves nothing: its gradients, its tally and what it did to the batch statistics are taken back. (The
    statistics only where no step of this size has fit yet, so that other steps need not copy them.)
    Returns what should be said of it, or nothing. Raises OutOfMemory (exit 3) with the account.
    """
    said = ""
    while not _fits(learner, len(batch.names.index), lambda: learner.step(batch, taught, epoch, number, at)):
        size = -(-len(batch.index) // learner.accumulate)
        if learner.updating or learner.coupled or size < 2 * FEWEST or not distributed.alone():
            raise _account(session, learner, batch, taught, at)
        learner.accumulate *= 2
        size = -(-len(batch.index) // learner.accumulate)
        said = (
            f"{learner.name}: out of memory, so batches of {len(batch.index)} go through in {learner.accumulate} "
            f"micro-batches of {size} from here on (train.accumulate = {learner.accumulate}); gradients stay those of "
            "the whole batch, batch-norm statistics are now the micro-batches'"
        )
    return said


def accounted(session: "Session", batches: Iterable[T]) -> Iterator[T]:
    """`batches`; where memory runs out while they are drawn and answered, OutOfMemory with the account."""
    source = iter(batches)
    while True:
        try:
            item = next(source)
        except StopIteration:
            return
        except RuntimeError as error:
            if not devices.out_of_memory(error):
                raise
            break  # after the except block, since the error keeps the failed pass's tensors
        yield item
    images = session.config.batch_size * max(session.mentors.ahead, 1)
    raise OutOfMemory(
        f"out of memory while the mentors answered {images} images: {_taken(session)}",
        hint="Fewer mentors, a smaller --set train.batch_size, --set classroom.ahead=1 or "
        "--set classroom.precision=bf16.",
    )


def _fits(learner: "Learner", images: int, do: Callable[[], object]) -> bool:
    """Whether `do` ran through; if not, the learner is as it was before, and the memory free again."""
    size = (learner.phase_number, learner.accumulate, images)
    norms = [] if size in learner.fitted else _statistics([*learner.method.learners().values(), learner.method])
    before, tally = [norm.clone() for norm in norms], learner.tally.state()
    try:
        do()
    except RuntimeError as error:
        if not devices.out_of_memory(error):
            raise
    else:
        learner.fitted.add(size)
        return True
    # after the except block, since the error keeps the failed step's tensors
    if not learner.updating:
        learner.optimizer.zero_grad(set_to_none=True)
        learner.tally.load(tally, learner.device)
        for norm, old in zip(norms, before, strict=True):
            norm.copy_(old)
    if learner.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, Norm))
    return [buffer for layer in layers for buffer in layer.buffers()]


def _account(session: "Session", learner: "Learner", batch: Batch, taught: View | None, at: int) -> OutOfMemory:
    """The error that says who took what, and the batch that would fit: half by half, it is tried."""
    images, name = len(batch.index), learner.recipe.method.label
    where = "in the optimiser's update" if learner.updating else f"in a step of {images} images"
    message = f"{learner.name}: out of memory {where}: {_taken(session)}"
    if learner.updating:
        hint = "--set train.optimizer=sgd keeps one number a weight beside it, adamw two; or a smaller student."
        return OutOfMemory(message, hint=hint)
    if not distributed.alone():  # no rank can try alone
        hint = "A smaller --set train.batch_size" + ("." if learner.coupled else ", or --set train.accumulate=2.")
        return OutOfMemory(message, hint=hint)
    fits, most, each = _tried(learner, batch, taught, at)
    if not fits:
        return OutOfMemory(message, hint="Not even two images fit: a smaller student or image size, or fewer mentors.")
    if each:
        message += f"; a training image takes {_size(each)}"
    room = f" (by its memory, up to {most})" if most > fits else ""
    couples = f"; method {name} looks at whole batches, so they are not split" if learner.coupled else ""
    return OutOfMemory(message, hint=f"Tried: --set train.batch_size={fits} fits{room}{couples}.")


def _tried(learner: "Learner", batch: Batch, taught: View | None, at: int) -> tuple[int, int, float]:
    """The largest half of a half ... of the batch that fits, how many images would by their memory, bytes an image."""
    from kdcli.training.learner import take

    cuda, n = learner.device.type == "cuda", len(batch.index) // 2
    while n >= FEWEST:
        part, answers = take(batch, taught, slice(0, n))
        if cuda:
            torch.cuda.reset_peak_memory_stats(learner.device)
        rest = torch.cuda.memory_allocated(learner.device) if cuda else 0
        if _fits(learner, n, lambda p=part, a=answers: learner.gradients(p, a, 0.0, at, 0, 1.0)):
            learner.optimizer.zero_grad(set_to_none=True)
            if not cuda:
                return n, n, 0.0
            each = (torch.cuda.max_memory_allocated(learner.device) - rest) / n
            torch.cuda.empty_cache()
            return n, int(0.95 * torch.cuda.mem_get_info(learner.device)[0] / each), each
        n //= 2
    return 0, 0, 0.0


def _taken(session: "Session") -> str:
    """Bytes by member: mentors' weights; students' weights, gradients, optimiser and average."""
    mentors = session.mentors
    words = [f"mentor {one.name} {_size(_bytes(one.state_dict().values()))}" for one in mentors.members]
    quick = _bytes(value for one in mentors.frozen for value in one.net.state_dict().values())
    words += [f"their copies in {mentors.precision} {_size(quick)}"] if quick else []
    for learner in session.learners:
        modules = [*learner.method.learners().values(), learner.method]
        weights = _bytes(value for module in modules for value in module.state_dict().values())
        gradients = _bytes(learner.parameters)
        kept = _bytes(v for state in learner.optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        average = _bytes(learner.ema.state_dict().values()) if learner.ema is not None else 0
        parts = {"weights": weights, "gradients": gradients, "optimiser": kept, "average": average}
        told = ", ".join(f"{part} {_size(n)}" for part, n in parts.items() if n)
        words.append(f"{learner.name} {learner.student.name} {told}")
    device = session.learners[0].device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        words.append(f"of {_size(total)} on {devices.describe(device)}")
    return "; ".join(words)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
