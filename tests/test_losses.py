"""Every loss against a slow reference written with loops in float64 from the formula, and what must hold for all."""

from __future__ import annotations

import math

import pytest
import torch

from kd.distiller import Distiller
from kd.losses import (
    KL,
    LOSSES,
    CosineEmbedding,
    CrossEntropy,
    DoubleSoftmax,
    FeatureDistance,
    FeatureLoss,
    FitNet,
    LogitsMSE,
    SoftCrossEntropy,
    SoftMAE,
)
from kd.losses.features import cosine_distance
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def reference_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total += math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def reference_cross_entropy(student, labels, smoothing):
    total = 0.0
    for s, label in zip(student.tolist(), labels.tolist(), strict=True):
        p = softmax(s)
        for k, probability in enumerate(p):
            total -= (smoothing / len(p) + (1 - smoothing) * (k == label)) * math.log(probability)
    return total / len(student)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kl_equals_the_float64_reference(temperature, num_classes):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, num_classes, dtype=torch.double)
    expected = reference_kl(student, teacher, temperature)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(student.float(), teacher.float(), temperature).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student, student, temperature).item() == pytest.approx(0, abs=1e-12)


def test_kl_gradient_is_that_of_the_papers_soft_cross_entropy():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.double)
    student.requires_grad_()
    kl_divergence(student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 5
    assert torch.allclose(student.grad, expected)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(z, teacher, 3.0), student)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_float64_reference(num_classes, smoothing):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(7, num_classes, dtype=torch.double), torch.randint(0, num_classes, (7,))
    loss = CrossEntropy(label_smoothing=smoothing)
    value = loss(Outputs(logits), None, Batch(torch.empty(7, 0), labels, labels))
    assert value.item() == pytest.approx(reference_cross_entropy(logits, labels, smoothing), rel=1e-12)


class Given(torch.nn.Module):
    """A network whose logits (B, K) and one feature map, `map` (B, C, 5, 5), are given."""

    def __init__(self, logits, channels=3):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.map = torch.nn.Parameter(torch.randn(len(logits), channels, 5, 5).to(logits.dtype))

    def tap(self, names):
        assert list(names) == ["map"]

    def outputs(self, images, keys=None):
        return Outputs(self.logits, {"map": self.map})


TAPS = {"student_tap": "map", "teacher_tap": "map"}


def build(name, **arguments):
    return LOSSES[name](**(TAPS if issubclass(LOSSES[name], FeatureLoss) else {}), **arguments)


