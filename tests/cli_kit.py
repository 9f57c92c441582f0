"""What the command line's tests share: commands run in this process, mentors that need no training, small images."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcli.cli import main
from kdcli.data import open_data
from kdcli.models import cards, registry
from kdcli.models.cards import Card
from kdcli.recipe import DataConfig

STUDENT, TEACHER, PEER = "cifar_resnet10_xxs", "cifar_resnet14", "cifar_resnet8"
CLASSROOM = ("--teacher", TEACHER, "--peers", PEER, "--student", STUDENT, "--data", "digits")
TINY = ("--epochs", "1", "--set", "data.per_class=5", "--set", "train.batch_size=16")
"""Four updates on fifty digits."""
OWN = ("error: ", "warning: ", "run ", "a rank died")
"""How kdcli begins a line on standard error; in a process of its own, other packages write there too."""


@dataclass
class Said:
    """What a command printed and how it left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON: fails when anything else is there."""
        return json.loads(self.out)

    @property
    def own(self) -> list[str]:
        """The lines of standard error that kdcli began: what another package warns of is not looked at."""
        return [line for line in self.err.splitlines() if line.startswith(OWN)]

    @property
    def next(self) -> str:
        """The command of the last line."""
        last = self.out.rstrip().splitlines()[-1]
        assert last.startswith("Next: "), self.out
        return last.removeprefix("Next: ")


def kdcli(*args: object, code: int | None = 0) -> Said:
    """Run a command in this process; its exit code must be `code` (None: any)."""
    out, err, left = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as leaving:
            left = leaving.code if isinstance(leaving.code, int) else 0
    said = Said(left, out.getvalue(), err.getvalue())
    assert code is None or said.code == code, f"exit {said.code}\n{said.out}\n{said.err}"
    return said


def add_mentors(*specs: str, data: str = "digits", image_size: int = 16, fit: bool = False) -> None:
    """Put networks into the zoo of the KDCLI_HOME now in force, random ones or, with `fit`, with a head that answers.

    The head is the least-squares answer over the random network's own features: a real, if modest, classifier.
    """
    data_set = open_data(DataConfig(name=data, image_size=image_size, augment="none" if data == "digits" else "auto"))
    k = len(data_set.classes)
    for spec in specs:
        torch.manual_seed(0)
        name = registry.resolve(spec)
        net = registry.create(name, k).module.eval()
        if fit:
            _fit_head(net, data_set)
        card = Card(
            name=f"{name.arch} on {data}", architecture=name.full, dataset=data, data_hash=data_set.hash, num_classes=k,
            classes=data_set.classes, image_size=image_size, mean=data_set.mean, std=data_set.std, origin="a test",
        )  # fmt: skip
        cards.add(net.state_dict(), card)


@torch.no_grad()
def _fit_head(net: Any, data_set: Any) -> None:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data_set.mean, data_set.std))
    rows, target = [], []
    for batch in data_set.train.plain(256, torch.device("cpu")):
        rows.append(net.forward_head(net.forward_features((batch.images - mean) / std), pre_logits=True))
        target.append(batch.target)
    x, y = torch.cat(rows), torch.nn.functional.one_hot(torch.cat(target)).float()
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ y.double()).float()
    head = net.get_classifier()
    head.weight.copy_(10 * solution[:-1].T)
    head.bias.copy_(10 * solution[-1])


def picture_folder(
    root: Path, classes: tuple[str, ...], *, train: int = 8, val: int = 4, size: int = 32, ending: str = "jpg"
) -> Path:
    """train/ and val/ of small images: noise around a colour that depends on the class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for n, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (size, size, 3)) + 127 * (n % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{name}_{i}.{ending}")
    return root


def environment(**more: str) -> dict[str, str]:
    """The environment for a kdcli in a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


class Started(subprocess.Popen[str]):
    """A kdcli in a process of its own, as a user has it, killed at the end of a `with` block if it is still there.

    What it says goes to files: in a pipe that nobody empties yet, a talkative package would halt it for ever.
    """

    def __init__(self, *args: object, module: tuple[str, ...] = ("kdcli",), **options: Any) -> None:
        self.files = [tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") for _ in range(2)]  # noqa: SIM115
        root = str(Path(__file__).resolve().parents[1])
        super().__init__(
            [sys.executable, "-m", *module, *map(str, args)],
            env=environment(PYTHONPATH=os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))),
            stdout=self.files[0],
            stderr=self.files[1],
            text=True,
            **options,
        )

    def __exit__(self, *args: Any) -> None:
        self.kill()
        super().__exit__(*args)

    def said(self, timeout: float) -> Said:
        """Wait for its end; what it printed and how it left."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there after {timeout} s: {self.printed()}") from None
        return Said(code, *self.printed())

    def printed(self) -> tuple[str, ...]:
        """Standard output and error so far."""
        return tuple(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self.files)
