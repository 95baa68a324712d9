"""The losses of 2023 and later, and hard labels, against slow references: loops over Python floats."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from test_losses_response import SHAPES, example, kl, rows_of, softmax, value, without

from kd.losses import ABKD, IKL, OFA, RLD, WKDF, WTTM, BinaryKL, HardLabels, Setting
from kd.losses.abkd import alpha_beta_divergence
from kd.losses.binary_kl import binary_kl
from kd.losses.ikl import pair_differences
from kd.losses.kl import kl_divergence
from kd.losses.ofa import target_enhanced
from kd.losses.rld import refined
from kd.losses.wkd import gaussians, wasserstein
from kd.losses.wttm import transformed_teacher
from kd.outputs import Batch, Outputs


def far_and_sure(num_classes=10):
    """Logits of 1e4 and -1e4 in float32, where probabilities are 0 and 1, and labels of which the teacher is wrong."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(0, 2, (2, 6, num_classes), generator=generator) * 2e4 - 1e4
    return student.requires_grad_(), teacher, teacher.argmin(1)


@pytest.mark.parametrize(
    "loss", [WTTM(), OFA(1.5), OFA(0.5), IKL(), ABKD(), ABKD(0.2, 0.1), RLD(), HardLabels(), BinaryKL()]
)
def test_finite_where_teacher_and_student_are_sure_and_apart(loss):
    student, teacher, labels = far_and_sure()
    found = value(loss, student, teacher, labels)
    found.backward()
    assert found.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_wttm_equals_loops(shape, temperature):
    student, teacher, _ = example(*shape)
    total = 0.0
    for s, t in rows_of(student, teacher):
        powers = [p ** (1 / temperature) for p in softmax(t)]
        total += math.fsum(powers) * kl([power / math.fsum(powers) for power in powers], softmax(s))
    assert value(WTTM(temperature), student, teacher).item() == pytest.approx(total / len(student), rel=1e-10)


def test_wttm_is_reached_by_the_softened_teacher_and_is_kl_at_1():
    student, teacher, _ = example(6, 10)
    assert transformed_teacher(teacher / 5 + 3, teacher, 5.0).item() == pytest.approx(0, abs=1e-12)
    expected = kl_divergence(student, teacher, 1.0).item()
    assert transformed_teacher(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.5, 1.0), (0.7, 2.0)])
def test_ofa_equals_loops(shape, gamma, temperature):
    student, teacher, labels = example(*shape)
    total = 0.0
    for s, t, label in rows_of(student, teacher, labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        for k in range(len(p)):
            total -= ((1 + p[k]) ** gamma - 1 if k == label else p[k] ** gamma) * math.log(q[k])
    found = value(OFA(gamma, temperature), student, teacher, labels).item()
    assert found == pytest.approx(total / len(labels), rel=1e-10)


def test_ofa_at_1_is_the_teachers_entropy_where_both_agree():
    _, teacher, labels = example(6, 10)
    entropy = -statistics.fmean(math.fsum(p * math.log(p) for p in softmax(t)) for t in teacher.tolist())
    assert value(OFA(), teacher, teacher, labels).item() == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair_temperature", [1.0, 100.0])
def test_ikl_equals_loops(shape, pair_temperature):
    student, teacher, labels = example(*shape)
    pairs = divergence = 0.0
    for s, t in rows_of(student, teacher):
        w = softmax(t, pair_temperature)
        for j in range(len(w)):
            for k in range(len(w)):
                pairs += 0.25 * w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
        divergence += kl(softmax(t, 3.0), softmax(s, 3.0))
    assert pair_differences(student, teacher, pair_temperature).item() == pytest.approx(pairs / len(labels), rel=1e-10)
    whole = (0.5 * divergence + 2.0 * pairs) / len(labels)
    loss = IKL(alpha=0.5, beta=2.0, temperature=3.0, pair_temperature=pair_temperature)
    for epoch, share in ((0, 0.05), (19, 1.0), (200, 1.0)):
        assert value(loss, student, teacher, epoch=epoch).item() == pytest.approx(share * whole, rel=1e-10)
    assert value(loss, student + 3, student).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.2, 0.9), (2.0, 1.0)])