def distil(loss, student, teacher):
    """The distiller of one loss, the teacher, and the loss's value."""
    torch.manual_seed(1)
    labels = torch.zeros(len(student), dtype=torch.long)
    student, teacher = Given(student), Given(teacher)
    distiller = Distiller(student, [loss], teacher, (3, 8, 8), seed=0)
    said = teacher.outputs(None)
    said = Outputs(said.logits.float(), {name: feature.float() for name, feature in said.features.items()})
    terms = distiller(Batch(torch.empty(len(labels), 0), labels, labels), said)
    return distiller, teacher, next(iter(terms.values()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [1, 6])
def test_every_loss_is_finite_far_out_and_in_half_precision(name, num_classes, size):
    torch.manual_seed(0)
    student = (torch.randint(0, 2, (size, num_classes)) * 2e4 - 1e4).half()
    teacher = (torch.randint(0, 2, (size, num_classes)) * 2e4 - 1e4).half()
    distiller, _, value = distil(build(name), student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    value.backward()
    assert value.isfinite()
    gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_weighted_and_trains_exactly_what_is_its_own(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    once = distil(build(name, weight=1.0), student.clone(), teacher)[2]
    loss = build(name, weight=3.0)
    distiller, _, thrice = distil(loss, student.clone(), teacher)
    assert thrice.item() == pytest.approx(3 * once.item(), rel=1e-6)
    thrice.backward()
    with_gradient = {key for key, parameter in distiller.named_parameters() if parameter.grad is not None}
    own = {f"losses.{name}.{key}" for key, _ in loss.named_parameters()}
    assert with_gradient - own == {"student.map" if issubclass(LOSSES[name], FeatureLoss) else "student.logits"}
    assert own <= with_gradient


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_sends_a_gradient_into_the_teacher_by_way_of_its_targets_alone(name):
    """The teacher's outputs come without gradients in the loop; here they have them, and the student's part is checked
    to be the same either way."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    gradients = []
    for detached in (True, False):
        torch.manual_seed(1)
        mine, theirs = Given(student.clone()), Given(teacher.clone())
        labels = torch.zeros(6, dtype=torch.long)
        distiller = Distiller(mine, [build(name)], theirs, (3, 8, 8))
        said = theirs.outputs(None)
        if detached:
            said = Outputs(said.logits.detach(), {key: value.detach() for key, value in said.features.items()})
        sum(distiller(Batch(torch.empty(6, 0), labels, labels), said).values()).backward()
        gradients.append([p.grad for p in distiller.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_feature_distances_equal_loops():
    torch.manual_seed(0)
    one, other = torch.randn(2, 4, 3, 5, 5, dtype=torch.double)
    pairs = list(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    expected = {
        "mse": math.fsum((a - b) ** 2 for a, b in pairs),
        "l1": math.fsum(abs(a - b) for a, b in pairs),
        "smooth_l1": math.fsum(0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in pairs),
    }
    for name, total in expected.items():
        loss = FeatureDistance("a", "b", distance=name)
        value = loss(Outputs(one, {"a": one}), Outputs(other, {"b": other}), None)
        assert value.item() == pytest.approx(total / len(pairs), rel=1e-12)


def test_cosine_distance_equals_loops_and_pools_the_teacher():
    torch.manual_seed(0)
    student = torch.randn(4, 2, 3, dtype=torch.double)
    teacher = torch.randn(4, 12, dtype=torch.double)
    total = 0.0
    for s, t in zip(student.flatten(1).tolist(), teacher.tolist(), strict=True):
        pooled = [(t[2 * i] + t[2 * i + 1]) / 2 for i in range(6)]
        dot = math.fsum(a * b for a, b in zip(s, pooled, strict=True))
        total += 1 - dot / math.sqrt(math.fsum(a * a for a in s) * math.fsum(b * b for b in pooled))
    assert cosine_distance(student, teacher).item() == pytest.approx(total / 4, rel=1e-12)
    assert cosine_distance(student, 3 * student).item() == pytest.approx(0, abs=1e-12)
    ones = torch.nn.functional.cosine_embedding_loss(student.flatten(1), student.flatten(1).flip(1), torch.ones(4))
    assert cosine_distance(student, student.flatten(1).flip(1)).item() == pytest.approx(ones.item(), rel=1e-12)


def test_fitnet_learns_a_convolution_from_student_to_teacher():
    loss = FitNet("a", "b", kernel_size=3)
    loss.setup({"a": (16, 8, 8)}, {"b": (32, 8, 8)})
    assert loss.regressor.weight.shape == (32, 16, 3, 3)
    one, other = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 8, 8)
    expected = (loss.regressor(one) - other).square().mean()
    assert loss(Outputs(one, {"a": one}), Outputs(other, {"b": other}), None).item() == pytest.approx(expected.item())


def test_soft_losses_equal_loops():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 5, dtype=torch.double)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    soft = [(softmax(s, 4.0), softmax(t, 4.0)) for s, t in rows]
    cross = -math.fsum(p * math.log(q) for qs, ps in soft for q, p in zip(qs, ps, strict=True)) / 7 * 16
    absolute = math.fsum(abs(p - q) for qs, ps in soft for q, p in zip(qs, ps, strict=True)) / 35
    square = math.fsum((a - b) ** 2 for s, t in rows for a, b in zip(s, t, strict=True)) / 35
    arguments = Outputs(student), Outputs(teacher), None
    assert SoftCrossEntropy(4.0)(*arguments).item() == pytest.approx(cross, rel=1e-12)
    assert SoftMAE(4.0)(*arguments).item() == pytest.approx(absolute, rel=1e-12)
    assert LogitsMSE()(*arguments).item() == pytest.approx(square, rel=1e-12)


def test_double_softmax_cannot_be_sure():
    sure = 1000 * torch.eye(10, dtype=torch.double)
    labels = torch.arange(10)
    batch = Batch(torch.empty(10, 0), labels, labels)
    assert CrossEntropy()(Outputs(sure), None, batch).item() == 0
    assert DoubleSoftmax()(Outputs(sure), None, batch).item() == pytest.approx(math.log(math.e + 9) - 1, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "shapes", "words"),
    [
        (FeatureDistance("a", "b"), ((3, 4, 4), (3, 2, 2)), "FeatureDistance: the student's a is 3x4x4"),
        (CosineEmbedding("a", "b"), ((9,), (3, 2)), "no longer than the teacher's"),
        (FitNet("a", "b"), ((3, 4, 4), (3, 2, 2)), "equal height and width"),
        (FitNet("a", "b"), ((3,), (3, 2, 2)), "equal height and width"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(loss, shapes, words):
    with pytest.raises(ValueError, match=words):
        loss.setup({"a": shapes[0]}, {"b": shapes[1]})


def test_terms_of_one_class_are_told_apart():
    logits = torch.randn(3, 4)
    labels = torch.zeros(3, dtype=torch.long)
    distiller = Distiller(Given(logits), [KL(2.0), KL(4.0, weight=0.5), CrossEntropy(weight=0.1)])
    terms = distiller(Batch(torch.empty(3, 0), labels, labels), Outputs(torch.randn(3, 4)))
    assert list(terms) == ["KL", "KL_2", "CrossEntropy"]
    assert (
        distiller.objective()
        == "1 * KL(temperature=2.0) + 0.5 * KL_2(temperature=4.0) + 0.1 * CrossEntropy(label_smoothing=0.0)"
    )
    assert distiller.needs_teacher == ["KL", "KL_2"]


def test_golden_values():
    student = torch.arange(12, dtype=torch.double).view(3, 4).sin()
    teacher = torch.arange(12, dtype=torch.double).view(3, 4).cos()
    assert kl_divergence(student, teacher, 4.0).item() == pytest.approx(0.33887712510237455, rel=1e-12)
