"""FT, AB, SMKD and SemCKD on real networks of every family."""

import pytest
import torch
import torch.nn.functional as F
from heads_kit import PAIRS, TOKEN_TEACHERS, Class, check_isolated, reached
from torch import nn

from kdcli.errors import RecipeError
from kdcli.losses.feature_pretraining import boundary_loss, factor_loss
from kdcli.methods import Need
from kdcli.methods.classifier import OFA, SimKD
from kdcli.methods.feature_attention import SMKD, SemCKD
from kdcli.methods.feature_pretraining import AB, FT, initial
from kdcli.methods.pairing import pair
from kdcli.methods.shake import SHAKE
from kdcli.models.layers import fit
from kdcli.recipe import TrainConfig

LESS = 0.97  # of the first loss, after a dozen steps
EVERY = [*PAIRS, *TOKEN_TEACHERS]


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("student", "teacher"), EVERY)
def test_ft_learns_in_both_stages(student, teacher, variant):
    if variant == "official" and {"torchvision", "conv_head"} & {student, teacher}:  # whose last map is one position
        with pytest.raises(RecipeError, match="to one position") as caught:
            Class(FT(variant=variant), student, teacher)
        assert 'variant = "paper"' in caught.value.hint
        return
    room = Class(FT(variant=variant), student, teacher)
    first, main = room.phases
    start = {name: x.clone() for name, x in room.student.state_dict().items() if "running" not in name}
    terms = room.loss(first)
    assert terms.keys() == {"hard", "reconstruction"}
    assert terms["hard"] == 0
    (terms["reconstruction"] * 1.0).backward()
    assert reached(room.method.paraphraser) == 1
    assert all(p.grad is None for p in [*room.student.parameters(), *room.method.translator.parameters()])
    losses = room.steps(first, lr=1e-3)
    assert losses[-1] < losses[0]
    for name, x in room.student.state_dict().items():
        assert name not in start or "num_batches" in name or torch.equal(x, start[name]), name
    room.method.zero_grad()
    check_isolated(room, main)
    assert all(p.grad is None for p in room.method.paraphraser.parameters())
    assert reached(room.method.translator) == 1
    assert reached(room.student) > 0.5
    losses = room.steps(main)
    assert losses[-1] < LESS * losses[0]


