"""CRD against a slow reference: draws, critic, constants and memory with loops over Python's own numbers."""

from __future__ import annotations

import math

import children
import pytest
import torch
from learners import AsTeachers, alone
from torch.nn.parallel import DistributedDataParallel

from kd import keyed
from kd.losses import CRD, Setting, crd
from kd.outputs import Batch, Outputs
from kd.train.distiller import Distiller

LABELS = torch.tensor([2, 0, -1, 1, 1, 0, 2, 2, -1, 0, 1, 2])  # M = 10 training images at N = 12 places
BATCHES = torch.tensor([0, 3, 5, 7]), torch.tensor([1, 3, 11, 7])


def made(seed=0, dtype=torch.double, **arguments):
    torch.manual_seed(seed)
    arguments = {"negatives": 5, "dimensions": 4, "temperature": 0.3, **arguments}
    loss = CRD("a", "b", **arguments)
    loss.setup(Setting({"a": (3,)}, {"b": (2, 1, 3)}, 3, LABELS))
    return loss.to(dtype)


def step(number, dtype=torch.double):
    """The features of both networks and the batch of a step."""
    index = BATCHES[number % 2]
    torch.manual_seed(100 + number)
    student, teacher = torch.randn(len(index), 3, dtype=dtype), torch.randn(len(index), 2, 1, 3, dtype=dtype)
    return student, teacher, Batch({}, LABELS[index], index, keyed.keys(keyed.key(number), index))


def said(loss, student, teacher, batch):
    return loss(Outputs(None, {"a": student}), Outputs(None, {"b": teacher}), batch)


