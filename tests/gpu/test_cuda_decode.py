"""JPEGs decoded by the GPU: close to the CPU's pixels, and the same each time."""

import numpy as np
import pytest
import torch
from cli_kit import picture_folder

from kdcli.data import Stream, decode_cuda, open_data
from kdcli.recipe import DataConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("augment", ["imagenet", "crop-flip"])
def test_the_gpu_decodes_nearly_the_same_pixels(tmp_path, augment) -> None:
    path = picture_folder(tmp_path, ("ant", "bee"), train=20, size=96)
    if why := decode_cuda.unable("cuda"):
        pytest.skip(why)
    here, there = (
        open_data(DataConfig(name=f"folder:{path}", image_size=72, augment=augment, decode=how), device="cuda")
        for how in ("cpu", "cuda")
    )
    assert isinstance(there.train.store, decode_cuda.GpuFiles)
    a, b, again = (torch.cat([x.pixels.cpu() for x in Stream(d, 8, seed=0, device="cuda").epoch(0)])
                   for d in (here, there, there))  # fmt: skip
    assert b.equal(again)
    assert np.abs((a - b).numpy()).mean() < 0.02
