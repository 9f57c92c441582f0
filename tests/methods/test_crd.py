"""CRD: its memories' rows, their order of use, its normalisers, and what it refuses."""

import io
import math

import feature_kit as kit
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.losses import crd as losses
from kdcli.methods.crd import CRD
from kdcli.recipe import TrainConfig
from kdcli.system import device as devices

SMALL = {"feat_dim": 6, "nce_k": 5}


def crd(given, at=None, **options) -> CRD:
    method = kit.ready("crd", given, at, **{**SMALL, **options})
    assert isinstance(method, CRD)
    return method


def contrast(method: CRD, given) -> Tensor:
    return method.loss(given, kit.PHASE)["contrast"]


def test_every_image_has_a_row_among_its_class():
    # images 20, 3, 7, ... of a larger set, whose other images are held out
    index, targets = [20, 3, 7, 11, 0, 29], [1, 0, 2, 0, 1, 0]
    module = crd(kit.lesson(index=[20, 3]), kit.room(targets, index)).contrast
    assert module.student_memory.shape == module.teacher_memory.shape == (6, 6)
    rows = module.row_of[torch.tensor(index)].tolist()
    assert sorted(rows) == list(range(6))
    for row, target in zip(rows, targets, strict=True):
        assert module.first[target] <= row < module.first[target] + module.count[target]
    assert (module.row_of >= 0).sum() == 6
    torch.testing.assert_close(module.student_memory.norm(dim=1), torch.ones(6))
    assert (module.student_memory - module.teacher_memory).abs().max() > 0.1


def test_the_loss_is_scored_against_the_other_networks_memory():
    given = kit.lesson()
    method = crd(given)
    m = method.contrast
    a = F.normalize(F.linear(given.student.vectors, m.student.weight, m.student.bias), dim=1)
    b = F.normalize(F.linear(given.teacher.vectors, m.teacher.weight, m.teacher.bias), dim=1)
    generator = torch.Generator().manual_seed(0)
    target = given.target
    others = losses.draw_negatives(m.first[target], m.count[target], n_data=12, draws=5, generator=generator)
    rows = torch.cat([m.row_of[given.index][:, None], others], 1)
    expected = torch.zeros(())
    for x, memory in ((a, m.teacher_memory), (b, m.student_memory)):
        scores = torch.einsum("bd,brd->br", x, memory[rows]).div(0.07).exp()
        scores = scores / (scores.mean() * 12)
        c = 5 / 12
        expected = expected - (scores[:, 0] / (scores[:, 0] + c + 1e-7)).log().mean()
        expected = expected - (c / (scores[:, 1:] + c + 1e-7)).log().sum(1).mean()
    terms = method.loss(given, kit.PHASE)
    assert set(terms) == {"hard", "contrast"}
    torch.testing.assert_close(terms["contrast"], 0.8 * expected)
    torch.testing.assert_close(terms["hard"], F.cross_entropy(given.student.out, given.target))


def test_weights():
    given = kit.lesson()
    one = crd(given).loss(given, kit.PHASE)
    given = kit.lesson()
    two = crd(given, ce_weight=0.25, outer_weight=1.6).loss(given, kit.PHASE)
    torch.testing.assert_close(two, {"hard": one["hard"] / 4, "contrast": 2 * one["contrast"]})


def test_the_normalisers_are_the_first_batchs():
    method = crd(kit.lesson())
    assert not method.contrast.started
    contrast(method, kit.lesson())
    first = method.contrast.log_z.clone()
    assert method.contrast.started
    assert first.abs().max() > 0
    contrast(method, kit.lesson(seed=1))
    assert torch.equal(method.contrast.log_z, first)


def test_only_after_the_update_the_batchs_embeddings_enter_the_memories():
    given = kit.lesson(index=[5, 0, 11])
    method = crd(given)
    before = {name: value.clone() for name, value in method.contrast.named_buffers()}
    a, b = (x.detach() for x in method.contrast.embed(given.student.vectors, given.teacher.vectors))
    contrast(method, given)
    assert torch.equal(method.contrast.student_memory, before["student_memory"])  # the loss changes none
    with torch.no_grad():  # an update of the weights: what enters is what was scored
        for p in method.parameters():
            p.add_(1)
    method.after(given)
    rows = before["row_of"][given.index]
    for name, new in (("student_memory", a), ("teacher_memory", b)):
        memory, old = getattr(method.contrast, name), before[name]
        torch.testing.assert_close(memory[rows], F.normalize(0.5 * old[rows] + 0.5 * new, dim=1))
        rest = [row for row in range(12) if row not in rows]
        assert torch.equal(memory[rest], old[rest])
        assert not memory.requires_grad