def mixed(base, number):
    """`keyed.keys` of one key and one number, a value of 64 bits without a sign."""
    word = (1 << 64) - 1
    z = (base + (number + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def dot(one, other):
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def unit(vector):
    return [a / math.sqrt(dot(vector, vector)) for a in vector]


class Reference:
    """The paper's equations on lists: banks, constants Z and the loss of a step."""

    def __init__(self, loss):
        self.loss, self.constants = loss, {}
        self.banks = {"student": loss.student_bank.tolist(), "teacher": loss.teacher_bank.tolist()}

    def negatives(self, key, label):
        by_class = sorted((c, place) for place, c in enumerate(LABELS.tolist()) if c >= 0)
        others = [place for c, place in by_class if c != label]
        key = mixed(key, keyed.Purpose.NEGATIVES)
        return [others[mixed(key, k) * len(others) >> 64] for k in range(self.loss.negatives)]

    def embed(self, linear, vectors):
        rows, bias = linear.weight.tolist(), linear.bias.tolist()
        return [unit([dot(row, v) + b for row, b in zip(rows, bias, strict=True)]) for v in vectors]

    def step(self, student, teacher, batch):
        images = list(zip(batch.index.tolist(), batch.labels.tolist(), batch.keys.tolist(), strict=True))
        embedded = {
            "student": self.embed(self.loss.student_embedding, student.flatten(1).tolist()),
            "teacher": self.embed(self.loss.teacher_embedding, teacher.flatten(1).tolist()),
        }
        training, number, value = sum(c >= 0 for c in LABELS.tolist()), self.loss.negatives, 0.0
        for anchor, other in (("student", "teacher"), ("teacher", "student")):
            powers = [
                [
                    math.exp(dot(vector, self.banks[other][place]) / self.loss.temperature)
                    for place in [index, *self.negatives(key, label)]
                ]
                for vector, (index, label, key) in zip(embedded[anchor], images, strict=True)
            ]
            flat = [power for row in powers for power in row]
            constant = self.constants.setdefault(anchor, training * math.fsum(flat) / len(flat))
            for row in powers:
                h = [power / constant / (power / constant + number / training) for power in row]
                value -= (math.log(h[0]) + math.fsum(math.log(1 - each) for each in h[1:])) / len(images)
        m = self.loss.momentum
        for name, bank in self.banks.items():
            for vector, (index, _, _) in zip(embedded[name], images, strict=True):
                bank[index] = unit([m * a + (1 - m) * b for a, b in zip(bank[index], vector, strict=True)])
        return value


@pytest.mark.parametrize("whole", [True, False])
def test_three_steps_equal_the_float64_reference(whole):
    loss = made()
    loss.whole = whole
    reference = Reference(loss)
    for number in range(3):
        value = said(loss, *step(number))
        assert value.item() == pytest.approx(reference.step(*step(number)), rel=1e-11)
        for name, bank in reference.banks.items():
            found = getattr(loss, f"{name}_bank")
            torch.testing.assert_close(found, torch.tensor(bank, dtype=torch.double), rtol=1e-12, atol=1e-14)
        constants = 10 * loss.log_means.exp()  # M = 10
        assert constants.tolist() == pytest.approx([reference.constants[k] for k in ("student", "teacher")], rel=1e-12)


def test_a_first_step_costs_what_the_prior_alone_says():
    """Where all pairs score alike h is 1 / (K + 1), the share of positive pairs."""
    logits = torch.full((3, 6), -math.log(5), dtype=torch.double)
    assert crd.contrast(logits)[0].item() == pytest.approx(math.log(6) + 5 * math.log(6 / 5), rel=1e-14)


def test_contrast_gives_its_own_derivative_and_is_finite_far_out():
    torch.manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    value, slope = crd.contrast(logits)
    assert torch.allclose(torch.autograd.grad(value, logits)[0], slope, rtol=1e-12)
    for part in crd.contrast(torch.tensor([[-1e4, 1e4], [1e4, -1e4]])):
        assert part.isfinite().all()


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_are_those_of_the_value(whole):
    """After the first step, whose constants are held fixed as in the published code. The banks change meanwhile."""
    loss = made()
    loss.whole = whole
    said(loss, *step(0))
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    student, teacher, batch = step(1)

    def value(student, teacher):
        for name, buffer in loss.named_buffers():
            buffer.copy_(before[name])
        return said(loss, student, teacher, batch)

    assert torch.autograd.gradcheck(value, (student.requires_grad_(), teacher.requires_grad_()))


def test_the_product_with_the_whole_bank_and_the_gather_agree_in_parts_of_any_size(monkeypatch):
    torch.manual_seed(0)
    anchors, bank = torch.randn(5, 4, dtype=torch.double), torch.randn(12, 4, dtype=torch.double)
    places, weights = torch.randint(0, 12, (5, 7)), torch.randn(5, 7, dtype=torch.double)
    expected = torch.einsum("id,ikd->ik", anchors, bank[places]), torch.einsum("ik,ikd->id", weights, bank[places])
    for chunk in (1, 30, 60, 1 << 20):
        monkeypatch.setattr(crd, "CHUNK", chunk)
        for whole in (True, False):
            assert torch.allclose(crd.products(anchors, bank, places, whole), expected[0], rtol=1e-12)
            assert torch.allclose(crd.weighted_sums(weights, bank, places, whole), expected[1], rtol=1e-12)


@pytest.mark.parametrize(("number", "whole"), [(1 << 14, True), (40, False)])
def test_the_way_is_chosen_by_the_number_of_places(number, whole):
    loss = CRD("a", "a", negatives=number, dimensions=1)
    loss.setup(Setting({"a": (1,)}, {"a": (1,)}, 2, torch.arange(2000) % 2))
    assert loss.whole is whole


def test_negatives_are_of_other_classes_and_uniform_over_them():
    loss, number = made(), 100_000
    keys = keyed.keys(3, torch.arange(3))
    drawn = crd.draw_negatives(keys, torch.arange(3), number, loss.order, loss.counts)
    for label, row in enumerate(drawn):
        others = ((LABELS >= 0) & (label != LABELS)).nonzero()[:, 0]
        counts = torch.bincount(row, minlength=12)
        assert counts.sum() == counts[others].sum() == number
        expected = number / len(others)
        chi_square, freedom = ((counts[others] - expected) ** 2 / expected).sum().item(), len(others) - 1
        assert abs(chi_square - freedom) < 3 * math.sqrt(2 * freedom)
    assert torch.equal(crd.draw_negatives(keys[1:2], torch.tensor([1]), 50, loss.order, loss.counts)[0], drawn[1, :50])
    again = crd.draw_negatives(keyed.keys(4, torch.arange(3)), torch.arange(3), number, loss.order, loss.counts)
    assert 0.05 < (again == drawn).double().mean() < 0.3


def test_integers_are_exact_for_bounds_beyond_a_float32():
    keys = keyed.keys(1, torch.arange(1000))
    for bound in (1, 2, 1_281_167, (1 << 24) + 1, 1 << 31):
        expected = [(key % (1 << 64)) * bound >> 64 for key in keys.tolist()]
        assert keyed.integers(keys, bound).tolist() == expected
    extremes = torch.tensor([0, -1, 1 << 62, -(1 << 63)])  # the smallest and the largest key, a quarter, a half
    assert keyed.integers(extremes, torch.tensor([[1 << 31], [7]])).tolist() == [
        [0, (1 << 31) - 1, 1 << 29, 1 << 30],
        [0, 6, 1, 3],
    ]


def test_banks_begin_uniform_and_equal_for_equal_seeds():
    one, same, other = (made(seed, dimensions=128) for seed in (0, 0, 1))
    bound = math.sqrt(3 / 128)
    for name in ("student_bank", "teacher_bank"):
        bank = getattr(one, name)
        assert bank.shape == (12, 128)
        assert torch.equal(bank, getattr(same, name))
        assert not torch.equal(bank, getattr(other, name))
        assert 0.99 * bound < bank.abs().max() <= bound
        assert abs(bank.mean()) < 0.1 * bound
        assert bank.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(one.student_bank, one.teacher_bank)


def test_only_the_images_of_the_step_are_remembered_and_at_momentum_0_as_they_are():
    loss = made(momentum=0.0)
    before = loss.student_bank.clone()
    student, teacher, batch = step(0)
    said(loss, student, teacher, batch)
    embedded = torch.nn.functional.normalize(loss.student_embedding(student))
    assert torch.allclose(loss.student_bank[batch.index], embedded, rtol=1e-14)
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[batch.index] = False
    assert torch.equal(loss.student_bank[untouched], before[untouched])


def test_resumes_exactly_from_its_state():
    loss = made(dtype=torch.float)
    for number in range(2):
        said(loss, *step(number, torch.float))
    other = made(seed=5, dtype=torch.float)
    other.load_state_dict({key: value.clone() for key, value in loss.state_dict().items()})
    for number in range(2, 4):
        assert torch.equal(said(loss, *step(number, torch.float)), said(other, *step(number, torch.float)))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in loss.state_dict().items())
    assert all(value.isfinite().all() for value in loss.state_dict().values())


def test_every_buffer_is_kept_equal_by_the_loss_itself():
    assert {name for name, _ in made().named_buffers()} == set(CRD.replicated)


def test_a_feature_of_zeros_has_a_finite_gradient():
    loss = made()
    for linear in (loss.student_embedding, loss.teacher_embedding):
        torch.nn.init.zeros_(linear.bias)
    student, teacher, batch = step(0)
    student = torch.zeros_like(student, requires_grad=True)
    value = said(loss, student, torch.zeros_like(teacher), batch)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.slow
def test_compiled_it_takes_the_same_steps():
    """As one graph; the backend runs PyTorch's own kernels, so that nothing but the tracing differs."""
    plain, traced = made(), made()
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for number in range(3):
        found = []
        for loss in (plain, compiled):
            student, teacher, batch = step(number)
            value = said(loss, student.requires_grad_(), teacher, batch)
            value.backward()
            found.append((value.item(), student.grad))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-10)
    assert torch.allclose(plain.student_bank, traced.student_bank, rtol=1e-12)
    assert torch.allclose(plain.log_means, traced.log_means, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"negatives": 0}, "negatives 0 must be above 0"),
        ({"temperature": 0.0}, "temperature 0.0 must be a finite number above 0"),
        ({"momentum": 1.0}, r"momentum 1.0 must be in \[0, 1\)"),
        ({"dimensions": 0}, "dimensions 0 must be above 0"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(ValueError, match=f"CRD: {words}"):
        CRD("a", "b", **arguments)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(None, "needs the training images' labels"), (torch.tensor([-1, 1, 1]), "the training images are of one class")],
)
def test_settings_without_negatives_are_refused(labels, words):
    with pytest.raises(ValueError, match=f"CRD: {words}"):
        CRD("a", "b").setup(Setting({"a": (3,)}, {"b": (3,)}, 2, labels))


