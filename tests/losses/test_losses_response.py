"""Losses on logits against slow references: loops over Python floats, written from the papers' formulas."""

from __future__ import annotations

import inspect
import math
import socket
import statistics

import children
import pytest
import torch
import torch.distributed as dist
from test_losses import build, gradients, value_of

from kd.losses import (
    CTKD,
    DIST,
    DKD,
    KL,
    LOSSES,
    MLKD,
    NKD,
    LogitLoss,
    LogitsMSE,
    Setting,
    SoftCrossEntropy,
    SoftMAE,
)
from kd.losses.base import z_score
from kd.losses.ctkd import curriculum, reverse_gradient
from kd.losses.dist import correlation, relation_losses
from kd.losses.dkd import decoupled
from kd.losses.kl import kl_divergence
from kd.losses.mlkd import gram_losses
from kd.losses.nkd import normalized
from kd.outputs import Batch, Outputs
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(3)

SHAPES = [(7, 3), (6, 10), (4, 100)]


def example(size, num_classes, scale=2.0):
    """Student's and teacher's logits in float64 and labels; each class may be a label, the last one is."""
    generator = torch.Generator().manual_seed(size)
    student, teacher = scale * torch.randn(2, size, num_classes, dtype=torch.double, generator=generator)
    labels = torch.randint(0, num_classes, (size,), generator=generator)
    labels[0], labels[-1] = 0, num_classes - 1
    return student, teacher, labels


def value(loss, student, teacher, labels=None, epoch=0):
    batch = Batch({}, labels, labels, epoch=epoch)
    return loss(Outputs(student), Outputs(teacher), batch)


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / math.fsum(powers) for power in powers]


def kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def without(values, place):
    return values[:place] + values[place + 1 :]


def rows_of(*tensors):
    return list(zip(*(tensor.tolist() for tensor in tensors), strict=True))


