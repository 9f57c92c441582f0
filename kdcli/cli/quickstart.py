"""kdcli quickstart: the whole story on real pictures, in minutes, on a CPU."""

from kdcli.cli import options as o

EXAMPLES = ("kdcli quickstart", "kdcli quickstart --seeds 1 --json")


def quickstart(
    seeds: o.Seeds = "3",
    epochs: o.Epochs = None,
    sets: o.Set = None,
    device: o.Device = "cpu",
    out: o.Out = None,
    json: o.Json = False,
) -> None:
    """Train a teacher and two peers on handwritten digits, distil a tiny student, compare, export, verify, time."""
    import time

    from kdcli.cli import tables
    from kdcli.cli.compare import show_comparison
    from kdcli.system import device as devices
    from kdcli.workflows import quickstart as room

    config, _ = o.assemble("quickstart", epochs=epochs, sets=sets)
    began = time.perf_counter()
    say = (lambda *_: None) if json else tables.console.print
    per_class = config.data.per_class
    say(
        f"Real handwritten digits (scikit-learn). Mentors learn from all training images, students from "
        f"{per_class or 'all'} of each digit.",
    )
    story = room.tell(
        config, o.seeds(seeds or "3"), devices.pick(device), out, lambda e, s: tables.follow(e, s, quiet=json)
    )
    seconds = time.perf_counter() - began
    if json:
        tables.as_json({
            "run": str(story.run.path), "seconds": round(seconds, 1), "comparison": story.comparison.table(),
            "shipped": [row.json() for row in story.shipped],
        })  # fmt: skip
        return
    tables.notes(story.classroom.notes)
    metric = story.comparison.metric
    tables.console.print()
    show_comparison(story.comparison)
    tables.console.print()
    tables.table(
        ["", *(f"{row.role}" for row in story.shipped)],
        [
            ["network", *(row.name for row in story.shipped)],
            [f"{metric.title} in torch", *(f"{row.in_torch:.2f}" for row in story.shipped)],
            [f"{metric.title} in onnxruntime", *(f"{row.in_onnx:.2f}" for row in story.shipped)],
            ["parameters", *(f"{row.params:,}" for row in story.shipped)],
            ["multiply-adds", *(tables.count(row.macs) for row in story.shipped)],
            ["file", *(tables.size(row.size) for row in story.shipped)],
            ["latency p50 ms", *(f"{row.p50:.3f}" for row in story.shipped)],
            ["latency p90 ms", *(f"{row.p90:.3f}" for row in story.shipped)],
        ],
        title=f"Shipping report: seed {o.seeds(seeds or '3')[0]}, one image, one thread",
    )
    tables.console.print(f"\n{_gained(story)}")
    tables.console.print(f"[dim]{seconds:.0f} s; everything is in {story.run.path}[/]")
    learner = story.run.path / f"classroom-{o.seeds(seeds or '3')[0]}"
    tables.console.print("\nThen, with your own pictures (one folder a class):")
    tables.console.print("  kdcli train --model resnet34@pretrained --data folder:DIR")
    tables.console.print("  kdcli distill --teacher resnet34 --student mobilenetv3_small --data folder:DIR")
    tables.next_line(f"kdcli evaluate {learner}")


def _gained(story) -> str:
    """What distillation brought, in one honest sentence."""
    line = story.comparison.line("classroom")
    words = {
        "better": "more than the seeds' noise explains",
        "worse": "so here distillation hurt",
        "within noise": "which these seeds cannot tell from noise",
    }
    verdict = words.get(line.verdict, "but one seed proves nothing: try --seeds 3")
    teacher, _, student = story.shipped
    return (
        f"ClassroomKD changed the student's accuracy by {line.gain:+.2f} points on average over {len(line.seeds)} "
        f"seed(s), {verdict}. The student is {teacher.params / student.params:.0f} times smaller than its teacher and "
        f"{teacher.p50 / student.p50:.1f} times as fast here."
    )
