"""One step of single-teacher KD: kdcli, timm's distillation task and torchdistill, taking turns; JSON out.

    python tests/benchmarks/others.py [--rounds 15] [--threads N] [--device cuda]

All three train a ResNet-20 from a frozen ResNet-110 at tau 4 in float32 with the same SGD on the same batches. timm's
task and torchdistill's DistillationBox are used as their own training scripts use them: the task (or box) gives the
loss, which is stepped by hand (or by the box). torchdistill is left out where it is not installed.
"""

import json
from typing import Any

import bench_kit as kit
import torch
from timm.task import LogitDistillationTask

from kdcli.mentors.mentors import Mentors, worth_compiling


def timms(student: Any, teacher: Any, device: torch.device) -> Any:
    student.in_chans = teacher.in_chans = 3  # which the task asks for
    task = LogitDistillationTask(student, teacher, temperature=4.0, distill_loss_weight=0.9, task_loss_weight=0.1,
                                 device=device, verbose=False)  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = task(x, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def torchdistills(student: Any, teacher: Any, device: torch.device) -> Any:
    try:
        from torchdistill.core.distillation import DistillationBox
    except ImportError:
        return None
    ends = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": ["fc"]}}
    kd = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": "fc", "student_module_io": "output", "teacher_module_path": "fc",
            "teacher_module_io": "output", "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean",
        },
    }  # fmt: skip
    config = {
        "num_epochs": 1,
        "teacher": {**ends, "requires_grad": False},
        "student": dict(ends),
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, student, {}, config, device, None, False, 1)
    box.teacher_model.eval()

    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = box.forward_process(x, target, None)
        box.post_forward_process(loss=loss)
        return loss.detach()

    return step


def main() -> None:
    args = kit.arguments(__doc__).parse_args()
    device = kit.start(args)
    classroom = kit.room(device, ["resnet110"], **{"train.precision": "fp32"})
    teacher = classroom.mentors[0].net
    given = kit.batches(classroom, args.batch_size, device, 4)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (kit.MEAN, kit.STD))
    mentors = Mentors(classroom.mentors, "fp32", device)
    ours, quick = kit.learner(classroom, "kd"), kit.learner(classroom, "kd", **{"train.compile": True})
    compiled = Mentors(classroom.mentors, "fp32", device)
    paid_back = worth_compiling(classroom.mentors, 240 * 50_000)  # what kdcli decides for the paper's training
    refused = compiled.compile(args.batch_size, paid_back)
    turn = {"n": 0}

    def kdcli(learner: Any, answers: Mentors) -> None:
        n = turn["n"] = turn["n"] + 1
        batch = given[n % len(given)]
        learner.step(batch, answers.answer(batch).outputs, 0, n, n)

    def other(step: Any) -> None:
        n = turn["n"] = turn["n"] + 1
        batch = given[n % len(given)]
        step((batch.images - mean) / std, batch.target)

    ways = {"kdcli": lambda: kdcli(ours, mentors)}
    if not refused:
        ways["kdcli, teacher compiled"] = lambda: kdcli(ours, compiled)
        ways["kdcli, both compiled"] = lambda: kdcli(quick, compiled)
    notes = {name: f"not compiled: {why}" for name, why in refused.items()}
    for name, make in {"timm": timms, "torchdistill": torchdistills}.items():
        step = make(classroom.student(0).net.train(), teacher, device)
        if step is None:
            notes[name] = "not installed"
        else:
            ways[name] = lambda step=step: other(step)
    first = next(iter(given))  # all three must be doing the same work: the same loss on the same batch and weights
    x = (first.images - mean) / std
    losses = {}
    fresh = kit.learner(classroom, "kd")
    fresh.step(first, mentors.answer(first).outputs, 0, 0, 0)
    losses["kdcli"] = sum(fresh.meter.means("term/").values())
    for name, make in {"timm": timms, "torchdistill": torchdistills}.items():
        if (step := make(classroom.student(0).net.train(), teacher, device)) is not None:
            losses[name] = float(step(x, first.target))
    times = kit.alternate(ways, args.rounds, device)
    print(
        json.dumps(
            {
                **kit.machine(device),
                "batch": args.batch_size,
                "rounds": args.rounds,
                "loss of the first step": losses,
                "ways": kit.against(times, "timm"),
                **notes,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