def test_the_gradient_reaches_student_and_embeddings():
    given = kit.lesson()
    method = crd(given)
    kit.total(method.loss(given, kit.PHASE)).backward()
    assert given.student.pooled.grad.abs().max() > 0  # pyright: ignore
    for parameter in method.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert not any(x.requires_grad for x in kit.leaves(given.teacher))


def test_saved_and_loaded_it_goes_on_alike():
    lessons = [lambda n=n: kit.lesson(seed=n, index=[n, n + 3, n + 4]) for n in range(4)]
    one = crd(lessons[0]())
    for make in lessons[:2]:
        given = make()
        contrast(one, given)
        one.after(given)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    torch.manual_seed(77)
    two = CRD(**SMALL)
    two.setup(kit.room(), lessons[0]())
    two.load_state_dict(torch.load(file, weights_only=True))
    for make in lessons[2:]:
        values = []
        for method in (one, two):
            given = make()
            values.append(contrast(method, given))
            method.after(given)
        assert torch.equal(*values)


def test_negatives_are_a_function_of_the_lessons_generator():
    given = kit.lesson()
    method = crd(given)
    contrast(method, kit.lesson())  # fixes the normalisers
    torch.manual_seed(5)
    one = contrast(method, kit.lesson())
    torch.manual_seed(6)
    assert torch.equal(one, contrast(method, kit.lesson()))
    other = kit.lesson()
    other.generator.manual_seed(99)
    assert not torch.equal(one, contrast(method, other))


def test_where_there_are_fewer_negatives_than_asked_for_all_of_them_count_for_more():
    given = kit.lesson()
    method = crd(given, nce_k=100)
    m = method.contrast
    assert m.draws == 8  # twelve images in three classes
    a, _ = m.embed(given.student.vectors, given.teacher.vectors)
    scores = (a @ m.teacher_memory.T / 0.07).exp()
    rows = m.row_of[given.index]
    own = (torch.arange(12) >= m.first[given.target][:, None]) & (
        torch.arange(12) < (m.first + m.count)[given.target][:, None]
    )
    pos, neg = scores[torch.arange(4), rows], scores[~own].view(4, 8)
    z = (pos.sum() + 100 * neg.mean(1).sum()) / (4 * 101) * 12
    c = 100 / 12
    expected = -(pos / (pos + c * z)).log().mean() - 100 * (c * z / (neg + c * z)).log().mean()
    torch.testing.assert_close(m.parts(a, a, m.rows(given))[0], expected, rtol=1e-4, atol=1e-5)


def test_data_of_one_class_is_refused():
    with pytest.raises(RecipeError, match="all 5 training images are of one class") as caught:
        crd(kit.lesson(), kit.room([1] * 5))
    assert "two classes" in caught.value.hint


def test_memories_larger_than_memory_are_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda device: 10 * 2**20)
    given = kit.lesson()
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(torch.nn, "Linear", None)
    with pytest.raises(RecipeError) as caught:
        crd(given, feat_dim=2**30)
    assert "method.feat_dim: the memories of both networks (12 images x 1073741824 numbers)" in caught.value.message
    assert "96.00 GiB" in caught.value.message
    assert "0.01 GiB are free on cpu" in caught.value.message
    assert "method.feat_dim" in caught.value.hint
    assert "data.per_class" in caught.value.hint


def test_a_batchs_scores_count_too(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda device: 10 * 2**20)
    images = [i % kit.K for i in range(3000)]
    crd(kit.lesson(), kit.room(images, list(range(3000)), train=TrainConfig(batch_size=4)), nce_k=2000)
    with pytest.raises(RecipeError, match=r"a batch's scores 0\.02 GiB"):
        crd(kit.lesson(), kit.room(images, list(range(3000)), train=TrainConfig(batch_size=64)), nce_k=2000)


def test_free_memory_is_a_plausible_number():
    free = devices.free_memory(torch.device("cpu"))
    assert free is None or 2**26 < free < 2**50


def test_what_it_needs():
    assert methods.find("crd").needs == {"pooled", "index", "hard_target", "full_batches"}
    method = methods.build("crd", {})
    assert (method.feat_dim, method.nce_k, method.temperature, method.momentum) == (128, 16384, 0.07, 0.5)
    assert math.isclose(method.outer_weight, 0.8)
