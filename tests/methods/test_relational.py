"""PKT and RKD on pooled vectors of any widths."""

import feature_kit as kit
import pytest
import torch
import torch.nn.functional as F

from kdcli import methods
from kdcli.losses.relational import probabilistic_loss, relational_loss


@pytest.mark.parametrize(("ce", "outer"), [(1.0, None), (0.5, 2.0)])
def test_pkt_weighs_its_loss(ce, outer):
    given = kit.lesson()
    options = {} if outer is None else {"ce_weight": ce, "outer_weight": outer}
    terms = kit.ready("pkt", given, **options).loss(given, kit.PHASE)
    assert set(terms) == {"hard", "neighbours"}
    torch.testing.assert_close(terms["hard"], ce * F.cross_entropy(given.student.out, given.target))
    expected = probabilistic_loss(given.student.vectors, given.teacher.vectors)
    torch.testing.assert_close(terms["neighbours"], (30000 if outer is None else outer) * expected)


@pytest.mark.parametrize("options", [{}, {"w_distance": 1.0, "w_angle": 2.0, "ce_weight": 0.5, "outer_weight": 3.0}])
def test_rkd_weighs_distance_and_angle(options):
    given = kit.lesson()
    terms = kit.ready("rkd", given, **options).loss(given, kit.PHASE)
    weight, outer = options.get("ce_weight", 1.0), options.get("outer_weight", 1.0)
    distance, angle = relational_loss(
        given.student.vectors,
        given.teacher.vectors,
        w_distance=outer * options.get("w_distance", 25.0),
        w_angle=outer * options.get("w_angle", 50.0),
    )
    hard = weight * F.cross_entropy(given.student.out, given.target)
    expected = {"hard": hard, "distance": distance, "angle": angle}
    torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize("name", ["pkt", "rkd"])
def test_the_gradient_reaches_the_students_vectors_alone(name):
    given = kit.lesson()
    kit.total(kit.ready(name, given).loss(given, kit.PHASE)).backward()
    assert given.student.pooled.grad.abs().max() > 0  # pyright: ignore
    assert not any(x.requires_grad for x in kit.leaves(given.teacher))
    assert not list(methods.build(name, {}).parameters())


@pytest.mark.parametrize("name", ["pkt", "rkd"])
def test_they_want_whole_batches_of_two_and_more(name):
    assert methods.find(name).needs == {"pooled", "full_batches", "pairs"}
