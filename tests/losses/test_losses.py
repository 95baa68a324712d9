"""Every loss against a slow reference written with loops in float64 from the formula, and what must hold for all."""

from __future__ import annotations

import inspect
import math
import re
import sys

import pytest
import torch
from learners import AsTeachers, alone

from kd.losses import (
    KL,
    LOSSES,
    CosineEmbedding,
    CrossEntropy,
    DoubleSoftmax,
    FeatureDistance,
    FitNet,
    LogitsMSE,
    Setting,
    SoftCrossEntropy,
    SoftMAE,
)
from kd.losses.__main__ import main as list_losses
from kd.losses.features import cosine_distance
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs
from kd.train.distiller import Distiller
from kd.util.errors import UserError


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


@pytest.mark.first_tier(3)
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


@pytest.mark.first_tier(3)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_float64_reference(num_classes, smoothing):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(7, num_classes, dtype=torch.double), torch.randint(0, num_classes, (7,))
    loss = CrossEntropy(label_smoothing=smoothing)
    value = loss(Outputs(logits), None, Batch({}, labels, labels))
    assert value.item() == pytest.approx(reference_cross_entropy(logits, labels, smoothing), rel=1e-12)


class Given(torch.nn.Module):
    """A network whose logits (B, K) and features, `width` channels wide in its first stage, are given."""

    def __init__(self, logits, width):
        super().__init__()
        shapes = {f"stage{i}": (width << i, 16 >> i, 16 >> i) for i in (1, 2, 3)} | {"pool": (width << 3,)}
        self.classes = [str(i) for i in range(logits.shape[1])]
        self.logits = torch.nn.Parameter(logits)
        self.features = torch.nn.ParameterDict(
            {name: torch.randn(len(logits), *shape).to(logits.dtype) for name, shape in shapes.items()}
        )

    def tap(self, names):
        assert set(names) <= set(self.features)

    def outputs(self, inputs, keys=None):
        count = len(inputs["image"]) if "image" in inputs else len(self.logits)
        return Outputs(self.logits[:count], {name: feature[:count] for name, feature in self.features.items()})


STAGES = ["stage1", "stage2", "stage3"]
# What a loss may be given as taps; the first that its setup accepts is taken.
TAPS = (("stage3", STAGES, 2, 4), ("stage2", STAGES, 2, 2), ("pool", ["pool"], 2, 4), ("pool", ["pool"], 2, 2))


def build(name, *sizes, **arguments):
    """A distiller of one loss, the teacher's outputs and a batch, of networks whose features suit the loss."""
    return next(candidates(name, *sizes, **arguments))


def candidates(name, num_classes=5, size=6, logits=None, **arguments):
    parameters = inspect.signature(LOSSES[name]).parameters
    for one, several, *widths in TAPS:
        kinds = {"student_tap": one, "teacher_tap": one, "student_taps": several, "teacher_taps": several}
        taps = {key: value for key, value in kinds.items() if key in parameters}
        torch.manual_seed(1)
        both = logits if logits is not None else torch.randn(2, size, num_classes)
        student, teacher = (Given(z.clone(), width) for z, width in zip(both, widths, strict=True))
        everywhere = torch.arange(size + 2) % num_classes  # of the training set, of which the batch is the beginning
        labels = everywhere[:size]
        try:
            loss = LOSSES[name](**taps, **arguments)
            setting = Setting(labels=everywhere)
            distiller = Distiller(alone(student), [loss], AsTeachers(teacher), (3, 16, 16), setting, seed=0)
        except UserError as error:
            refusal = error
            continue
        batch = Batch({}, labels, torch.arange(size), torch.arange(size) + 1000)
        yield distiller, teacher.outputs({}).float(), batch
    raise refusal


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_sees_the_batch_says_so(name):
    """Any other is the mean of what it is on the batch's parts; and no other is computed on micro-batches."""
    distiller, teacher, batch = build(name)
    (loss,) = distiller.losses.values()
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in loss.modules()):
        loss.eval()  # batch norm sees what it is given, in a loss as in a network

    def value(rows, whole):
        student = distiller.learner.student.outputs({})
        parts = (tensor[rows] for tensor in (batch.labels, batch.index, batch.keys))
        return loss(student.rows(rows), teacher.rows(rows), Batch({}, *parts, whole=whole)).item()

    if loss.sees_batch:
        with pytest.raises(UserError, match="set accumulate 1"):
            value(slice(0, 2), whole=False)
        return
    mean = (2 * value(slice(0, 2), whole=False) + 4 * value(slice(2, 6), whole=False)) / 6
    assert mean == pytest.approx(value(slice(0, 6), whole=True), rel=1e-5)


def value_of(distiller, teacher, batch):
    return next(iter(distiller(batch, {"teacher": teacher.detach()}).values()))


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


