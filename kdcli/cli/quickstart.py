"""kdcli quickstart: the whole tool on real images, in minutes, on a CPU."""

from typing import TYPE_CHECKING

from kdcli.cli import options as o

if TYPE_CHECKING:
    from kdcli.workflows.quickstart import Outcome

EXAMPLES = ("kdcli quickstart", "kdcli quickstart --seeds 1 --json")


def quickstart(
    epochs: o.Epochs = None,
    seeds: o.Seeds = "3",
    sets: o.Set = None,
    device: o.Device = "cpu",
    out: o.Out = None,
    json: o.Json = False,
) -> None:
    """Train a teacher and two peers on handwritten digits, distil a tiny student, compare, export, verify, time."""
    import time

    from kdcli.cli import compare, tables
    from kdcli.system import device as devices
    from kdcli.workflows import quickstart as workflow

    config, _ = o.assemble("quickstart", epochs=epochs, sets=sets)
    began = time.perf_counter()
    if not json:
        tables.console.print(
            "Real handwritten digits (scikit-learn). Mentors learn from all training images, students from "
            f"{config.data.per_class or 'all'} of each digit."
        )
    notes = []

    def follow(classroom, events, label):
        notes[:] = classroom.notes
        tables.follow(events, label, quiet=json)

    numbers = o.seeds(seeds or "3")
    found = workflow.quickstart(config, numbers, devices.pick(device), follow, out=out)
    seconds = time.perf_counter() - began
    if json:
        tables.as_json({
            "run": str(found.run.path), "seconds": round(seconds, 1), "comparison": found.comparison.table(),
            "shipped": [row.json() for row in found.shipped],
        })  # fmt: skip
        return
    tables.notes(notes)
    metric = found.comparison.metric
    tables.console.print()
    compare.show(found.comparison)
    tables.console.print()
    tables.table(
        ["", *(f"{row.role}" for row in found.shipped)],
        [
            ["network", *(row.name for row in found.shipped)],
            [f"{metric.title} in torch", *(f"{row.in_torch:.2f}" for row in found.shipped)],
            [f"{metric.title} in onnxruntime", *(f"{row.in_onnx:.2f}" for row in found.shipped)],
            ["parameters", *(f"{row.params:,}" for row in found.shipped)],
            ["multiply-adds", *(tables.count(row.macs) for row in found.shipped)],
            ["file", *(tables.size(row.size) for row in found.shipped)],
            ["latency p50 ms", *(f"{row.p50:.3f}" for row in found.shipped)],
            ["latency p90 ms", *(f"{row.p90:.3f}" for row in found.shipped)],
        ],
        title=f"Shipping report: seed {numbers[0]}, one image, one thread",
    )
    tables.console.print(f"\n{_summary(found)}")
    tables.console.print(f"[dim]{seconds:.0f} s; everything is in {found.run.path}[/]")
    tables.console.print("\nThen, with your own images (one folder a class):")
    tables.console.print("  kdcli train --model resnet34@pretrained --data folder:DIR")
    tables.console.print("  kdcli distill --teacher resnet34 --student mobilenetv3_small --data folder:DIR")
    tables.next_line(f"kdcli evaluate {found.run.path / f'classroom-{numbers[0]}'}")


def _summary(found: "Outcome") -> str:
    """What distillation brought, with the verdict."""
    line = found.comparison.line("classroom")
    words = {
        "better": "more than the seeds' noise explains",
        "worse": "so distillation hurt",
        "within noise": "which these seeds cannot tell from noise",
    }
    verdict = words.get(line.verdict, "but one seed proves nothing: try --seeds 3")
    teacher, _, student = found.shipped
    return (
        f"ClassroomKD changed the student's accuracy by {line.gain:+.2f} points on average over {len(line.seeds)} "
        f"seed(s), {verdict}. The student is {teacher.params / student.params:.0f} times smaller than its teacher and "
        f"{teacher.p50 / student.p50:.1f} times as fast here."
    )
