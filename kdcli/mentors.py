"""The mentors' answers to a batch: one call, whatever number of them and however they are run."""

import torch

from kdcli.classroom import Member
from kdcli.data import Batch
from kdcli.device import dtype_of
from kdcli.methods.base import View


class Mentors:
    """Frozen networks that answer every batch once for all who learn from it.

    They run in inference mode at `precision`; in half precision with channels last, which is what makes it fast.
    Answers come back in float32.
    """

    def __init__(self, members: list[Member], precision: str, device: torch.device) -> None:
        self.members = members
        self.precision = precision
        self.device = device
        dtype = dtype_of(precision)
        for member in members:
            member.requires_grad_(False).eval()
            if dtype != torch.float32:
                member.net.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def answer(self, batch: Batch) -> View | None:
        """Logits [M, B, K] in float32, the teacher first; None in a classroom without mentors."""
        if not self.members:
            return None
        with torch.inference_mode():
            answers = [member(batch.pixels).float() for member in self.members]
        return View(torch.stack(answers))  # stacked outside: a loss must be able to save it for its backward pass