NEEDS_THREE_CLASSES = {"DKD"}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [1, 6])
def test_every_loss_is_finite_far_out_and_in_half_precision(name, num_classes, size):
    torch.manual_seed(0)
    far = (torch.randint(0, 2, (2, size, num_classes)) * 2e4 - 1e4).half()
    if num_classes == 2 and name in NEEDS_THREE_CLASSES:
        with pytest.raises(UserError, match=f"{name}: .*classes"):
            build(name, num_classes, size, logits=far)
        return
    distiller, teacher, batch = build(name, num_classes, size, logits=far)
    value = value_of(distiller, teacher, batch)
    assert value.dtype == torch.float32
    assert value.shape == ()
    value.backward()
    assert value.isfinite()
    found = gradients(distiller)
    assert found
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_weighted_and_trains_exactly_what_is_its_own(name):
    values = []
    for weight in (1.0, 3.0):
        distiller, teacher, batch = build(name, weight=weight)
        values.append(value_of(distiller, teacher, batch))
    assert values[1].item() == pytest.approx(3 * values[0].item(), rel=1e-5)
    values[1].backward()
    (loss,) = distiller.losses.values()
    found = set(gradients(distiller))
    own = {f"losses.{name}.{key}" for key, p in loss.named_parameters() if p.requires_grad}
    tapped = {f"learner.student.features.{tap}" for tap in loss.student_taps}
    assert own <= found
    logits = {"learner.student.logits"}
    assert found - own in (logits, tapped, tapped | logits)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_sends_a_gradient_into_the_teacher_by_way_of_its_targets_alone(name):
    """The teacher's outputs come without gradients in the loop; here they have them, and the student's part is checked
    to be the same either way."""
    found = []
    for keep in (True, False):
        distiller, teacher, batch = build(name)
        sum(distiller(batch, {"teacher": teacher if keep else teacher.detach()}).values()).backward()
        found.append(gradients(distiller))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_resumes_exactly_from_its_state(name):
    """What a loss keeps from step to step (a bank, statistics) is in the state dict."""
    distiller, teacher, batch = build(name)
    value_of(distiller, teacher, batch)
    state = {key: value.clone() for key, value in distiller.state_dict().items()}
    expected = value_of(distiller, teacher, batch)
    distiller, teacher, batch = build(name)
    distiller.load_state_dict(state)
    assert torch.equal(value_of(distiller, teacher, batch), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_lists_its_paper(name):
    words = inspect.getdoc(LOSSES[name]).splitlines()[0]
    assert len(words) <= 120
    assert "http" in inspect.getdoc(sys.modules[LOSSES[name].__module__]) or not LOSSES[name].needs_teacher


def test_the_list_has_every_loss_with_one_line_and_its_paper(capsys):
    assert list_losses() == 0
    entries = re.split(r"\n(?=\w)", capsys.readouterr().out.rstrip())
    assert [entry.split()[0] for entry in entries] == list(LOSSES)
    for entry, loss in zip(entries, LOSSES.values(), strict=True):
        what, *paper = entry.splitlines()
        assert inspect.getdoc(loss).splitlines()[0] in what
        assert ("[global batch]" in what) == loss.sees_batch
        assert len(paper) == loss.needs_teacher  # those of labels alone have none
        assert all("http" in line for line in paper)


# The papers' or the usual comparison's; a weight that is not here is 1.
WEIGHTS = {"ABKD": 2, "BinaryKL": 10, "HardLabels": 0.5, "WKDF": 0.08, "WTTM": 4}
WEIGHTS |= {
    "AT": 1000,
    "CC": 0.02,
    "CRD": 0.8,
    "CTKD": 0.9,
    "CWD": 50,
    "FitNet": 100,
    "FSP": 50,
    "FT": 200,
    "ICKD": 2.5,
}
WEIGHTS |= {"MGD": 7e-5, "MLKD": 0.9, "NST": 50, "OFD": 1e-3, "PKT": 3e4, "ReviewKD": 5, "SP": 3000}
DEFAULTS = {
    "AB": {"margin": 1},
    "ABKD": {"alpha": 0.8, "beta": 0.3, "temperature": 4},
    "AT": {"power": 2},
    "CC": {"dimension": 128, "train_teacher_embedding": True},
    "CRD": {"negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dimensions": 128},
    "CTKD": {"min_temperature": 1, "temperature_range": 20, "warmup_epochs": 10},
    "CWD": {"temperature": 4},
    "DIST": {"beta": 2, "gamma": 2, "temperature": 4},
    "DKD": {"alpha": 1, "beta": 8, "temperature": 4, "warmup_epochs": 20},
    "FT": {"rate": 0.5},
    "FitNet": {"kernel_size": 1, "batch_norm": True},
    "IKL": {"alpha": 1, "beta": 8, "temperature": 4, "pair_temperature": 100, "warmup_epochs": 20},
    "IRG": {"vertex_weight": 0.1, "edge_weight": 5, "transformation_weight": 5},
    "KL": {"temperature": 4},
    "MGD": {"mask": "pixels", "mask_ratio": 0.5},
    "MLKD": {"temperatures": (2, 3, 4, 5, 6)},
    "NKD": {"gamma": 1.5, "temperature": 1},
    "OFA": {"gamma": 1, "temperature": 1},
    "RKD": {"distance_weight": 25, "angle_weight": 50},
    "RLD": {"alpha": 1, "beta": 8, "temperature": 4, "warmup_epochs": 20},
    "ReviewKD": {"mid_channels": None, "levels": (4, 2, 1), "warmup_epochs": 20},
    "VID": {"initial_variance": 5, "epsilon": 1e-5},
    "WKDF": {"grid": 1, "mean_weight": 4},
    "WTTM": {"temperature": 5},
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_are_the_published_ones(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    assert parameters["weight"].default == WEIGHTS.get(name, 1)
    for key, expected in DEFAULTS.get(name, {}).items():
        assert parameters[key].default == expected, key


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
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    for batch_norm in (False, True):
        loss = FitNet("a", "b", kernel_size=3, batch_norm=batch_norm)
        loss.setup(Setting({"a": (3, 4, 4)}, {"b": (2, 4, 4)}))
        loss.double()
        weight, bias = loss.regressor[0].weight.detach(), loss.regressor[0].bias.detach()
        assert weight.shape == (2, 3, 3, 3)
        maps = torch.nn.functional.conv2d(one, weight, bias, padding=1).tolist()
        total = 0.0
        for channel in range(2):
            values = [[v for row in image[channel] for v in row] for image in maps]
            mean = math.fsum(v for image in values for v in image) / 32
            scale = math.sqrt(math.fsum((v - mean) ** 2 for image in values for v in image) / 32 + 1e-5)
            for image, target in zip(values, other[:, channel].flatten(1).tolist(), strict=True):
                for v, t in zip(image, target, strict=True):
                    total += ((max(0.0, (v - mean) / scale) if batch_norm else v) - t) ** 2
        value = loss(Outputs(one, {"a": one}), Outputs(other, {"b": other}), None)
        assert value.item() == pytest.approx(total / 64, rel=1e-12)


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
    batch = Batch({}, labels, labels)
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
        loss.setup(Setting({"a": shapes[0]}, {"b": shapes[1]}))


def test_what_a_constructor_takes_as_kwargs_are_its_parents_arguments():
    class Handed(KL):
        def __init__(self, share: float = 0.5, **kwargs):
            super().__init__(**kwargs)
            self.keep_nonnegative(share=share)

    class Below(Handed):
        def __init__(self, weight: float = 2.0, **kwargs):
            super().__init__(weight=weight, **kwargs)

    class Named(KL):
        def __init__(self, temperature: float = 3.0, standardize: bool = True, weight: float = 1.0):
            super().__init__(temperature, standardize=standardize, weight=weight)

    known = {
        kind: {k: p.default for k, p in inspect.signature(kind).parameters.items()} for kind in (Handed, Below, Named)
    }
    assert known[Handed] == {"share": 0.5, "temperature": 4.0, "standardize": False, "weight": 1.0}
    assert known[Below] == {"weight": 2.0, "share": 0.5, "temperature": 4.0, "standardize": False}
    assert known[Named] == {"temperature": 3.0, "standardize": True, "weight": 1.0}
    loss = Below(share=0.1, temperature=2.0)
    assert (loss.weight, loss.share, loss.temperature, loss.standardize) == (2.0, 0.1, 2.0, False)
    assert Named(5.0, False, 2.0).temperature == 5.0
    with pytest.raises(TypeError, match="temprature"):
        Below(temprature=2.0)
    with pytest.raises(ValueError, match="Below: share -1 must be a finite number, 0 or more"):
        Below(share=-1)


def test_terms_of_one_class_are_told_apart():
    logits = torch.randn(3, 4)
    labels = torch.zeros(3, dtype=torch.long)
    terms = [KL(2.0), KL(4.0, weight=0.5), CrossEntropy(weight=0.1)]
    distiller = Distiller(alone(Given(logits, 2)), terms, AsTeachers(Given(logits, 2)))
    terms = distiller(Batch({}, labels, labels), {"teacher": Outputs(torch.randn(3, 4))})
    assert list(terms) == ["KL", "KL_2", "CrossEntropy"]
    assert (
        distiller.objective()
        == "1 * KL(temperature=2.0) + 0.5 * KL_2(temperature=4.0) + 0.1 * CrossEntropy(label_smoothing=0.0)"
    )


def test_golden_values():
    student = torch.arange(12, dtype=torch.double).view(3, 4).sin()
    teacher = torch.arange(12, dtype=torch.double).view(3, 4).cos()
    assert kl_divergence(student, teacher, 4.0).item() == pytest.approx(0.33887712510237455, rel=1e-12)