def reference_decoupled(student, teacher, labels, temperature):
    target = others = 0.0
    for s, t, label in rows_of(student, teacher, labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        not_p, not_q = math.fsum(without(p, label)), math.fsum(without(q, label))
        target += kl([p[label], not_p], [q[label], not_q])
        others += kl([a / not_p for a in without(p, label)], [b / not_q for b in without(q, label)])
    return temperature**2 * target / len(labels), temperature**2 * others / len(labels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_equals_loops(shape, temperature):
    student, teacher, labels = example(*shape)
    expected = reference_decoupled(student, teacher, labels, temperature)
    found = decoupled(student, teacher, labels, temperature)
    assert [part.item() for part in found] == pytest.approx(expected, rel=1e-10)
    loss = DKD(alpha=0.5, beta=3.0, temperature=temperature, warmup_epochs=20)
    whole = 0.5 * expected[0] + 3.0 * expected[1]
    for epoch, share in ((0, 0.05), (9, 0.5), (19, 1.0), (200, 1.0)):
        assert value(loss, student, teacher, labels, epoch).item() == pytest.approx(share * whole, rel=1e-10)
    assert value(DKD(beta=2.0, warmup_epochs=0), student, student, labels).item() == pytest.approx(0, abs=1e-12)


def test_dkd_weighted_by_the_teachers_doubt_is_kl():
    """KL = TCKD + (1 - p_label) * NCKD for each image, which is what the method takes apart."""
    student, teacher, labels = example(6, 10)
    for i in range(6):
        image = slice(i, i + 1)
        target, others = decoupled(student[image], teacher[image], labels[image], 4.0)
        doubt = 1 - softmax(teacher[i].tolist(), 4.0)[labels[i]]
        whole = kl_divergence(student[image], teacher[image], 4.0)
        assert (target + doubt * others).item() == pytest.approx(whole.item(), rel=1e-10)


def test_dkd_keeps_the_other_classes_where_the_label_is_sure():
    """In float32 and 1000 above all others, 1 - p is 0; the others' part does not depend on the label's logit."""
    student, teacher, labels = example(6, 10)
    sure = [logits.scatter(1, labels[:, None], 1000.0).float().requires_grad_() for logits in (student, teacher)]
    target, others = decoupled(*sure, labels, 4.0)
    assert others.item() == pytest.approx(decoupled(student, teacher, labels, 4.0)[1].item(), rel=1e-5)
    assert target.item() == pytest.approx(0, abs=1e-6)
    (target + others).backward()
    assert sure[0].grad.isfinite().all()
    assert sure[0].grad.abs().max() > 1e-3


def reference_normalized(student, teacher, labels, temperature):
    target = others = 0.0
    for s, t, label in rows_of(student, teacher, labels):
        target -= softmax(t)[label] * math.log(softmax(s)[label])
        p, q = softmax(t, temperature), softmax(s, temperature)
        for k in range(len(p)):
            if k != label:
                others -= p[k] / (1 - p[label]) * math.log(q[k] / (1 - q[label]))
    return target / len(labels), temperature**2 * others / len(labels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_equals_loops(shape, temperature):
    student, teacher, labels = example(*shape)
    expected = reference_normalized(student, teacher, labels, temperature)
    found = normalized(student, teacher, labels, temperature)
    assert [part.item() for part in found] == pytest.approx(expected, rel=1e-9)
    loss = NKD(gamma=3.5, temperature=temperature)
    assert value(loss, student, teacher, labels).item() == pytest.approx(expected[0] + 3.5 * expected[1], rel=1e-9)


def test_nkd_has_reached_the_others_when_they_agree_up_to_their_sum():
    """Renormalised, the other classes agree although the label's logit does not: their term's gradient is 0."""
    student, _, labels = example(6, 10)
    student.requires_grad_()
    teacher = student.detach().scatter(1, labels[:, None], 7.0)
    (gradient,) = torch.autograd.grad(normalized(student, teacher, labels, 2.0)[1], student)
    assert gradient.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(kl_divergence(student, teacher, 2.0), student)
    assert gradient.abs().max() > 1e-2


def test_nkd_with_two_classes_is_a_cross_entropy_weighted_by_the_teachers_confidence():
    student, teacher, labels = example(5, 2)
    total = -math.fsum(softmax(t)[y] * math.log(softmax(s)[y]) for s, t, y in rows_of(student, teacher, labels))
    assert value(NKD(), student, teacher, labels).item() == pytest.approx(total / 5, rel=1e-12)


def pearson(one, other):
    return statistics.correlation(one, other)


def reference_relations(student, teacher, temperature):
    p, q = ([softmax(row, temperature) for row in logits.tolist()] for logits in (teacher, student))
    inter = 1 - statistics.fmean(pearson(a, b) for a, b in zip(p, q, strict=True))
    columns = zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)
    intra = 1 - statistics.fmean(pearson(a, b) for a, b in columns)
    return temperature**2 * inter, temperature**2 * intra


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_equals_loops(shape, temperature):
    student, teacher, labels = example(*shape)
    expected = reference_relations(student, teacher, temperature)
    assert [part.item() for part in relation_losses(student, teacher, temperature)] == pytest.approx(expected, rel=1e-9)
    loss = DIST(beta=0.5, gamma=3.0, temperature=temperature)
    whole = 0.5 * expected[0] + 3.0 * expected[1]
    assert value(loss, student, teacher, labels).item() == pytest.approx(whole, rel=1e-9)
    assert value(loss, student, student, labels).item() == pytest.approx(0, abs=1e-12)


def test_dist_compares_relations_only():
    """Correlation is blind to scale and shift of a row (section 4), and to what is constant it is 0."""
    one, other, _ = example(6, 10)
    scale, shift = torch.rand(2, 6, 1, dtype=torch.double) + 0.1
    assert torch.allclose(correlation(scale * one + shift, other), correlation(one, other), rtol=1e-10)
    assert torch.allclose(correlation(one, -3 * one), -torch.ones(6, dtype=torch.double))
    flat = torch.full((6, 10), 0.1, requires_grad=True)
    found = correlation(flat, other.float())
    assert found.abs().max() < 1e-6
    found.sum().backward()
    assert flat.grad.abs().max() < 10


def test_dist_of_one_image_has_no_relation_between_images():
    student, teacher, labels = example(1, 10)
    inter, intra = relation_losses(student, teacher, 4.0)
    assert intra == 0
    assert value(DIST(beta=0.5), student, teacher, labels).item() == pytest.approx(0.5 * inter.item(), rel=1e-12)
    assert inter.item() == pytest.approx(16 * (1 - pearson(*(softmax(z[0].tolist(), 4.0) for z in (student, teacher)))))


def reference_grams(student, teacher, temperature):
    p, q = ([softmax(row, temperature) for row in logits.tolist()] for logits in (teacher, student))
    levels = []
    for mine, theirs in ((q, p), (list(zip(*q, strict=True)), list(zip(*p, strict=True)))):
        total = 0.0
        for i in range(len(mine)):
            for j in range(len(mine)):
                here = math.fsum(a * b for a, b in zip(mine[i], mine[j], strict=True))
                there = math.fsum(a * b for a, b in zip(theirs[i], theirs[j], strict=True))
                total += (here - there) ** 2
        levels.append(total / len(mine))
    return levels


@pytest.mark.parametrize("shape", [(7, 3), (6, 10), (1, 4)])
def test_mlkd_equals_loops(shape):
    student, teacher, labels = example(*shape)
    whole = 0.0
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        grams = reference_grams(student, teacher, temperature)
        assert [part.item() for part in gram_losses(student, teacher, temperature)] == pytest.approx(grams, rel=1e-9)
        images = (kl(softmax(t, temperature), softmax(s, temperature)) for s, t in rows_of(student, teacher))
        whole += temperature**2 * statistics.fmean(images) + sum(grams)
    assert value(MLKD(), student, teacher, labels).item() == pytest.approx(whole, rel=1e-9)
    assert value(MLKD(), student, student, labels).item() == pytest.approx(0, abs=1e-12)


def test_mlkd_standardizes_the_instance_level_only():
    student, teacher, labels = example(6, 10)
    found = value(MLKD((3.0,), standardize=True), student, teacher, labels)
    expected = kl_divergence(z_score(student), z_score(teacher), 3.0) + sum(gram_losses(student, teacher, 3.0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def make_ctkd(raw=1.0, **arguments):
    loss = CTKD(**arguments)
    loss.setup(Setting(num_classes=10))
    loss.double()
    torch.nn.init.constant_(loss.raw_temperature, raw)
    return loss


@pytest.mark.parametrize("raw", [-2.0, 1.0, 40.0])
def test_ctkd_equals_loops(raw):
    student, teacher, labels = example(6, 10)
    temperature = 1 + 20 / (1 + math.exp(-raw))
    images = (kl(softmax(t, temperature), softmax(s, temperature)) for s, t in rows_of(student, teacher))
    expected = temperature**2 * statistics.fmean(images)
    for epoch in (0, 5, 100):
        assert value(make_ctkd(raw), student, teacher, labels, epoch).item() == pytest.approx(expected, rel=1e-10)


def test_ctkd_starts_where_the_authors_do():
    loss = CTKD()
    loss.setup(Setting())
    assert dict(loss.named_parameters())["raw_temperature"].item() == 1


@pytest.mark.parametrize(("epoch", "strength"), [(0, 0.0244717), (4, 0.5), (9, 1.0), (200, 1.0)])
def test_ctkd_climbs_the_loss_by_a_strength_that_follows_the_cosine(epoch, strength):
    """The paper's schedule, 1 / 2 * (1 + cos((1 + e / 10) * pi)) with epochs counted from 1."""
    student, teacher, labels = example(6, 10)
    step = 1e-6
    above, below = (value(make_ctkd(0.3 + d), student, teacher, labels).item() for d in (step, -step))
    slope = (above - below) / (2 * step)
    loss = make_ctkd(0.3)
    value(loss, student, teacher, labels, epoch).backward()
    assert abs(slope) > 0.01
    assert loss.raw_temperature.grad.item() == pytest.approx(-strength * slope, rel=1e-5)
    published = (1 + math.cos((1 + min(epoch + 1, 10) / 10) * math.pi)) / 2
    assert curriculum(epoch, 10) == pytest.approx(published, abs=1e-12)
    assert curriculum(epoch, 0) == 1


def test_ctkd_gives_the_student_the_gradient_of_kl_and_the_temperature_that_of_the_opposite():
    student, teacher, labels = example(6, 10)
    student.requires_grad_()
    temperature = 1 + 20 / (1 + math.exp(-1.0))
    found, expected = (
        torch.autograd.grad(term, student)[0]
        for term in (
            value(make_ctkd(), student, teacher, labels, 100),
            kl_divergence(student, teacher, temperature),
        )
    )
    assert torch.allclose(found, expected, rtol=1e-10)
    loss = make_ctkd()
    values = []
    for _ in range(5):
        term = value(loss, student, teacher, labels, 100)
        values.append(term.item())
        (gradient,) = torch.autograd.grad(term, loss.raw_temperature)
        loss.raw_temperature.data -= 0.1 * gradient
    assert values == sorted(set(values))


def test_reversed_gradients_leave_the_value_alone():
    x = torch.tensor([0.1, -1e30, 1e-30], requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.3))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, t, y: sum(decoupled(s, t, y, 3.0)),
        lambda s, t, y: sum(normalized(s, t, y, 2.0)),
        lambda s, t, y: sum(relation_losses(s, t, 3.0)),
        lambda s, t, y: sum(gram_losses(s, t, 2.0)),
        lambda s, t, y: z_score(s),
        lambda s, t, y: correlation(s, t),
    ],
    ids=["DKD", "NKD", "DIST", "MLKD", "z_score", "correlation"],
)
def test_gradients_equal_differences(function):
    student, teacher, labels = example(3, 4)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher, labels), student.requires_grad_())


