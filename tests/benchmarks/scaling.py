"""What more methods and more mentors cost in one training: time of a step and memory; JSON out.

    python tests/benchmarks/scaling.py [--rounds 8] [--threads N] [--device cuda]

`methods`: a step of one batch that teaches 1, 2, 4 or 8 students (ClassroomKD, AVER, KD and the control in turn, over
two seeds) from six mentors asked once, against one student. `mentors`: a step of one ClassroomKD student with 1, 2, 4
and 6 mentors, against one mentor. Peak memory is read in a process of its own for every point.
"""

import json
import resource
import subprocess
import sys

import bench_kit as kit
import torch

from kdcli.data import Stream
from kdcli.mentors.mentors import Mentors
from kdcli.system import device as devices
from kdcli.training.loop import _update

METHODS = ["classroom", "aver", "kd", "nokd"] * 2


def stepper(device: torch.device, students: int, mentors: int, size: int):
    classroom = kit.room(device, kit.MENTORS[:mentors])
    learners = [kit.learner(classroom, name, **{"train.seed": n}) for n, name in enumerate(METHODS[:students])]
    answers = Mentors(classroom.mentors, devices.precision("auto", device, frozen=True)[0], device)
    given, turn = kit.batches(classroom, size, device, 4), {"n": 0}
    stream = Stream(classroom.data, size, seed=0, device=device)

    def step() -> None:
        n = turn["n"] = turn["n"] + 1
        batch = given[n % len(given)]
        _update(learners, batch, answers.answer(batch), 0, n, len(stream))

    return step


def peak(device: torch.device) -> int:
    """MiB: of the device where it has its own memory, else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)


def memory(args, students: int, mentors: int) -> int:
    """Peak memory of three steps, in a process of their own."""
    command = [sys.executable, __file__, "--only", f"{students},{mentors}", "--batch-size", str(args.batch_size)]
    command += ["--device", args.device] if args.device else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = kit.arguments(__doc__)
    parser.add_argument("--only", default=None, help="STUDENTS,MENTORS: print the peak memory of three steps")
    args = parser.parse_args()
    device = kit.start(args)
    if args.only:
        step = stepper(device, *map(int, args.only.split(",")), args.batch_size)
        for _ in range(3):
            step()
        print(peak(device))
        return
    out = {**kit.machine(device), "batch": args.batch_size, "rounds": args.rounds}
    for what, points in {
        "methods": [(n, 6) for n in (1, 2, 4, 8)],
        "mentors": [(1, n) for n in (1, 2, 4, 6)],
    }.items():
        place = 0 if what == "methods" else 1
        ways = {str(point[place]): stepper(device, *point, args.batch_size) for point in points}
        times = kit.against(kit.alternate(ways, args.rounds, device), "1")
        for point in points:
            entry = times[str(point[place])]
            if "times as fast" in entry:
                entry["times the cost of 1"] = round(1 / entry.pop("times as fast"), 2)
                entry["quartiles"] = [round(1 / q, 2) for q in entry["quartiles"]][::-1]
            entry["peak MiB"] = memory(args, *point)
        out[what] = times
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
