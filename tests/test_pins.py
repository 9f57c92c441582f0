"""Short trainings whose students' weights are known byte for byte: a change of layout or speed must not change them.

Bits depend on torch's version and on the processor. So that version and a plain torch training of the same networks,
which uses nothing of kdcli's training, are the witness: pins recorded with the same witness must hold, others mean
nothing. (The training alone is not enough: torch 2.11 and 2.14 agree on it, and not on one, ofa and shake.)
`python tests/test_pins.py` records this machine's (after a change that is meant to change results, and says so).
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cli_kit import CLASSROOM, add_mentors, kdcli
from safetensors.torch import load_file
from torch import Tensor

FILE = Path(__file__).with_name("pins.json")
SHORT = (
    "--epochs", "2", "--device", "cpu", "--set", "data.per_class=4", "--set", "train.batch_size=16",
    "--set", "train.lr=0.02", "--set", "train.precision=fp32", "--set", "classroom.precision=fp32",
)  # fmt: skip
"""Six updates on forty digits, in float32."""
TRAININGS: dict[str, tuple[str, ...]] = {
    "nokd": (),
    "kd": (),
    "aver": (),
    "classroom": (),
    "classroom-official": ("method.variant=official", "method.beta=2", "method.delta=0.5"),
    "dkd": ("method.tekap.n=2",),
    "mlkd": (),
    "crd": ("method.nce_k=8",),
    "disk": ("method.inner_epochs=1", "method.tau_s=search"),
    "vid": (),
    "ffl": (),
    "kd-settings": ("train.ema=0.9", "train.accumulate=2", "train.clip_grad=1.0", "train.optimizer=adamw"),
    "aver-mixed": ("train.mixup=0.2", "train.cutmix=1.0", "train.label_smoothing=0.1", "data.holdout=0.25"),
    "classroom-bank": ("classroom.bank=true", "data.augment=crop"),
    "tekap": ("method.parts=both", "method.nce_k=8"),
    "classroom-sample": ("method.ranking=sample", "data.augment=cutout"),
    "classroom-dtkd": ("method.mentoring=dtkd",),
    **dict.fromkeys(("nkd", "dist", "wsld", "ctkd", "dtkd", "fitnets", "at", "sp", "nst", "smkd", "semckd"), ()),
    **dict.fromkeys(("pkt", "rkd", "srrl", "simkd", "ofa", "ebkd", "camkd", "aekd", "dgkd", "dml", "one", "shake"), ()),
    "okddip": ("method.form=networks",),
    "ft": ("method.init_epochs=1",),
    "ab": ("method.init_epochs=1",),
    "takd": ('method.assistants=["cifar_resnet8"]',),
    "nokd-disk": ("data.augment=disk", "train.schedule=classroom"),
}
"""Name -> --set options; the part of the name before `-` is the method."""


def digest(state: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def witness() -> str:
    """torch's version, and the weights of a plain training with the layers, sizes and optimiser of those below."""
    import kdcli.models.cifar  # noqa: F401  (registers the networks with timm)

    torch.manual_seed(0)
    nets = {name: timm.create_model(name, num_classes=10) for name in ("cifar_resnet10_xxs", "cifar_resnet14")}
    for net in nets.values():
        optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
        for _ in range(6):
            loss = torch.nn.functional.cross_entropy(net(torch.rand(16, 3, 16, 16)), torch.arange(16) % 10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ends = digest({f"{name}.{key}": x for name, net in nets.items() for key, x in net.state_dict().items()})
    return f"torch {torch.__version__.partition('+')[0]}, {ends}"


def trained(name: str, options: tuple[str, ...], folder: Path) -> str:
    """A student's weights after a short training through the command line."""
    sets = [word for option in options for word in ("--set", option)]
    kdcli("distill", *CLASSROOM, "--method", name.partition("-")[0], *SHORT, *sets, "--out", folder / name)
    return digest(load_file(folder / name / "student.safetensors"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    known: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    here = witness()
    if here not in known:
        pytest.skip(f"{here} on this processor: there are no recorded pins")
    return known[here]


@pytest.fixture(autouse=True)
def _mentors(_own_home: Path) -> None:
    add_mentors("cifar_resnet14", "cifar_resnet8")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_short_training_ends_with_the_recorded_bits(name: str, pins: dict[str, str], tmp_path: Path):
    assert trained(name, TRAININGS[name], tmp_path) == pins[name]


def record() -> None:
    known: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["KDCLI_HOME"] = f"{temporary}/home"
        os.chdir(temporary)
        add_mentors("cifar_resnet14", "cifar_resnet8")
        known[witness()] = {name: trained(name, sets, Path(temporary)) for name, sets in TRAININGS.items()}
    FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    record()