class Net(torch.nn.Module):
    """A linear layer whose output is the feature."""

    classes = ("a", "b", "c")

    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(6, width)

    def tap(self, names):
        assert names == ["pool"]

    def outputs(self, inputs, keys=None):
        feature = self.layer(inputs["image"].float().flatten(1))
        return Outputs(feature, {"pool": feature})


# How the images of three steps are shared by two processes; the second one has none in the second step.
SHARES = ([3, 1], [1, 0], [2, 2])


def run_steps(rank, count):
    """Weighted losses and gradients of each step, and the last state, of one of `count` processes."""
    torch.manual_seed(0)
    student, teacher = Net(3), Net(4)
    loss = CRD("pool", "pool", negatives=5, dimensions=4)
    teachers = AsTeachers(teacher)
    distiller = Distiller(alone(student), [loss], teachers, (1, 2, 3), Setting(labels=LABELS), seed=1)
    model = DistributedDataParallel(distiller) if count > 1 else distiller
    images = torch.arange(72).view(12, 1, 2, 3).mul(7919).remainder(251).to(torch.uint8)
    seen = []
    for number, counts in enumerate(SHARES):
        whole = BATCHES[number % 2][: sum(counts)]
        part = whole.split(counts)[rank] if count > 1 else whole
        share = len(part) * count / len(whole)
        index = part if len(part) else whole[:1]
        counts = counts if count > 1 else None
        batch = Batch({"image": images[index]}, LABELS[index], index, keyed.keys(number, index), 0, counts)
        value = model(batch, teachers(batch))["CRD"] * share
        model.zero_grad()
        value.backward()
        seen.append((value.item(), [p.grad.clone() for p in distiller.parameters()]))
    return seen, distiller.state_dict()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(run_steps(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_equal_banks_and_learn_as_one(tmp_path):
    processes = [children.CONTEXT.Process(target=one_of_two, args=(rank, tmp_path), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    assert children.finish(*processes) == [0, 0]
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone, expected = run_steps(0, 1)
    buffers = [f"losses.CRD.{name}" for name in ("student_bank", "teacher_bank", "log_means", "started")]
    for name in buffers:
        assert torch.equal(state[name], other[name])
        assert torch.allclose(state[name].float(), expected[name].float(), rtol=1e-5, atol=1e-7)
    for (one, gradients), (two, same), (value, wanted) in zip(first, second, alone, strict=True):
        assert (one + two) / 2 == pytest.approx(value, rel=1e-5)
        for found, also, gradient in zip(gradients, same, wanted, strict=True):
            assert torch.equal(found, also)
            assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
