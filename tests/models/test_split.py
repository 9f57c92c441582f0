"""The tail of a network after a stage, against the whole network."""

import pytest
import torch
from net_kit import SIZE, member
from torch import nn

from kdcli.errors import RecipeError
from kdcli.models.split import Tail
from kdcli.models.taps import Taps
from kdcli.system.sizes import Size

SQUARE = (SIZE, SIZE)
TALL = (48, 32)


def divided(kind: str, tap: int, size: Size = SQUARE) -> tuple[nn.Module, Tail, str]:
    one = member(kind, size=size)
    stages = [*Taps(one.net, size, kind)(torch.rand(2, 3, *size))[1]]
    return one.net, Tail(one.net, one.head, size, kind, stages[tap]), stages[tap]


@pytest.mark.parametrize("size", [SQUARE, TALL])
@pytest.mark.parametrize("tap", [-3, -2, -1])
@pytest.mark.parametrize("kind", ["zoo", "wrn", "mobile", "timm", "conv_head", "torchvision"])
def test_the_tail_of_a_stages_map_equals_the_network(kind, tap, size):
    """In training too, where batch norm uses the batch's statistics and other steps are traced."""
    net, tail, after = divided(kind, tap, size)
    x = torch.rand(4, 3, *size)
    for training in (False, True):
        net.train(training)
        out, maps = Taps(net, size, kind)(x)
        again, vectors, last = tail(maps[after])
        assert torch.allclose(again, out, atol=1e-4)
        assert vectors.shape[0] == 4
        assert (last is not None) == tail.has_last_map
        if last is not None:
            assert torch.allclose(last, [*maps.values()][-1], atol=1e-4)
    assert net.training


def test_a_tail_learns_and_the_beginning_is_shared():
    net, tail, after = divided("zoo", -2)
    other = member("zoo", seed=9).net
    before = {name: x.clone() for name, x in net.state_dict().items()}
    tail.share_beginning(other)
    own = {name for name, p in net.named_parameters() if p is not other.get_parameter(name)}
    assert own == {name for name, _ in net.named_parameters() if name.startswith(("stage3.", "fc."))}
    assert net.get_buffer("stem.bn.running_mean") is other.get_buffer("stem.bn.running_mean")
    assert net.get_buffer("stage3.0.bn1.running_mean") is not other.get_buffer("stage3.0.bn1.running_mean")
    for name, x in net.state_dict().items():
        assert torch.equal(x, before[name] if name.startswith(("stage3.", "fc.")) else other.state_dict()[name])
    x = torch.rand(4, 3, *SQUARE)
    net.eval()
    other.eval()
    map_ = Taps(other, SQUARE, "zoo")(x)[1][after]
    assert torch.allclose(tail(map_)[0], net(x), atol=1e-5)  # as a whole it is the graduate
    tail(map_)[0].sum().backward()
    assert all(net.get_parameter(name).grad is not None for name in own)


def test_a_fresh_network_whose_blocks_change_nothing_yet_is_cut_where_its_stage_ends():
    """With residual norms at zero a block returns its input: several steps return the same tensor."""
    one = member("zoo")
    for name, module in one.net.named_modules():
        if name.endswith("bn2") and isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    tail = Tail(one.net, one.head, SQUARE, "zoo", "stage2")
    paths = {path for path, module in tail.graphs[True].named_modules() if isinstance(module, nn.Conv2d)}
    assert paths
    assert all(path.startswith("stage3.") for path in paths)


@pytest.mark.parametrize("kind", ["vit", "swin", "torchvision_vit"])
def test_what_cannot_be_divided_is_refused_with_the_cure(kind):
    with pytest.raises(RecipeError, match="cannot be divided after") as caught:
        divided(kind, -2)
    assert "method.form=networks" in caught.value.hint


def test_a_path_around_the_stage_is_found():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage1, self.stage2 = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1, stride=2)
            self.fc = nn.Linear(4, 10)

        def forward(self, x):
            y = self.stage2(self.stage1(x))
            return self.fc(y.mean((2, 3)) + x.mean((1, 2, 3))[:, None])

    net = Around()
    with pytest.raises(RecipeError, match="reaches the output on a path around that stage"):
        Tail(net, net.fc, SQUARE, "around", "stage1")
