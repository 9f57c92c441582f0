"""The contract on a GPU: no method's step makes the host wait, and the loss falls there too."""

from functools import cache

import pytest
import torch

from kdcli.methods import METHODS
from kdcli.workflows.method_contract import CHECKS, Toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@cache
def toy() -> Toy:
    return Toy(torch.device("cuda"))


@pytest.mark.parametrize("check", ["no step waits for the GPU", "terms are finite scalars", "the loss falls"])
@pytest.mark.parametrize("name", METHODS)
def test_contract(check, name):
    toy().put(CHECKS[check], name, {})