def test_abkd_equals_loops(shape, alpha, beta):
    student, teacher, _ = example(*shape)
    total = 0.0
    for s, t in rows_of(student, teacher):
        for p, q in zip(softmax(t, 3.0), softmax(s, 3.0), strict=True):
            own = (alpha * p ** (alpha + beta) + beta * q ** (alpha + beta)) / (alpha + beta)
            total -= (p**alpha * q**beta - own) / (alpha * beta)
    found = value(ABKD(alpha, beta, temperature=3.0), student, teacher).item()
    assert found == pytest.approx(9 * total / len(student), rel=1e-9)
    assert value(ABKD(alpha, beta), student + 3, student).item() == pytest.approx(0, abs=1e-12)


def test_abkd_has_kl_and_its_reverse_as_limits():
    student, teacher, _ = example(6, 10)
    near_kl = alpha_beta_divergence(student, teacher, 1.0, 1e-6, 3.0).item()
    assert near_kl == pytest.approx(kl_divergence(student, teacher, 3.0).item(), rel=1e-5)
    near_reverse = alpha_beta_divergence(student, teacher, 1e-6, 1.0, 3.0).item()
    assert near_reverse == pytest.approx(kl_divergence(teacher, student, 3.0).item(), rel=1e-5)


def reference_refined(student, teacher, labels, temperature):
    sample = masked = 0.0
    for s, t, label in rows_of(student, teacher, labels):
        top = max(softmax(t, temperature))
        own = softmax(s, temperature)[label]
        sample += kl([top, 1 - top], [own, math.fsum(without(softmax(s, temperature), label))])
        below = [k for k in range(len(t)) if t[k] < t[label]]
        if below:
            masked += kl(*(softmax([z[k] for k in below], temperature) for z in (t, s)))
    return temperature**2 * sample / len(labels), temperature**2 * masked / len(labels)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 2)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rld_equals_loops(shape, temperature):
    student, teacher, labels = example(*shape)
    teacher[0, labels[0]] = teacher[0].max() + 1  # right about the first image, and the last one's label is its lowest
    teacher[-1, labels[-1]] = teacher[-1].min() - 1
    expected = reference_refined(student, teacher, labels, temperature)
    found = refined(student, teacher, labels, temperature)
    assert [part.item() for part in found] == pytest.approx(expected, rel=1e-9)
    loss = RLD(alpha=0.5, beta=3.0, temperature=temperature)
    whole = 0.5 * expected[0] + 3.0 * expected[1]
    for epoch, share in ((0, 0.05), (19, 1.0), (200, 1.0)):
        assert value(loss, student, teacher, labels, epoch).item() == pytest.approx(share * whole, rel=1e-9)


def test_rld_is_0_where_the_student_agrees_with_a_teacher_that_is_right():
    student, _, _ = example(6, 10)
    assert value(RLD(warmup_epochs=0), student, student, student.argmax(1)).item() == pytest.approx(0, abs=1e-12)


def test_rld_takes_nothing_from_classes_that_the_teacher_ranks_above_the_label():
    """The gradient at them is that of the sample confidence alone, which pushes all classes but the label alike."""
    student, teacher, labels = example(6, 10)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(refined(student, teacher, labels, 4.0)[1], student)
    hidden = teacher >= teacher.gather(1, labels[:, None])
    assert gradient[hidden].abs().max() == 0
    assert gradient[~hidden].abs().max() > 1e-3


