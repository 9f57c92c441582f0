"""The mentors' answers to a batch: one call, whatever number of them and however they are run."""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.classroom import Member
from kdcli.data import Batch
from kdcli.device import dtype_of
from kdcli.methods.base import View


class Mentors:
    """Frozen networks that answer every batch once for all who learn from it.

    They run in inference mode at `precision`, in half precision with channels last. On a CPU the batch is shared among
    `workers` threads (default: as many as torch uses), each on one core: frozen networks in eval mode answer image by
    image, and threads that need not wait for each other within a layer are faster. Answers come back in float32.
    """

    def __init__(
        self, members: list[Member], precision: str, device: torch.device, *, workers: int | None = None
    ) -> None:
        self.members = members
        self.precision = precision
        self.device = device
        dtype = dtype_of(precision)
        for member in members:
            member.requires_grad_(False).eval()
            if dtype != torch.float32:
                member.net.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if workers is None:
            workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.workers = workers if members else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def answer(self, batch: Batch) -> View | None:
        """Logits [M, B, K] in float32, the teacher first; None in a classroom without mentors."""
        if not self.members:
            return None
        if self.workers == 1:
            parts = [self._look(batch.pixels)]
        else:
            parts = list(self.pool.map(self._look, batch.pixels.chunk(self.workers)))
        return View(torch.cat(parts, dim=1))  # joined outside inference mode: a loss must be able to save it

    def _look(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "M B K"]:
        with torch.inference_mode():
            return torch.stack([member(pixels).float() for member in self.members])