def standard(logits):
    """Logit standardization as published: Python's stdev has K - 1 in its denominator, as torch.std has."""
    mean, deviation = statistics.fmean(logits), statistics.stdev(logits)
    return [(z - mean) / (deviation + 1e-7) for z in logits]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_standardized_losses_equal_loops(shape, temperature):
    student, teacher, labels = example(*shape)
    rows = [(standard(s), standard(t)) for s, t in rows_of(student, teacher)]
    soft = [(softmax(s, temperature), softmax(t, temperature)) for s, t in rows]
    square = temperature**2
    each = [(a, b) for pair in soft for a, b in zip(*pair, strict=True)]
    expected = {
        KL(temperature, standardize=True): square * statistics.fmean(kl(t, s) for s, t in soft),
        SoftCrossEntropy(temperature, standardize=True): -square
        * math.fsum(b * math.log(a) for a, b in each)
        / len(rows),
        SoftMAE(temperature, standardize=True): statistics.fmean(abs(a - b) for a, b in each),
        LogitsMSE(standardize=True): statistics.fmean(
            (a - b) ** 2 for pair in rows for a, b in zip(*pair, strict=True)
        ),
    }
    for loss, number in expected.items():
        found = value(loss, student, teacher, labels).item()
        assert found == pytest.approx(number, rel=1e-10), loss
        assert found != pytest.approx(value(type(loss)(), student, teacher, labels).item(), rel=1e-3), loss


