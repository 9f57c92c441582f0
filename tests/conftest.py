"""What every test shares: a private KDCLI_HOME, one thread, and the real data where it lies beside the checkout."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own KDCLI_HOME and no data root from outside."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KDCLI_HOME", str(home))
    monkeypatch.delenv("KDCLI_DATA", raising=False)
    torch.set_num_threads(1)
    return home


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets and checkpoints; tests that ask for it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data (real pictures and checkpoints), which is not beside this checkout")
    return SHARED
