"""Every method on one small classroom: what it costs, what it adds, how long its code is; a Markdown table out.

    python tests/benchmarks/methods.py [--rounds 15] [--threads N] [--only kd,crd] [--contract junit.xml] [--json FILE]

Step cost: one update of a ResNet-8 taught by a ResNet-20, batch 64, on noise of CIFAR-100's sizes (the cost does not
depend on the images), including the mentors' outputs and everything else that the method needs; relative to KD, all
methods stepped in turn within one process, the ratio of medians with quartiles of the rounds' ratios. A method with
several phases is charged for all of them: their steps, relative to those of the recipe's own epochs.
Methods that learn from several mentors have two peers in addition to the teacher, and so has the KD that they are
compared with. Extra parameters and memory are those at these sizes, with CIFAR-100's 50,000 images. Lines: the class
and the losses it calls, without comments, docstrings and blanks.
--contract: the file written by `pytest tests/contract --junitxml=junit.xml`; the table then has the number of tests
that passed.
"""

import argparse
import ast
import inspect
import itertools
import json
import re
import statistics
import sys
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_kit as kit
import torch
from torch import nn

from kdcli import methods
from kdcli.errors import KdcliError
from kdcli.mentors.classroom import Classroom
from kdcli.methods import Need
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.session import Session
from kdcli.workflows import groups

STUDENT, TEACHER, PEERS = "cifar_resnet8", "resnet20", ["resnet14", "resnet8"]
IMAGES = 50_000  # CIFAR-100's training set, which sizes the memories
KEYS = {"train.lr": 0.01, "train.schedule": "constant", "train.precision": "fp32", "classroom.ahead": 1}
PAPERS = {  # family, paper
    "nokd": ("control", "cross-entropy alone"),
    "kd": ("logits", "Hinton et al. 2015, arXiv 1503.02531"),
    "dkd": ("logits", "Zhao et al., CVPR 2022, arXiv 2203.08679"),
    "nkd": ("logits", "Yang et al., ICCV 2023, arXiv 2303.13005"),
    "dist": ("logits", "Huang et al., NeurIPS 2022, arXiv 2205.10536"),
    "wsld": ("logits", "Zhou et al., ICLR 2021, arXiv 2102.00650"),
    "ctkd": ("logits", "Li et al., AAAI 2023, arXiv 2211.16231"),
    "dtkd": ("logits", "Wei & Bai 2024, arXiv 2404.12711"),
    "mlkd": ("logits", "Jin et al., CVPR 2023"),
    "tekap": ("logits", "Hossain et al., ICLR 2025"),
    "tekap-both": ("logits, contrast", "the same, logits and features"),
    "disk": ("logits, guide", "Kag et al., ICLR 2023"),
    "fitnets": ("maps", "Romero et al., ICLR 2015, arXiv 1412.6550"),
    "at": ("maps", "Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928"),
    "sp": ("maps", "Tung & Mori, ICCV 2019, arXiv 1907.09682"),
    "nst": ("maps", "Huang & Wang 2017, arXiv 1707.01219"),
    "vid": ("maps", "Ahn et al., CVPR 2019, arXiv 1904.05835"),
    "ft": ("maps", "Kim et al., NeurIPS 2018, arXiv 1802.04977"),
    "ab": ("maps", "Heo et al., AAAI 2019, arXiv 1811.03233"),
    "smkd": ("maps", "Lin et al., CVPR 2022, arXiv 2205.10793"),
    "semckd": ("maps", "Chen et al., AAAI 2021, arXiv 2012.03236"),
    "pkt": ("relations", "Passalis & Tefas, ECCV 2018, arXiv 1803.10837"),
    "rkd": ("relations", "Park et al., CVPR 2019, arXiv 1904.05068"),
    "crd": ("contrast", "Tian et al., ICLR 2020, arXiv 1910.10699"),
    "srrl": ("classifier", "Yang et al., ICLR 2021"),
    "simkd": ("classifier", "Chen et al., CVPR 2022, arXiv 2203.14001"),
    "ofa": ("classifier", "Hao et al., NeurIPS 2023, arXiv 2310.19444"),
    "aver": ("several", "Sarode et al. 2024, arXiv 2409.20237, Eq. 12"),
    "classroom": ("several", "Sarode et al. 2024, arXiv 2409.20237"),
    "ebkd": ("several", "Kwon et al., ICASSP 2020"),
    "camkd": ("several", "Zhang et al., ICASSP 2022, arXiv 2201.00007"),
    "aekd": ("several", "Du et al., NeurIPS 2020"),
    "takd": ("assistants", "Mirzadeh et al., AAAI 2020, arXiv 1902.03393"),
    "dgkd": ("assistants", "Son et al., ICCV 2021, arXiv 2009.08825"),
    "dml": ("online", "Zhang et al., CVPR 2018, arXiv 1706.00384"),
    "one": ("online", "Lan et al., NeurIPS 2018, arXiv 1806.04606"),
    "okddip": ("online", "Chen et al., AAAI 2020, arXiv 1912.00350"),
    "ffl": ("online", "Kim et al., ICPR 2020, arXiv 1904.09058"),
    "shake": ("online", "Li & Jin, NeurIPS 2022"),
}
SEVERAL = {"aver", "classroom", "ebkd", "camkd", "aekd", "dgkd"}  # methods that learn from peers too
FORMS = {"tekap-both": {"name": "tekap", "parts": "both"}}  # forms of a method with a separate row
WORDS = {  # what a method needs, as the table calls it
    Need.MAPS: "maps",
    Need.PRE: "maps before activation",
    Need.POOLED: "vectors",
    Need.INDEX: "sample numbers",
    Need.TWO_VIEWS: "two views",
    Need.HARD_TARGET: "no mixup",
    Need.FULL_BATCHES: "whole batches",
    Need.PAIRS: "two samples",
}
SHARED = {"kdcli.methods.base", "kdcli.methods.fields", "kdcli.methods.pairing"}  # used by all, counted for none