STANDARDIZED = [name for name, kind in LOSSES.items() if issubclass(kind, LogitLoss)]


def test_every_loss_on_logits_can_be_standardized():
    assert {"CTKD", "DIST", "DKD", "KL", "LogitsMSE", "MLKD", "NKD", "SoftCrossEntropy", "SoftMAE"} <= set(STANDARDIZED)
    assert all("standardize" in inspect.signature(LOSSES[name]).parameters for name in STANDARDIZED)


@pytest.mark.parametrize("name", [name for name in STANDARDIZED if name != "MLKD"])  # its Gram matrices see them
def test_standardized_losses_see_neither_scale_nor_shift(name):
    student, teacher, labels = example(6, 10)
    loss = LOSSES[name](standardize=True)
    loss.setup(Setting(num_classes=10))
    expected = value(loss, student, teacher, labels).item()
    changed = value(loss, 0.2 * student - 5, 30 * teacher + 100, labels).item()
    assert changed == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", STANDARDIZED)
@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_standardized_gradients_stay_small_where_all_logits_are_equal(name, level):
    """A student whose last layer is all zeros: 0 / 0 by the formula, and 1e7 or more were it 0 / 1e-7."""
    torch.manual_seed(0)
    logits = torch.stack([torch.full((6, 10), level), torch.randn(6, 10)])
    distiller, teacher, batch = build(name, 10, logits=logits, standardize=True)
    found = value_of(distiller, teacher, batch)
    found.backward()
    assert found.isfinite()
    gradient = gradients(distiller)["learner.student.logits"]
    assert 1e-6 < gradient.abs().max() < 100
    flat = Outputs(torch.full((6, 10), level), teacher.features)
    assert value_of(distiller, flat, batch).isfinite()


@pytest.mark.parametrize("name", STANDARDIZED)
@pytest.mark.parametrize("num_classes", [3, 1000])
@pytest.mark.parametrize("size", [1, 6])
def test_standardized_losses_are_finite_far_out(name, num_classes, size):
    torch.manual_seed(0)
    far = (torch.randint(0, 2, (2, size, num_classes)) * 2e4 - 1e4).half()
    distiller, teacher, batch = build(name, num_classes, size, logits=far, standardize=True)
    found = value_of(distiller, teacher, batch)
    found.backward()
    assert found.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(distiller).values())