def test_hard_labels_equal_loops():
    student, teacher, labels = example(6, 10)
    rows = rows_of(student, teacher)
    expected = -statistics.fmean(math.log(softmax(s)[t.index(max(t))]) for s, t in rows)
    assert value(HardLabels(), student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    changed = value(HardLabels(), student, 0.1 * teacher - 7, labels)
    assert changed.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_binary_kl_equals_loops(shape):
    student, teacher, _ = example(*shape)
    total = 0.0
    for s, t in rows_of(student, teacher):
        for a, b in zip(s, t, strict=True):
            q, p = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert value(BinaryKL(), student, teacher).item() == pytest.approx(total / len(student), rel=1e-10)
    assert binary_kl(student, student).item() == pytest.approx(0, abs=1e-12)


def maps(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [1, 2])
def test_wkdf_equals_loops(grid):
    student, teacher = maps(3, 2, 4, 6), maps(3, 2, 2, 4, seed=1)
    total = 0.0
    for image in range(3):
        for row in range(grid):
            for column in range(grid):
                for channel in range(2):
                    moments = []
                    for feature in (student, teacher):
                        height, width = feature.shape[2] // grid, feature.shape[3] // grid
                        rows = feature[image, channel].tolist()[row * height : (row + 1) * height]
                        places = [x for line in rows for x in line[column * width : (column + 1) * width]]
                        moments.append((statistics.fmean(places), math.sqrt(statistics.pvariance(places) + 1e-5)))
                    (mean, spread), (their_mean, their_spread) = moments
                    total += 3.0 * (mean - their_mean) ** 2 + (spread - their_spread) ** 2
    expected = pytest.approx(total / (3 * grid**2), rel=1e-10)
    assert wasserstein(student, teacher, grid, 3.0).item() == expected
    assert wasserstein(student, student, grid, 3.0).item() == 0


def test_wkdf_projects_the_student_and_sees_where_things_are_by_its_grid_only():
    student, teacher = maps(4, 3, 4, 4), maps(4, 2, 4, 4, seed=1).relu()
    loss = WKDF("a", "b", grid=2)
    loss.setup(Setting({"a": (3, 4, 4)}, {"b": (2, 4, 4)}))
    loss.double()
    found = loss(Outputs(student, {"a": student}), Outputs(teacher, {"b": teacher}), Batch({}, None, None))
    assert found.item() == pytest.approx(wasserstein(loss.projector(student), teacher, 2, 4.0).item(), rel=1e-12)
    assert loss.projector(student).min() >= 0
    assert wasserstein(teacher, teacher.flip(3), 1, 4.0).item() == pytest.approx(0, abs=1e-12)
    assert wasserstein(teacher, teacher.flip(3), 2, 4.0).item() > 1e-3


def test_a_cell_of_equal_values_has_a_finite_gradient():
    flat = torch.full((2, 3, 1, 1), 0.5, requires_grad=True)
    gaussians(flat, 1)[1].sum().backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(
    "function",
    [
        lambda s, t, y: transformed_teacher(s, t, 5.0),
        lambda s, t, y: target_enhanced(s, t, y, 1.5, 2.0),
        lambda s, t, y: pair_differences(s, t, 2.0),
        lambda s, t, y: alpha_beta_divergence(s, t, 0.8, 0.3, 3.0),
        lambda s, t, y: sum(refined(s, t, y, 3.0)),
        lambda s, t, y: binary_kl(s, t),
    ],
    ids=["WTTM", "OFA", "IKL", "ABKD", "RLD", "BinaryKL"],
)
def test_gradients_equal_differences(function):
    student, teacher, labels = example(3, 4)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher, labels), student.requires_grad_())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WTTM(temperature=0.0), "WTTM: temperature 0.0 must be"),
        (lambda: OFA(gamma=0.0), "OFA: gamma 0.0 must be"),
        (lambda: IKL(alpha=-1.0), "IKL: alpha -1.0 must be"),
        (lambda: IKL(beta=float("nan")), "IKL: beta nan must be"),
        (lambda: IKL(pair_temperature=0.0), "IKL: pair_temperature 0.0 must be"),
        (lambda: IKL(warmup_epochs=-1), "IKL: warmup_epochs -1 must be"),
        (lambda: ABKD(alpha=0.0), "ABKD: alpha 0.0 must be"),
        (lambda: ABKD(beta=-0.5), "ABKD: beta -0.5 must be"),
        (lambda: RLD(alpha=-1.0), "RLD: alpha -1.0 must be"),
        (lambda: RLD(beta=float("inf")), "RLD: beta inf must be"),
        (lambda: RLD(warmup_epochs=-1), "RLD: warmup_epochs -1 must be"),
        (lambda: WKDF("a", "b", grid=0), "WKDF: grid 0 must be"),
        (lambda: WKDF("a", "b", mean_weight=-1.0), "WKDF: mean_weight -1.0 must be"),
        (lambda: WKDF("a", "b", grid=4).setup(Setting({"a": (3, 4, 4)}, {"b": (2, 2, 2)})), "grid 4 divides"),
        (lambda: WKDF("a", "b").setup(Setting({"a": (3,)}, {"b": (2,)})), "tap maps"),
    ],
)
def test_impossible_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