class Way:
    """One method in one phase: a session that is stepped by hand."""

    def __init__(self, classroom: Classroom, name: str, phase: str | None, folder: Path) -> None:
        recipe = classroom.recipe.with_method(name)
        run = Run(folder / f"{name}-{phase}")
        self.session: Session = groups.open_session({name: recipe}, classroom, run, {name: run}, set())
        self.learner = self.session.learners[0]
        starts = itertools.accumulate((each.epochs for each in self.learner.phases), initial=0)
        begins = [(each.name, start) for each, start in zip(self.learner.phases, starts, strict=False)]
        self.epoch = 0 if phase is None else next(start for name, start in begins if name == phase)
        for epoch in sorted({0, self.epoch}):  # a phase passes on to the next what an epoch of two batches leaves
            self.learner.begin_epoch(epoch, self._train_pass)
        self.batches = self._endless()
        self.number = 0

    def _train_pass(self) -> Iterator[Any]:
        learner = self.learner
        for batch in itertools.islice(self.session.data.train.plain(64, learner.device), 2):
            answers = self.session.mentors.answer(batch)
            yield learner.lesson(batch, answers.of(learner.needs), self.epoch, 0)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.session.mentors.answer_ahead(itertools.islice(self.session.stream.epoch(self.epoch), 64))

    def __call__(self) -> None:
        batch, answers = next(self.batches)
        self.learner.step(batch, answers.of(self.learner.needs), self.epoch, 0, self.number)
        self.number += 1


def facts(way: Way) -> dict[str, Any]:
    """What a method adds to its student, and what it needs."""
    method, room = way.learner.method, way.learner.classroom
    plain = sum(p.numel() for p in room.student(0).parameters())
    modules: list[nn.Module] = [method, *method.learners().values(), method.graduate()]
    learned = {p for module in modules for p in module.parameters()}
    learned -= {p for mentor in room.mentors for p in mentor.parameters()}
    norms = {id(b) for m in method.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for b in m.buffers(False)}
    kept = [b for b in method.buffers() if id(b) not in norms]
    return {
        "parameters": sum(p.numel() for p in learned) - plain,
        "shipped": sum(p.numel() for p in method.graduate().parameters()) - plain,
        "memory": sum(b.numel() * b.element_size() for b in kept),
        "needs": [word for need, word in WORDS.items() if need in method.needs],
        "teachers": method.teachers,
        "phases": _shares(way.learner),
    }


def _shares(learner: Learner) -> dict[str, float]:
    """Phase -> its epochs, as a share of the recipe's."""
    shares: dict[str, float] = {}
    for phase in learner.phases:
        shares[phase.name] = shares.get(phase.name, 0.0) + phase.epochs / learner.config.epochs
    return shares


def lines(name: str) -> int:
    """Code lines of a method's class, of its base classes and of the losses it calls."""
    todo: list[Any] = [methods.find(FORMS.get(name, {}).get("name", name))]
    seen: set[Any] = set()
    while todo:
        part = todo.pop()
        if part in seen:
            continue
        seen.add(part)
        todo += _called(part)
    return sum(_count(part) for part in seen)


def _called(part: Any) -> list[Any]:
    """Functions and classes of kdcli's methods and losses that a function or class names."""
    known = vars(sys.modules[part.__module__])
    found: list[Any] = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(part)))):
        one = None
        if isinstance(node, ast.Name):
            one = known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            one = getattr(module, node.attr, None) if inspect.ismodule(module) else None
        if (inspect.isfunction(one) or inspect.isclass(one)) and one.__module__ not in SHARED:
            home = one.__module__
            if home.startswith(("kdcli.losses", "kdcli.methods.")):
                found.append(one)
    return found


def _count(part: Any) -> int:
    """Lines with code on them: no docstrings, comments or blanks."""
    text = textwrap.dedent(inspect.getsource(part))
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    rows = enumerate(text.splitlines(), 1)
    return sum(1 for number, row in rows if row.strip() and not row.strip().startswith("#") and number not in docs)