@pytest.mark.parametrize("name", STANDARDIZED)
def test_standardizing_two_classes_is_refused(name):
    """(a, b) becomes (0.7, -0.7) or (-0.7, 0.7): the gradient is 0."""
    logits = torch.randn(6, 2, dtype=torch.double, requires_grad=True)
    assert torch.allclose(z_score(logits).abs(), torch.tensor(0.5, dtype=torch.double).sqrt(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(z_score(logits)[:, 0].sum(), logits)
    assert gradient.abs().max() < 1e-4
    with pytest.raises(UserError, match=f"{name}: .*2 classes"):
        build(name, 2, standardize=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DKD(alpha=-1.0), "DKD: alpha -1.0 must be"),
        (lambda: DKD(beta=float("nan")), "DKD: beta nan must be"),
        (lambda: DKD(warmup_epochs=-1), "DKD: warmup_epochs -1 must be"),
        (lambda: DKD(temperature=0.0), "DKD: temperature 0.0 must be"),
        (lambda: DKD().setup(Setting(num_classes=2)), "DKD: 2 classes leave one"),
        (lambda: NKD(gamma=-0.1), "NKD: gamma -0.1 must be"),
        (lambda: DIST(beta=-1.0), "DIST: beta -1.0 must be"),
        (lambda: DIST(gamma=float("inf")), "DIST: gamma inf must be"),
        (lambda: MLKD(()), r"MLKD: temperatures \[\] must be"),
        (lambda: MLKD((2.0, 0.0)), r"MLKD: temperatures \[2.0, 0.0\] must be"),
        (lambda: CTKD(min_temperature=0.0), "CTKD: min_temperature 0.0 must be"),
        (lambda: CTKD(temperature_range=-1.0), "CTKD: temperature_range -1.0 must be"),
        (lambda: CTKD(warmup_epochs=-1), "CTKD: warmup_epochs -1 must be"),
    ],
)
def test_impossible_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Uneven, and the last process of the three has an image of weight 0 only.
COUNTS = [4, 3, 0]


def on_one_of_several(rank, port, results):
    """Send the values and the student's gradient of this process's part of the batch."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(COUNTS))
    student, teacher, labels = example(sum(COUNTS), 5)
    start, count = sum(COUNTS[:rank]), COUNTS[rank]
    mine = slice(start, start + count) if count else slice(0, 1)
    share = count * len(COUNTS) / sum(COUNTS)
    batch = Batch({}, labels[mine], labels[mine], counts=COUNTS)
    found = {}
    for loss in (DIST(), MLKD()):
        logits = student[mine].clone().requires_grad_()
        term = loss(Outputs(logits), Outputs(teacher[mine]), batch)
        (share * term).backward()
        found[type(loss).__name__] = share * term.item() / len(COUNTS), (logits.grad[:count] / len(COUNTS)).tolist()
    results.put((rank, found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_relations_across_images_are_those_of_the_global_batch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = children.CONTEXT.SimpleQueue()
    ranks = range(len(COUNTS))
    processes = [children.CONTEXT.Process(target=on_one_of_several, args=(r, port, results)) for r in ranks]
    for process in processes:
        process.start()
    assert children.finish(*processes) == [0] * len(COUNTS)
    found = dict(results.get() for _ in ranks)
    student, teacher, labels = example(sum(COUNTS), 5)
    for loss in (DIST(), MLKD()):
        name = type(loss).__name__
        student.grad = None
        term = value(loss, student.requires_grad_(), teacher, labels)
        term.backward()
        assert sum(found[rank][name][0] for rank in ranks) == pytest.approx(term.item(), rel=1e-12)
        several = torch.tensor([row for rank in ranks for row in found[rank][name][1]], dtype=torch.double)
        assert torch.allclose(several, student.grad, rtol=1e-9, atol=1e-12)


def test_relations_take_the_rows_of_all_processes(monkeypatch):
    """As above without processes: another process's three images are put beside our four."""
    student, teacher, labels = example(7, 5)
    instance = sum(kl_divergence(student[:4], teacher[:4], T) for T in MLKD().temperatures)
    grams = sum(sum(gram_losses(student, teacher, T)) for T in MLKD().temperatures)
    expected = {DIST(): value(DIST(), student, teacher, labels), MLKD(): instance + grams}
    for loss, number in expected.items():
        others = iter([student[4:], teacher[4:]])
        gather = lambda rows, batch, others=others: torch.cat([rows, next(others)])  # noqa: E731
        monkeypatch.setattr(inspect.getmodule(type(loss)), "global_rows", gather)
        assert value(loss, student[:4], teacher[:4], labels[:4]).item() == pytest.approx(number.item(), rel=1e-12)
