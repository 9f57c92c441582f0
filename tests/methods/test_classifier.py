"""SRRL, SimKD, OFA and SHAKE on real networks of every family."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads_kit import PAIRS, TOKEN_TEACHERS, Class, K, check_isolated, member, reached
from torch import nn

from kdcli.errors import RecipeError
from kdcli.methods.classifier import OFA, SRRL, SimKD
from kdcli.methods.shake import SHAKE
from kdcli.models.graduates import Graduate

LESS = 0.95  # of the first loss, after a dozen steps


@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, *TOKEN_TEACHERS])
def test_srrl_learns(student, teacher):
    room = Class(SRRL(), student, teacher)
    check_isolated(room)
    assert reached(room.method.connector) == 1
    assert reached(room.student) > 0.5
    losses = room.steps()
    assert losses[-1] < LESS * losses[0]


def test_srrl_by_hand():
    room = Class(SRRL(ce_weight=2, kd_weight=3, outer_weight=4, tau=2.0))
    room.method.eval()
    room.student.eval()
    lesson = room.lesson()
    terms = room.method.loss(lesson, room.main)
    linear, norm, _ = room.method.connector
    x = lesson.student.vectors @ linear.weight.T
    x = (x / torch.sqrt(torch.tensor(1 + norm.eps))).clamp_min(0)  # a norm whose statistics are still 0 and 1
    fc = room.teacher.net.fc
    task, out, taught = room.task, lesson.student.out, lesson.teacher
    wanted = {
        "hard": 2 * task.hard(out, lesson.target).mean(),
        "teacher": 3 * task.soft(out, taught.out, 2.0).mean(),
        "vectors": 4 * (x - taught.vectors).square().mean(),
        "answers": 4 * (x @ fc.weight.T + fc.bias - taught.out).square().mean(),
    }
    assert terms.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(terms[key], value)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_simkd_learns_the_map_alone(student, teacher):
    room = Class(SimKD(), student, teacher)
    graduate = room.student.net
    assert isinstance(graduate, Graduate)
    assert not list(room.method.parameters())  # the projector is the student's
    check_isolated(room)
    assert reached(graduate.projector) == 1
    assert reached(graduate.net) > 0.5
    assert all(p.grad is None for p in graduate.classifier.parameters())
    head = room.teacher.head
    assert torch.equal(graduate.classifier.weight, head.weight)
    losses = room.steps()
    assert losses[-1] < LESS * losses[0]
    assert torch.equal(graduate.classifier.weight, head.weight)
    assert room.loss().keys() == {"hard", "features"}
    assert room.loss()["hard"] == 0


@pytest.mark.parametrize("teacher", ["wide", "wrn", "swin"])
def test_a_student_that_matched_the_map_would_answer_as_the_teacher(teacher):
    """The teacher's last map, with the norm that its pooling is given, through the graduate's own end."""
    room = Class(SimKD(), "zoo", teacher)
    lesson = room.lesson()
    _, theirs = room.method.two_maps(lesson)
    graduate = room.student.net
    torch.testing.assert_close(graduate.classifier(theirs.mean((2, 3))), lesson.teacher.out, rtol=1e-3, atol=1e-4)


def test_simkd_by_hand_and_its_options():
    room = Class(SimKD(outer_weight=2, ce_weight=0.5, kd_weight=3, tau=2.0, factor=4.0), "zoo", "torchvision")
    graduate = room.student.net
    assert graduate.projector[0][0].out_channels == 48 // 4
    lesson = room.lesson()
    terms = room.method.loss(lesson, room.main)
    ours, theirs = lesson.student.stages["stage3"], lesson.teacher.stages["stage4"]
    assert ours.shape == (6, 48, 1, 1)  # 8x8 pooled to the teacher's one position before the projector
    torch.testing.assert_close(terms["features"], 2 * F.mse_loss(ours, theirs))
    torch.testing.assert_close(terms["hard"], 0.5 * room.task.hard(lesson.student.out, lesson.target).mean())
    wanted = 3 * room.task.soft(lesson.student.out, lesson.teacher.out, 2.0).mean()
    torch.testing.assert_close(terms["teacher"], wanted)


def test_the_larger_teacher_map_is_pooled():
    room = Class(SimKD(), "torchvision", "wide")
    ours, theirs = room.method.two_maps(room.lesson())
    whole = room.lesson().teacher.stages["stage3"]
    torch.testing.assert_close(theirs, whole.mean((2, 3), keepdim=True))
    assert ours.shape == theirs.shape


def test_simkd_borrows_only_the_classes_of_the_data():
    teacher: Any = member("wide", 2)
    chosen = torch.tensor([3, 1, 13, 0, 2, 5, 4, 8, 6, 12])
    teacher.net.reset_classifier(14)
    teacher.class_index = chosen
    room = Class(SimKD(), "zoo", teacher)
    assert torch.equal(room.student.net.classifier.weight, teacher.net.fc.weight[chosen])
    assert room.lesson().student.out.shape == (6, K)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("conv_head", r"expects 1024 inputs, its last map \(288x1x1\) gives 288: there is a layer"),
        ("mobile", None),
        ("vit", r"expects 24 inputs, its last map \(24x4x4\) gives others: .*class token"),
        ("torchvision_vit", r"expects 24 inputs, its last map \(24x4x4\) gives others"),
    ],
)
def test_simkd_refuses_a_classifier_that_is_not_given_the_pooled_map(teacher, words):
    if words is None:  # the zoo's last convolution lies before pooling: it is the teacher's own way there
        assert Class(SimKD(), "zoo", teacher).student.net.spec.width == member(teacher).width
        return
    with pytest.raises(RecipeError, match=words) as caught:
        Class(SimKD(), "zoo", teacher)
    assert "srrl" in caught.value.hint


def test_simkd_refuses_a_student_that_is_a_graduate():
    first = Class(SimKD())
    second = SimKD()
    second.context = first.method.context
    with pytest.raises(RecipeError, match="already has the classifier"):
        second.setup(second.context, first.lesson(2))


@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, *TOKEN_TEACHERS])
def test_ofa_learns(student, teacher):
    room = Class(OFA(), student, teacher)
    check_isolated(room)
    assert list(room.method.projectors) == list(room.lesson().student.stages)
    assert all(reached(one) == 1 for one in room.method.projectors.values())
    losses = room.steps()
    assert losses[-1] < LESS * losses[0]


@pytest.mark.parametrize(
    ("student", "tokens"),
    [("zoo", False), ("torchvision", False), ("swin", True), ("vit", True), ("torchvision_vit", True)],
)
def test_ofa_gives_tokens_attention_and_maps_convolutions(student, tokens):
    room = Class(OFA(), student, "wide")
    for one in room.method.projectors.values():
        assert any(isinstance(layer, nn.TransformerEncoderLayer) for layer in one.modules()) == tokens
    other = Class(OFA(student="cnn" if tokens else "token"), student, "wide")
    assert all(torch.isfinite(x) for x in other.loss().values())


def test_ofa_projectors_are_those_of_the_paper():
    def widths(room: Class) -> list[list[int]]:
        return [
            [c.out_channels for c in one.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (1, 1)]
            for one in room.method.projectors.values()
        ]

    room = Class(OFA(), "torchvision", "wide")  # 8, 16, 24, 48 channels; the teacher ends in 40
    assert widths(room) == [[8, 16, 16, 32, 32, 48], [16, 32, 32, 48], [24, 48], [48]]
    assert room.method.projectors["stage4"][0].bias is not None
    assert all(one[-1].weight.shape == (K, 48) for one in room.method.projectors.values())
    assert widths(Class(OFA(), "wide", "torchvision")) == [[16, 32, 32, 48], [24, 48], [48]]  # 16, 24, 40, then 48


def test_ofa_merges_tokens_to_seven_by_seven():
    room = Class(OFA(), "swin", "wide")  # 16x16, 8x8, 4x4 tokens of 16, 32, 64
    first, second, third = room.method.projectors.values()
    assert [type(layer).__name__ for layer in first] == [
        "Merge",
        "Tokens",
        *["TransformerEncoderLayer"] * 2,
        "Mean",
        "Linear",
    ]
    assert first[0].reduce.out_features == 64
    assert [type(layer).__name__ for layer in second][:2] == ["Conv2d", "Tokens"]
    assert [type(layer).__name__ for layer in third] == ["Tokens", "TransformerEncoderLayer", "Mean", "Linear"]


def test_ofa_sums_the_chosen_stages():
    room = Class(OFA(gt=2, kd=3, ofa=4, eps=1.5, stages=[1, 3]), "zoo", "wide")
    assert list(room.method.projectors) == ["stage1", "stage3"]
    with pytest.raises(RecipeError, match="no stage 4") as caught:
        Class(OFA(stages=[4]), "zoo", "wide")
    assert "3: stage3" in caught.value.hint


@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, *TOKEN_TEACHERS])
def test_shake_learns_with_its_shadow(student, teacher):
    room = Class(SHAKE(), student, teacher)
    check_isolated(room)
    assert reached(room.method.shadow) == 1
    losses = room.steps()
    assert losses[-1] < LESS * losses[0]


def test_each_of_the_two_learns_from_the_other_detached():
    room = Class(SHAKE())
    terms = room.loss()
    mine = [p for p in room.student.parameters() if p.requires_grad]
    shadow = list(room.method.shadow.parameters())
    for name, term in terms.items():
        ours, theirs = (
            torch.autograd.grad(term, some, retain_graph=True, allow_unused=True) for some in (mine, shadow)
        )
        to_student = name in ("hard", "proxy")
        assert any(grad is not None for grad in ours) == to_student, name
        assert any(grad is not None for grad in theirs) == (not to_student), name


def test_shake_reads_the_last_three_maps_and_refuses_where_the_classifier_takes_others():
    assert Class(SHAKE(), "zoo", "wide").method.taps == ["stage1", "stage2", "stage3"]
    assert Class(SHAKE(), "zoo", "torchvision").method.taps == ["stage2", "stage3", "stage4"]
    with pytest.raises(RecipeError, match="classifier of conv_headnet expects 1024 inputs, and no map") as caught:
        Class(SHAKE(), "zoo", "conv_head")
    assert "stage4 288x1x1" in caught.value.message
    assert "ResNet" in caught.value.hint


def test_a_borrowed_classifier_passes_gradient_on_and_gets_none():
    teacher, x = member("wide"), torch.randn(4, 40, requires_grad=True)
    out = teacher.classify(x)
    weight, bias = teacher.head.weight, teacher.head.bias
    torch.testing.assert_close(out, x @ weight.T + bias)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is None
