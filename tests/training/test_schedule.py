"""Learning rates against the papers' own figures, and optimisers against what their names promise."""

import math

import pytest
import torch
from torch import nn

from kdcli.errors import RecipeError
from kdcli.recipe import TrainConfig
from kdcli.training import learner, schedule

UPDATES = 3  # in an epoch


def rates(config: TrainConfig, epochs: int) -> list[list[float]]:
    """The rate of every update, a list for each epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.base_lr(config))
    scheduler = schedule.build(optimizer, config, epochs, UPDATES)
    out = []
    for epoch in range(epochs):
        out.append([])
        for number in range(UPDATES):
            schedule.set_lr(scheduler, epoch, epoch * UPDATES + number)
            out[-1].append(optimizer.param_groups[0]["lr"])
    return out


def by_epoch(config: TrainConfig, epochs: int) -> list[float]:
    """The rate of every epoch, which must not change within it."""
    found = rates(config, epochs)
    assert all(len(set(each)) == 1 for each in found)
    return [each[0] for each in found]


def test_crd_falls_to_a_tenth_after_epochs_150_180_and_210() -> None:
    found = by_epoch(TrainConfig(schedule="crd", lr=0.05), 240)
    assert found[:150] == [0.05] * 150
    assert found[150:180] == pytest.approx([5e-3] * 30)  # epoch 151 counted from 1 is the first reduced one
    assert found[180:210] == pytest.approx([5e-4] * 30)
    assert found[210:] == pytest.approx([5e-5] * 30)


def test_crd_keeps_its_proportions_at_other_lengths() -> None:
    found = by_epoch(TrainConfig(schedule="crd", lr=1.0), 80)
    assert [n for n in range(1, 80) if found[n] < found[n - 1]] == [50, 60, 70]
    warm = by_epoch(TrainConfig(schedule="crd", lr=1.0, warmup_epochs=4, warmup_lr=0.2), 80)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warm[5:] == found[5:]


def test_classroom_falls_in_a_line_then_by_tenths() -> None:
    """papers.md section 2.2: 0.05 to 0.01 during epochs 0-119, 0.01 to 150, then 1e-3, 1e-4 and 1e-5."""
    found = by_epoch(TrainConfig(schedule="classroom", lr=0.05), 240)
    line = [0.05 - (0.05 - 0.01) * epoch / 120 for epoch in range(120)]
    assert found[:120] == pytest.approx(line)
    assert found[120:150] == pytest.approx([1e-2] * 30)
    assert found[150:180] == pytest.approx([1e-3] * 30)
    assert found[180:210] == pytest.approx([1e-4] * 30)
    assert found[210:] == pytest.approx([1e-5] * 30)


@pytest.mark.parametrize("name", ["crd", "classroom"])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_papers_presets_survive_very_short_runs(name: str, epochs: int) -> None:
    found = by_epoch(TrainConfig(schedule=name, lr=0.05), epochs)
    assert all(0 < rate <= 0.05 for rate in found)
    assert found == sorted(found, reverse=True)


def test_cosine_changes_with_every_update_after_its_warm_up() -> None:
    config = TrainConfig(schedule="cosine", lr=0.1, warmup_epochs=2, warmup_lr=0.01)
    flat = [rate for epoch in rates(config, 10) for rate in epoch]
    warm = 2 * UPDATES
    assert flat[:warm] == pytest.approx([0.01 + 0.09 * n / warm for n in range(warm)])
    whole = 10 * UPDATES
    curve = [0.05 * (1 + math.cos(math.pi * n / whole)) for n in range(warm, whole)]
    assert flat[warm:] == pytest.approx(curve)
    assert len(set(flat[warm:])) == whole - warm


def test_cosine_ends_at_the_least_rate() -> None:
    flat = [rate for epoch in rates(TrainConfig(schedule="cosine", lr=0.1, min_lr=0.02), 20) for rate in epoch]
    assert flat[0] == 0.1
    assert 0.02 < flat[-1] < 0.0205


def test_step_and_multistep_fall_after_the_epochs_they_name() -> None:
    step = by_epoch(TrainConfig(schedule="step", lr=0.1, decay_epochs=[30]), 100)
    many = by_epoch(TrainConfig(schedule="multistep", lr=0.1, decay_epochs=[30, 60, 90]), 100)
    assert step == pytest.approx(many)
    assert [n for n in range(1, 100) if many[n] < many[n - 1]] == [30, 60, 90]
    assert many[-1] == pytest.approx(1e-4)
    half = by_epoch(TrainConfig(schedule="multistep", lr=0.1, decay_epochs=[5, 2], decay_rate=0.5), 6)
    assert half == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05, 0.025])


def test_constant_stays_and_may_warm_up() -> None:
    assert by_epoch(TrainConfig(schedule="constant", lr=0.3), 7) == [0.3] * 7
    warm = by_epoch(TrainConfig(schedule="constant", lr=0.3, warmup_epochs=3, warmup_lr=0.0), 5)
    assert warm == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("name", ["tanh", "poly"])
def test_timms_other_curves_fall_all_the_way(name: str) -> None:
    flat = [rate for epoch in rates(TrainConfig(schedule=name, lr=0.1), 10) for rate in epoch]
    assert flat[0] == pytest.approx(0.1, rel=0.05)
    assert flat == sorted(flat, reverse=True)
    assert flat[-1] < 0.1


def test_the_rate_depends_on_nothing_but_epoch_and_update() -> None:
    config = TrainConfig(schedule="cosine", lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = schedule.build(optimizer, config, 10, UPDATES)
    schedule.set_lr(scheduler, 7, 7 * UPDATES + 1)  # as a resumed run does
    assert optimizer.param_groups[0]["lr"] == rates(config, 10)[7][1]


def test_an_unknown_schedule_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"train\.schedule.*'cosin'") as caught:
        rates(TrainConfig(schedule="cosin"), 3)
    assert "cosine" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["step", "multistep"])
def test_milestones_must_be_named(name: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.decay_epochs") as caught:
        rates(TrainConfig(schedule=name), 3)
    assert "decay_epochs=" in caught.value.hint


# --- optimisers -------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_nesterovs_only_when_asked(nesterov: bool) -> None:
    made = learner.make_optimizer(net(), TrainConfig(nesterov=nesterov, momentum=0.8, lr=0.3))
    assert isinstance(made, torch.optim.SGD)
    assert {group["nesterov"] for group in made.param_groups} == {nesterov}
    assert {group["momentum"] for group in made.param_groups} == {0.8}
    assert {group["lr"] for group in made.param_groups} == {0.3}


def test_adamw_is_adamw() -> None:
    assert isinstance(learner.make_optimizer(net(), TrainConfig(optimizer="adamw")), torch.optim.AdamW)


def test_the_papers_decay_every_parameter_and_timms_habit_spares_norms_and_biases() -> None:
    def decays(everywhere: bool) -> dict[str, float]:
        module = net()
        config = TrainConfig(weight_decay=0.1, decay_norm_and_bias=everywhere)
        groups = learner.make_optimizer(module, config).param_groups
        of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        return {name: of[id(p)] for name, p in module.named_parameters()}

    assert set(decays(True).values()) == {0.1}
    assert {name for name, decay in decays(False).items() if decay == 0.1} == {"0.weight", "3.weight"}
    assert {decay for name, decay in decays(False).items() if name not in ("0.weight", "3.weight")} == {0.0}


def test_an_unknown_optimiser_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"train\.optimizer = 'admw'") as caught:
        learner.make_optimizer(net(), TrainConfig(optimizer="admw"))
    assert "adamw" in caught.value.hint


@pytest.mark.parametrize(("epochs", "cycles"), [(20, 4), (10, 3)])
def test_cosine_starts_anew_in_every_cycle(epochs: int, cycles: int) -> None:
    flat = [rate for epoch in rates(TrainConfig(lr=0.1, cycles=cycles), epochs) for rate in epoch]
    length = epochs * UPDATES / cycles
    assert flat == pytest.approx([0.05 * (1 + math.cos(math.pi * (t % length) / length)) for t in range(len(flat))])
    assert sum(flat[t] > flat[t - 1] for t in range(1, len(flat))) == cycles - 1


@pytest.mark.parametrize("name", ["crd", "constant", "poly"])
def test_other_schedules_have_no_cycles(name: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.cycles = 2: only schedule = .cosine."):
        rates(TrainConfig(schedule=name, cycles=2), 4)
