"""Every loss against a slow reference written with loops in float64 from the formula, and what must hold for all."""

from __future__ import annotations

import math

import pytest
import torch

from kd.distiller import Distiller
from kd.losses import KL, LOSSES, CrossEntropy
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
    """A student whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def outputs(self, images, keys=None):
        return Outputs(self.logits)


def distil(loss, student, teacher, labels=None):
    labels = torch.zeros(len(student), dtype=torch.long) if labels is None else labels
    distiller = Distiller(Given(student), [loss])
    terms = distiller(Batch(torch.empty(len(student), 0), labels, labels), Outputs(teacher))
    return distiller, next(iter(terms.values()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [1, 6])
def test_every_loss_is_finite_far_out_and_in_half_precision(name, num_classes, size):
    torch.manual_seed(0)
    student = (torch.randint(0, 2, (size, num_classes)) * 2e4 - 1e4).half()
    teacher = (torch.randint(0, 2, (size, num_classes)) * 2e4 - 1e4).half().requires_grad_()
    distiller, value = distil(LOSSES[name](), student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    value.backward()
    assert value.isfinite()
    assert distiller.student.logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_weighted_and_trains_the_student_only(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 5)
    teacher.requires_grad_()
    once = distil(LOSSES[name](weight=1.0), student.clone(), teacher.detach())[1]
    distiller, thrice = distil(LOSSES[name](weight=3.0), student.clone(), teacher.detach())
    assert thrice.item() == pytest.approx(3 * once.item(), rel=1e-6)
    thrice.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert teacher.grad is None


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