def contract(path: Path) -> dict[str, tuple[int, int]]:
    """Method -> (passed, run) of the contract tests in a junit file; skipped tests do not count."""
    found: dict[str, tuple[int, int]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        words = re.split(r"[\[\]\-]", case.get("name", ""))[1:]
        name = next((word for word in words if word in methods.METHODS), None)
        if name is None or case.find("skipped") is not None:
            continue
        passed, run = found.get(name, (0, 0))
        failed = case.find("failure") is not None or case.find("error") is not None
        found[name] = (passed + (not failed), run + 1)
    return found


def ways_of(room: Classroom, name: str, folder: Path) -> dict[str, Way]:
    """A method's ways to step, one for each of its phases."""
    first = Way(room, name, None, folder)
    names = list(_shares(first.learner))
    return {phase: Way(room, name, phase, folder) if n else first for n, phase in enumerate(names)}


def measure(names: list[str], device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Facts and step costs of the methods; for one that cannot be trained here, the reason."""
    out: dict[str, dict[str, Any]] = {}
    for mentors in ([TEACHER], [TEACHER, *PEERS]):
        ours = [name for name in names if (name in SEVERAL) is (len(mentors) > 1)]
        room = kit.room(device, mentors, images=IMAGES, **{"classroom.student": STUDENT, "baselines": FORMS, **KEYS})
        with tempfile.TemporaryDirectory() as folder:
            ready: dict[str, dict[str, Way]] = {}
            for name in dict.fromkeys(["kd", *ours]):
                try:
                    ready[name] = ways_of(room, name, Path(folder))
                    for way in ready[name].values():
                        way()
                except (KdcliError, ImportError, AttributeError) as error:
                    ready.pop(name, None)
                    out[name] = {"why not": f"{type(error).__name__}: {error}"}
            ways = {f"{name}/{phase}": way for name, own in ready.items() for phase, way in own.items()}
            times = kit.alternate(ways, rounds, device)
        base = times["kd/main"]
        for name in [name for name in ours if name in ready]:
            row = out[name] = facts(next(iter(ready[name].values())))
            mine = [(times[f"{name}/{phase}"], share) for phase, share in row["phases"].items()]
            each = [sum(seconds[n] * share for seconds, share in mine) for n in range(rounds)]
            middle = sum(statistics.median(seconds) * share for seconds, share in mine)
            row["ms"] = round(1000 * middle, 2)
            row["times KD"] = round(middle / statistics.median(base), 3)
            ratios = [a / b for a, b in zip(each, base, strict=True)]
            row["quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return out


def markdown(found: dict[str, dict[str, Any]], passed: dict[str, tuple[int, int]]) -> str:
    """The table of kdcli/methods/README.md."""
    head = ["method", "family", "paper", "needs", "extra parameters", "memory", "step, times KD", "lines", "contract"]
    rows = [head, ["---", "---", "---", "---", "---:", "---:", "---:", "---:", "---:"]]
    for name, row in found.items():
        family, paper = PAPERS[name]
        counted = "{}/{}".format(*passed[name]) if name in passed else ""
        if "why not" in row:
            rows.append([f"`{name}`", family, paper, row["why not"].splitlines()[0], "", "", "", "", counted])
            continue
        needs = list(row["needs"])
        several = "mentors" if row["teachers"] < 2 else f"{row['teachers']} mentors or more"
        needs.insert(0, several if name in SEVERAL else "teacher" if row["teachers"] else "no mentor")
        others = [p for p in row["phases"] if p != "main"]
        needs += [f"phases {', '.join(row['phases'])}"] if others and len(row["phases"]) > 1 else []
        extra = f"{row['parameters']:,}" if row["parameters"] else ""
        if row["shipped"]:
            extra += f" ({row['shipped']:+,} shipped)"
        low, _, high = row["quartiles"]
        memory = f"{row['memory'] / 2**20:.1f} MiB" if row["memory"] >= 2**16 else ""
        rows.append([
            f"`{name}`", family, paper, ", ".join(needs), extra, memory,
            f"{row['times KD']:.2f} ({low:.2f} to {high:.2f})", str(row["lines"]), counted,
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    parser = kit.arguments(__doc__)
    parser.add_argument("--only", default=",".join(PAPERS), help="methods, separated by commas")
    parser.add_argument("--contract", type=Path, help="junit file of the contract tests")
    parser.add_argument("--json", type=Path, help="write everything measured here too")
    args: argparse.Namespace = parser.parse_args()
    device = kit.start(args)
    names = args.only.split(",")
    if unknown := set(methods.METHODS) - set(PAPERS):
        raise SystemExit(f"PAPERS has no line for {', '.join(sorted(unknown))}")
    found = measure(names, device, args.rounds)
    for name, row in found.items():
        if "why not" not in row:
            row["lines"] = lines(name)
    passed = contract(args.contract) if args.contract else {}
    facts_ = {**kit.machine(device), "batch": 64, "rounds": args.rounds, "methods": found, "contract": passed}
    if args.json:
        args.json.write_text(json.dumps(facts_, indent=1))
    print(json.dumps({key: facts_[key] for key in facts_ if key not in ("methods", "contract")}))
    print(markdown({name: found[name] for name in names}, passed))


if __name__ == "__main__":
    main()