def test_ft_by_hand():
    room = Class(FT(outer_weight=3, ce_weight=2, kd_weight=5, tau=2.0, factor=0.25), "zoo", "wide")
    room.method.eval()
    encoder, decoder = room.method.paraphraser
    convs = [layer for layer in [*encoder, *decoder] if not isinstance(layer, nn.LeakyReLU)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [
        (40, 40),
        (40, 10),
        (10, 10),
        (10, 10),
        (10, 40),
        (40, 40),
    ]
    assert all(c.bias is not None for c in convs)
    assert [type(layer).__name__ for layer in room.method.translator][:3] == ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    lesson = room.lesson()
    terms = room.method.loss(lesson, room.main)
    ours, theirs = room.method.translator(lesson.student.stages["stage3"]), encoder(lesson.teacher.stages["stage3"])
    assert ours.shape == theirs.shape == (6, 10, 8, 8)
    torch.testing.assert_close(terms["factors"], 3 * factor_loss(ours, theirs))
    torch.testing.assert_close(terms["hard"], 2 * room.task.hard(lesson.student.out, lesson.target).mean())
    torch.testing.assert_close(terms["teacher"], 5 * room.task.soft(lesson.student.out, lesson.teacher.out, 2.0).mean())
    first = room.method.loss(lesson, room.phases[0])["reconstruction"]
    torch.testing.assert_close(first, F.mse_loss(decoder(theirs), lesson.teacher.stages["stage3"]))


def test_initial_stages_come_on_top_of_the_recipe():
    train = TrainConfig(epochs=240, schedule="crd", lr=0.05, optimizer="adamw", warmup_epochs=5)
    for method in (FT(), AB()):
        room = Class(method)
        first, main = method.phases(train)
        assert (first.epochs, main.epochs, main.train) == (30, 240, train)
        assert (first.train.schedule, first.train.warmup_epochs) == ("constant", 0)
        assert set(first.learners) <= set(method.learners())
        assert main.learners == ("student",)
        assert room.phases[-1].epochs == 4
    assert FT(init_epochs=0).phases.__self__.init_epochs == 0
    room = Class(FT(init_epochs=0))
    assert [phase.name for phase in room.phases] == ["main"]
    assert [phase.name for phase in Class(AB(init_epochs=0)).phases] == ["main"]
    assert initial(train, 7).epochs == 7


@pytest.mark.parametrize(
    ("arch", "given", "rate"),
    [
        ("cifar_resnet20", None, 0.01),
        ("cifar_wrn_16_2", None, 0.01),
        ("cifar_vgg8", None, 0.3),
        ("cifar_vgg8", 0.2, 0.2),
    ],
)
def test_the_paraphraser_has_its_own_rate(arch, given, rate):
    room = Class(FT(init_lr=given), lr=0.3, optimizer="adamw")
    room.student.architecture = type(room.student.architecture)("zoo", arch, None, arch)
    room.method.setup(room.method.context, room.lesson(2)) if given is None else None
    method = FT(init_lr=given)
    method.context = room.method.context
    method.setup(method.context, room.lesson(2))
    first, main = method.phases(room.config)
    assert (first.train.lr, first.train.optimizer, first.train.weight_decay) == (rate, "sgd", 5e-4)
    assert (main.train.lr, main.train.optimizer) == (0.3, "adamw")


@pytest.mark.parametrize(("student", "teacher"), EVERY)
def test_ab_learns_when_to_fire_and_then_the_classes(student, teacher):
    room = Class(AB(), student, teacher)
    first, main = room.phases
    check_isolated(room, first)
    assert reached(room.method.connectors) == 1
    assert reached(room.student) > 0.5
    losses = room.steps(first)
    assert losses[-1] < LESS * losses[0]
    assert room.loss(first).keys() == {"hard", "boundaries"}
    assert room.loss(first)["hard"] == 0
    assert room.loss(main).keys() == {"hard"}
    losses = room.steps(main)
    assert losses[-1] < losses[0]


def test_ab_by_hand():
    room = Class(AB(margin=0.5, kd_weight=2, tau=3.0), "torchvision", "wide")
    room.method.eval()
    lesson = room.lesson()
    ours, theirs = lesson.student.stages, lesson.teacher.stages
    total = 0.0
    for weight, connector, (s, t) in zip([0.25, 0.5, 1.0], room.method.connectors, pair(ours, theirs), strict=True):
        assert (ours[f"{s}.pre"] < 0).any()  # really before the activation
        here, there = fit(connector(ours[f"{s}.pre"]), theirs[f"{t}.pre"])
        total += weight * boundary_loss(here, there, margin=0.5).item()
    assert room.method.loss(lesson, room.phases[0])["boundaries"].item() == pytest.approx(3 / 1000 * total, rel=1e-5)
    wanted = 2 * room.task.soft(lesson.student.out, lesson.teacher.out, 3.0).mean()
    torch.testing.assert_close(room.method.loss(lesson, room.main)["teacher"], wanted)


@pytest.mark.parametrize("form", ["official", "transposed"])
@pytest.mark.parametrize(("student", "teacher"), EVERY)
def test_smkd_learns(student, teacher, form):
    room = Class(SMKD(form=form), student, teacher)
    check_isolated(room)
    assert reached(room.method.value) == 1
    losses = room.steps()
    assert losses[-1] < LESS * losses[0]


def test_smkd_by_hand():
    room = Class(SMKD(outer_weight=2, ce_weight=3, kd_weight=4, tau=2.0), "zoo", "swin")
    room.method.eval()
    lesson = room.lesson()
    terms = room.method.loss(lesson, room.main)
    theirs = lesson.teacher.stages["stage3"]  # 4x4
    ours = F.adaptive_avg_pool2d(lesson.student.stages["stage3"], 4)
    q, v, k = (x.flatten(2) for x in (room.method.query(ours), room.method.value(ours), theirs))
    matched = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
    torch.testing.assert_close(terms["features"], 2 * F.mse_loss(matched, k), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["hard"], 3 * room.task.hard(lesson.student.out, lesson.target).mean())
    torch.testing.assert_close(terms["teacher"], 4 * room.task.soft(lesson.student.out, lesson.teacher.out, 2.0).mean())
    assert all(conv.bias is None for conv in room.method.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize(("student", "teacher"), EVERY)
def test_semckd_learns(student, teacher):
    room = Class(SemCKD(), student, teacher, batch=8)
    check_isolated(room)
    assert reached(room.method.projectors) == 1
    assert reached(room.method.queries) > 0.4
    losses = room.steps(lr=2e-3)
    assert losses[-1] < LESS * losses[0]


def test_semckd_by_hand():
    room = Class(SemCKD(outer_weight=2, ce_weight=3, kd_weight=4, tau=2.0, factor=3, soft=0.5), "zoo", "torchvision")
    method = room.method.eval()
    assert [layer.out_features for layer in method.queries[0] if isinstance(layer, nn.Linear)] == [4, 2]
    lesson = room.lesson()
    terms = method.loss(lesson, room.main)
    ours, theirs = list(lesson.student.stages.values()), list(lesson.teacher.stages.values())
    total = 0.0
    for i, s in enumerate(ours):
        for b in range(6):
            query = F.normalize(method.queries[i](s.flatten(1) @ s.flatten(1).T)[b], dim=0)
            keys = [F.normalize(method.keys[j](t.flatten(1) @ t.flatten(1).T)[b], dim=0) for j, t in enumerate(theirs)]
            share = torch.softmax(torch.stack([query @ key / 0.5 for key in keys]), 0)
            for j, t in enumerate(theirs):
                size = min(s.shape[2], t.shape[2])
                projected = method.projectors[i][j](F.adaptive_avg_pool2d(s, size))[b]
                error = (projected - F.adaptive_avg_pool2d(t, size)[b]).square().mean()
                total += (share[j] * error).item()
    assert terms["features"].item() == pytest.approx(2 * total / (6 * 3), rel=1e-4)
    torch.testing.assert_close(terms["hard"], 3 * room.task.hard(lesson.student.out, lesson.target).mean())
    torch.testing.assert_close(terms["teacher"], 4 * room.task.soft(lesson.student.out, lesson.teacher.out, 2.0).mean())


def test_a_short_last_batch_of_semckd_brings_ce_and_kd_alone():
    room = Class(SemCKD())
    assert room.method.loss(room.lesson(6), room.main).keys() == {"hard", "teacher", "features"}
    assert room.method.loss(room.lesson(4), room.main).keys() == {"hard", "teacher"}


def test_semckd_refuses_data_smaller_than_a_batch():
    with pytest.raises(RecipeError, match="batch_size = 25") as caught:
        Class(SemCKD(), batch=25)
    assert "train.batch_size=24" in caught.value.hint


@pytest.mark.parametrize("make", [FT, SMKD, SemCKD, SimKD, OFA, SHAKE])
def test_what_another_method_asked_for_changes_nothing(make):
    """In a `compare` with AB the mentors' maps also include those before activations."""
    room = Class(make())
    alone = {key: x.item() for key, x in room.loss().items()}
    for norm in room.student.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
    room.method.needs |= {Need.PRE}
    assert any(name.endswith(".pre") for name in room.lesson().teacher.stages)
    assert {key: x.item() for key, x in room.loss().items()} == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_semckd_attends_through_similarities_only_when_told(detach):
    """The projectors are stopped, so what is left to the student is the way through the attention."""
    room = Class(SemCKD(detach=detach), batch=8)
    for parameter in room.method.projectors.parameters():
        nn.init.zeros_(parameter)  # what they give no longer depends on the student
    grads = torch.autograd.grad(room.loss()["features"], list(room.student.parameters()), allow_unused=True)
    assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads) != detach
