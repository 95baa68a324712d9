"""Losses on feature maps against slow references written with loops in float64 from the papers' formulas."""

from __future__ import annotations

import math
import socket

import children
import pytest
import torch

from kd.losses import AB, AT, FSP, FT, LOSSES, NST, OFD, VID, Setting
from kd.losses.activation_boundary import boundary_distance
from kd.losses.attention_transfer import attention_distance
from kd.losses.factor_transfer import factor_distance
from kd.losses.fsp import flow
from kd.losses.nst import selectivity_discrepancy
from kd.losses.ofd import partial_distance
from kd.losses.parts import BatchNorm, same_size, unit
from kd.losses.vid import negative_log_likelihood
from kd.outputs import Batch, Outputs

pytestmark = pytest.mark.first_tier(3)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def near(value, rel=1e-10):
    return pytest.approx(value, rel=rel, abs=1e-14)


def mean(numbers):
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def pooled(plane, height, width, reduce=mean):
    """A plane (list of rows) in windows from floor(i * H / h) to ceil((i + 1) * H / h)."""
    rows, columns = len(plane), len(plane[0])
    return [
        [
            reduce(
                plane[y][x]
                for y in range(i * rows // height, -(-(i + 1) * rows // height))
                for x in range(j * columns // width, -(-(j + 1) * columns // width))
            )
            for j in range(width)
        ]
        for i in range(height)
    ]


def vectors(maps, height, width, reduce=mean):
    """The channels of one image's maps (C, H, W), each a list of its places, pooled to that size."""
    return [[a for row in pooled(plane, height, width, reduce) for a in row] for plane in maps]


def dot(one, other):
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def normed(vector):
    length = math.sqrt(dot(vector, vector))
    return [a / length for a in vector]


def batch_of(count, epoch=0):
    rows = torch.arange(count)
    return Batch({}, rows, rows, rows, epoch)


def run(loss, student, teacher, epoch=0):
    """The loss of features given by tap name; the taps are the names."""
    count = len(next(iter(student.values())))
    outputs = (Outputs(torch.empty(count, 0), features) for features in (student, teacher))
    return loss(*outputs, batch_of(count, epoch))


def ready(loss, student, teacher):
    """The loss after its setup for these features, in float64."""
    torch.manual_seed(0)
    shapes = ({name: tuple(feature.shape[1:]) for name, feature in net.items()} for net in (student, teacher))
    loss.setup(Setting(*shapes))
    return loss.double()


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize(("one", "other"), [((8, 8), (4, 4)), ((4, 6), (8, 3)), ((5, 7), (3, 3)), ((3, 3), (3, 3))])
def test_same_size_pools_the_larger_side_of_either(one, other, pool):
    maps = draw(2, 3, *one), draw(2, 2, *other)
    size = min(one[0], other[0]), min(one[1], other[1])
    for given, made in zip(maps, same_size(*maps, pool), strict=True):
        expected = [vectors(image, *size, mean if pool == "average" else max) for image in given.tolist()]
        assert torch.allclose(made.flatten(2), torch.tensor(expected, dtype=torch.double), rtol=1e-12)
    assert [made.shape for made in same_size(draw(2, 5), draw(2, 7))] == [(2, 5, 1, 1), (2, 7, 1, 1)]


def test_unit_rows_have_length_one_and_a_row_of_zeros_a_gradient():
    rows = draw(3, 5)
    assert torch.allclose(unit(rows).square().sum(1), torch.ones(3, dtype=torch.double))
    assert torch.autograd.gradcheck(unit, rows.requires_grad_())
    for small in (0.0, 1e-30):
        zeros = torch.full((2, 5), small, requires_grad=True)
        unit(zeros).sum().backward()
        assert torch.allclose(zeros.grad, torch.ones(2, 5))


def test_batch_norm_of_one_value_takes_the_running_statistics():
    norm = BatchNorm(3).double()
    norm(draw(4, 3, 2, 2))
    one = draw(1, 3, 1, 1, seed=1).requires_grad_()
    expected = (one - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    kept = norm.running_var.clone()
    assert torch.allclose(norm(one), expected)
    assert torch.equal(norm.running_var, kept)
    norm(one).sum().backward()
    assert (one.grad > 0).all()
    two = draw(2, 3, 1, 1)
    assert torch.allclose(norm(two), torch.nn.functional.batch_norm(two, None, None, training=True))


# AT


def reference_attention(student, teacher, power):
    total = []
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        size = min(len(mine[0]), len(theirs[0])), min(len(mine[0][0]), len(theirs[0][0]))
        maps = []
        for image in (mine, theirs):
            channels = vectors(image, *size)
            maps.append(normed([math.fsum(abs(a) ** power for a in place) for place in zip(*channels, strict=True)]))
        total += [(a - b) ** 2 for a, b in zip(*maps, strict=True)]
    return mean(total)


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("side", [2, 4])
def test_attention_equals_loops(power, side):
    student, teacher = draw(3, 2, 4, 4), draw(3, 5, side, side, seed=1)
    assert attention_distance(student, teacher, power).item() == near(reference_attention(student, teacher, power))
    assert attention_distance(teacher, student, power).item() == near(reference_attention(student, teacher, power))
    assert torch.autograd.gradcheck(lambda maps: attention_distance(maps, teacher, power), student.requires_grad_())


def test_attention_knows_neither_scale_nor_sign_nor_order_nor_number_of_channels():
    maps = draw(3, 4, 5, 5)
    other = torch.cat([-3 * maps.flip(1), 3 * maps], 1) * torch.tensor([1, 2, 3]).view(3, 1, 1, 1)
    assert attention_distance(maps, other, 2).item() == near(0)
    assert attention_distance(maps, maps.flip(2), 2).item() > 1e-3


def test_at_sums_its_stages():
    student = {"a": draw(3, 2, 4, 4), "b": draw(3, 3, 2, 2)}
    teacher = {"c": draw(3, 4, 4, 4, seed=1), "d": draw(3, 5, 4, 4, seed=1)}
    loss = ready(AT(["a", "b"], ["c", "d"]), student, teacher)
    expected = sum(reference_attention(student[a], teacher[b], 2) for a, b in (("a", "c"), ("b", "d")))
    assert run(loss, student, teacher).item() == near(expected)
    assert loss.weight == 1000


# NST


def reference_selectivity(student, teacher):
    total = []
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        size = min(len(mine[0]), len(theirs[0])), min(len(mine[0][0]), len(theirs[0][0]))
        s, t = ([normed(channel) for channel in vectors(image, *size)] for image in (mine, theirs))
        kernels = [mean(dot(x, y) ** 2 for x in one for y in other) for one, other in ((s, s), (t, t), (s, t))]
        total.append(kernels[0] + kernels[1] - 2 * kernels[2])
    return mean(total)


# more places than channels, fewer, and maps of two sizes
@pytest.mark.parametrize("shapes", [((2, 4, 4), (3, 4, 4)), ((2, 2, 2), (5, 2, 2)), ((3, 4, 4), (4, 2, 2))])
def test_selectivity_equals_loops(shapes):
    student, teacher = draw(3, *shapes[0]), draw(3, *shapes[1], seed=1)
    assert selectivity_discrepancy(student, teacher).item() == near(reference_selectivity(student, teacher))
    assert torch.autograd.gradcheck(lambda maps: selectivity_discrepancy(maps, teacher), student.requires_grad_())


@pytest.mark.parametrize("side", [2, 5])
def test_selectivity_is_that_of_the_set_of_channels(side):
    maps = draw(3, 4, side, side)
    scales = draw(3, 8, 1, 1, seed=1)
    assert selectivity_discrepancy(maps, torch.cat([maps, maps.flip(1)], 1) * scales).item() == near(0)
    assert selectivity_discrepancy(maps, draw(3, 4, side, side, seed=2)).item() > 1e-3


def test_nst_sums_its_stages():
    student = {"a": draw(3, 2, 4, 4), "b": draw(3, 5, 2, 2)}
    teacher = {"c": draw(3, 4, 4, 4, seed=1), "d": draw(3, 5, 4, 4, seed=1)}
    loss = ready(NST(["a", "b"], ["c", "d"]), student, teacher)
    expected = sum(reference_selectivity(student[a], teacher[b]) for a, b in (("a", "c"), ("b", "d")))
    assert run(loss, student, teacher).item() == near(expected)


# FSP


def reference_flow(lower, upper):
    """The flow matrices of a batch, lists (B, C, D)."""
    flows = []
    for below, above in zip(lower.tolist(), upper.tolist(), strict=True):
        size = min(len(below[0]), len(above[0])), min(len(below[0][0]), len(above[0][0]))
        one, other = vectors(below, *size, max), vectors(above, *size, max)
        flows.append([[dot(x, y) / (size[0] * size[1]) for y in other] for x in one])
    return flows


def test_fsp_equals_loops():
    student = {name: draw(3, *shape) for name, shape in (("a", (2, 6, 6)), ("b", (4, 6, 6)), ("c", (3, 3, 3)))}
    teacher = {name: draw(3, *shape, seed=1) for name, shape in (("a", (2, 4, 4)), ("b", (4, 4, 4)), ("c", (3, 2, 2)))}
    total = 0.0
    for names in (("a", "b"), ("b", "c")):
        pairs = zip(*(reference_flow(*(net[name] for name in names)) for net in (student, teacher)), strict=True)
        total += mean(
            (x - y) ** 2
            for mine, theirs in pairs
            for row, other in zip(mine, theirs, strict=True)
            for x, y in zip(row, other, strict=True)
        )
    loss = ready(FSP(["a", "b", "c"], ["a", "b", "c"]), student, teacher)
    assert run(loss, student, teacher).item() == near(total)
    assert run(loss, student, student).item() == 0
    inputs = student["b"].requires_grad_(), student["c"].requires_grad_()
    assert torch.autograd.gradcheck(flow, inputs)


def test_flow_is_bilinear_and_does_not_know_places():
    lower, upper = draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)
    assert flow(lower, upper).shape == (2, 3, 5)
    assert torch.allclose(flow(2 * lower, -3 * upper), -6 * flow(lower, upper))
    assert torch.allclose(flow(lower.flip(2), upper.flip(2)), flow(lower, upper))
    assert torch.allclose(flow(torch.ones_like(lower), upper)[:, 0], upper.mean((2, 3)))


# FT


def test_factor_distance_equals_loops():
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 2, 2, seed=1)
    total = []
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        factors = (normed([a for row in vectors(image, 2, 2) for a in row]) for image in (mine, theirs))
        total += [abs(a - b) for a, b in zip(*factors, strict=True)]
    assert factor_distance(student, teacher).item() == near(mean(total))
    assert factor_distance(5 * student, teacher / 3).item() == near(mean(total))
    assert factor_distance(student, 2 * student).item() == near(0)
    assert torch.autograd.gradcheck(lambda maps: factor_distance(maps, teacher), student.requires_grad_())


def test_ft_trains_the_paraphraser_by_its_reconstruction_alone():
    student, teacher = {"a": draw(3, 4, 6, 6).requires_grad_()}, {"b": draw(3, 6, 3, 3, seed=1)}
    loss = ready(FT("a", "b", reconstruction_weight=0.1), student, teacher)
    factor = loss.encoder(teacher["b"])
    assert factor.shape == (3, 3, 3, 3)
    assert loss.decoder(factor).shape == (3, 6, 3, 3)
    assert loss.translator(student["a"]).shape == (3, 3, 6, 6)
    distance = factor_distance(loss.translator(student["a"]), factor.detach())
    error = (loss.decoder(factor) - teacher["b"]).square().mean()
    value = run(loss, student, teacher)
    assert value.item() == near(distance.item() + 0.1 * error.item())

    paraphraser = [*loss.encoder.parameters(), *loss.decoder.parameters()]
    for found, expected in zip(
        torch.autograd.grad(value, paraphraser, retain_graph=True),
        torch.autograd.grad(0.1 * error, paraphraser),
        strict=True,
    ):
        assert torch.allclose(found, expected, rtol=1e-10)
    translator = [student["a"], *loss.translator.parameters()]
    for found, expected in zip(
        torch.autograd.grad(value, translator), torch.autograd.grad(distance, translator), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-10)


def test_ft_has_the_layers_of_the_authors_code():
    loss = FT("a", "b")
    loss.setup(Setting({"a": (16, 8, 8)}, {"b": (64, 8, 8)}))
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "encoder.0.weight": (64, 64, 3, 3),
        "encoder.2.weight": (32, 64, 3, 3),
        "encoder.4.weight": (32, 32, 3, 3),
        "decoder.0.weight": (32, 32, 3, 3),
        "decoder.2.weight": (32, 64, 3, 3),
        "decoder.4.weight": (64, 64, 3, 3),
        "translator.0.weight": (16, 16, 3, 3),
        "translator.2.weight": (32, 16, 3, 3),
        "translator.4.weight": (32, 32, 3, 3),
    }
    assert [part.negative_slope for part in loss.modules() if isinstance(part, torch.nn.LeakyReLU)] == [0.1] * 9
    assert loss.reconstruction_weight * loss.weight == near(1)


# AB and OFD


def connected(sequence, images):
    """What a connector gives for a batch, lists (B, C, P): a 1x1 convolution and batch norm, in loops."""
    weight = sequence[0].weight[:, :, 0, 0].tolist()
    mixed = [[[dot(row, place) for place in zip(*image, strict=True)] for row in weight] for image in images]
    made = [[] for _ in images]
    for channel in range(len(weight)):
        values = [value for image in mixed for value in image[channel]]
        centre = mean(values)
        spread = math.sqrt(mean((value - centre) ** 2 for value in values) + sequence[1].eps)
        for image, target in zip(mixed, made, strict=True):
            target.append([(value - centre) / spread for value in image[channel]])
    return made


def hinges(student, teacher, margin):
    """The sum over the elements of lists (B, C, P), the mean over images."""
    return mean(
        math.fsum(
            max(0.0, margin - s if t > 0 else margin + s) ** 2
            for row, other in zip(mine, theirs, strict=True)
            for s, t in zip(row, other, strict=True)
        )
        for mine, theirs in zip(student, teacher, strict=True)
    )


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_boundary_distance_equals_loops(margin):
    student, teacher = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    expected = hinges(student.flatten(2).tolist(), teacher.flatten(2).tolist(), margin)
    assert boundary_distance(student, teacher, margin).item() == near(expected)
    assert boundary_distance(student, 100 * teacher, margin).item() == near(expected)
    assert torch.autograd.gradcheck(lambda maps: boundary_distance(maps, teacher, margin), student.requires_grad_())
    beyond = teacher.sign() * (margin + teacher.abs())
    assert boundary_distance(beyond, teacher, margin).item() == 0
    zeros = torch.zeros_like(teacher)
    assert boundary_distance(zeros, teacher, margin).item() == near(16 * margin**2)
    assert boundary_distance(zeros - margin, zeros, margin).item() == 0  # a teacher's 0 is not active


STUDENT = {"a": draw(3, 2, 4, 4), "b": draw(3, 3, 2, 2), "c": draw(3, 4)}
TEACHER = {"a": draw(3, 3, 2, 2, seed=1), "b": draw(3, 3, 4, 4, seed=1), "c": draw(3, 5, seed=1)}
NAMES = ["a", "b", "c"]


def stages():
    """The three stages above as lists (B, C, P), pooled to one size: (student, teacher)."""
    for name, side in zip(NAMES, (2, 2, 1), strict=True):
        pair = (net[name].reshape(*net[name].shape[:2], *net[name].shape[2:] or (1, 1)) for net in (STUDENT, TEACHER))
        yield tuple([vectors(image, side, side) for image in maps.tolist()] for maps in pair)


def test_ab_halves_each_stage_before_the_last():
    loss = ready(AB(NAMES, NAMES), STUDENT, TEACHER)
    assert list(loss.connectors[1].parameters()) == []  # as many channels
    total = 0.0
    for i, (mine, theirs) in enumerate(stages()):
        mine = mine if i == 1 else connected(loss.connectors[i], mine)
        total += hinges(mine, theirs, 1.0) / 2 ** (2 - i)
    assert run(loss, STUDENT, TEACHER).item() == near(total * 3 / 1000, rel=1e-9)


def partial(student, teacher, margins):
    """As `hinges`, of the partial L2 after the margin ReLU."""
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        for row, other, margin in zip(mine, theirs, margins, strict=True):
            for s, t in zip(row, other, strict=True):
                target = max(t, margin)
                total += 0.0 if s <= target <= 0 else (target - s) ** 2
    return total / len(student)


def test_partial_distance_equals_loops():
    student, teacher = draw(3, 4, 3, 3), draw(3, 4, 3, 3, seed=1)
    margins = torch.tensor([-0.5, -1.0, 0.0, -2.0], dtype=torch.double)
    expected = partial(student.flatten(2).tolist(), teacher.flatten(2).tolist(), margins.tolist())
    assert partial_distance(student, teacher, margins).item() == near(expected)
    assert torch.autograd.gradcheck(lambda maps: partial_distance(maps, teacher, margins), student.requires_grad_())


def test_partial_distance_never_pulls_up_to_what_is_not_positive():
    teacher = torch.tensor([-5.0, -5.0, -0.2, -0.2, 3.0, 3.0]).view(1, 1, 1, 6)
    student = torch.tensor([-0.7, -0.1, -0.3, 0.1, 2.0, 4.0]).view(1, 1, 1, 6).requires_grad_()
    partial_distance(student, teacher, torch.tensor([-0.5])).backward()
    assert torch.allclose(student.grad.flatten(), torch.tensor([0.0, 0.8, 0.0, 0.6, -2.0, 2.0]))


def negative_means(*features):
    """Mean of the negative values of each channel over batches; 0 where there is none."""
    found = []
    for channel in range(features[0].shape[1]):
        values = [v for feature in features for v in feature[:, channel].flatten().tolist() if v < 0]
        found.append(mean(values) if values else 0.0)
    return found


def test_ofd_equals_loops_and_halves_each_stage_before_the_last():
    loss = ready(OFD(NAMES, NAMES), STUDENT, TEACHER)
    total = 0.0
    for i, (mine, theirs) in enumerate(stages()):
        margins = negative_means(TEACHER[NAMES[i]])  # of the teacher's map, before it is pooled
        total += partial(connected(loss.connectors[i], mine), theirs, margins) / 2 ** (2 - i)
    assert run(loss, STUDENT, TEACHER).item() == near(total, rel=1e-9)


def test_ofd_margins_are_the_means_over_the_first_epoch():
    first, second, later = (draw(4, 3, 2, 2, seed=seed) for seed in (1, 2, 3))
    first[:, 1], second[:, 1] = first[:, 1].abs(), second[:, 1].abs()
    student = {"a": draw(4, 2, 2, 2)}
    loss = ready(OFD(["a"], ["b"]), student, {"b": first})
    for feature, epoch, seen in ((first, 0, (first,)), (second, 0, (first, second)), (later, 1, (first, second))):
        run(loss, student, {"b": feature}, epoch)
        (margins,) = loss.margins([feature], batch_of(4, epoch=1))
        assert margins.tolist() == near(negative_means(*seen))
    assert margins[1] == 0
    assert "negatives" in loss.state_dict()
    assert "negatives" in loss.replicated


def margins_of_two(rank, port, path):
    """What each of two processes has after two batches: two images and one, then three and none (one of no weight)."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    loss = ready(OFD(["a"], ["b"]), {"a": draw(1, 2, 2, 2)}, {"b": draw(1, 3, 2, 2)})
    for seed, counts in ((1, [2, 1]), (2, [3, 0])):
        parts = draw(3, 3, 2, 2, seed=seed).split(counts)
        mine = parts[rank] if counts[rank] else parts[0][:1]
        batch = batch_of(len(mine))
        batch.counts = counts
        loss.margins([mine], batch)
    torch.save(loss.negatives, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ofd_margins_are_equal_on_all_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [children.CONTEXT.Process(target=margins_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    assert children.finish(*both) == [0, 0]
    alone = ready(OFD(["a"], ["b"]), {"a": draw(1, 2, 2, 2)}, {"b": draw(1, 3, 2, 2)})
    for seed in (1, 2):
        alone.margins([draw(3, 3, 2, 2, seed=seed)], batch_of(3))
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone.negatives)


# VID


def reference_likelihood(mean_of, teacher, variance):
    return mean(
        0.5 * ((t - m) ** 2 / v + math.log(v))
        for one, other in zip(mean_of, teacher, strict=True)
        for row, places, v in zip(one, other, variance, strict=True)
        for m, t in zip(row, places, strict=True)
    )


def test_vid_equals_loops():
    loss = ready(VID(NAMES, NAMES), STUDENT, TEACHER)
    total = 0.0
    for i, (mine, theirs) in enumerate(stages()):
        with torch.no_grad():
            loss.scales[i] += draw(len(loss.scales[i]), seed=5)
        variance = [math.log1p(math.exp(scale)) + 1e-5 for scale in loss.scales[i].tolist()]
        for layer in (0, 2, 4):
            weight = loss.regressors[i][layer].weight[:, :, 0, 0].tolist()
            mine = [[[dot(row, place) for place in zip(*image, strict=True)] for row in weight] for image in mine]
            if layer < 4:
                mine = [[[max(0.0, value) for value in row] for row in image] for image in mine]
        total += reference_likelihood(mine, theirs, variance)
    assert run(loss, STUDENT, TEACHER).item() == near(total)


def test_vid_begins_with_its_variance():
    for arguments, expected in (({}, 5.0), ({"initial_variance": 0.01, "epsilon": 1e-3}, 0.01)):
        loss = ready(VID(["c"], ["c"], **arguments), STUDENT, TEACHER)
        variance = torch.nn.functional.softplus(loss.scales[0]) + loss.epsilon
        assert variance.tolist() == pytest.approx([expected] * 5, rel=1e-5)


def test_the_best_variance_is_the_mean_squared_error_of_the_channel():
    given, teacher = draw(4, 3, 2, 2), draw(4, 3, 2, 2, seed=1)
    best = (given - teacher).square().mean((0, 2, 3))
    least = negative_log_likelihood(given, teacher, best)
    assert least.item() == near((0.5 + 0.5 * best.log()).mean().item())
    for factor in (0.9, 1.1):
        assert negative_log_likelihood(given, teacher, factor * best) > least
    inputs = given.requires_grad_(), teacher, best.requires_grad_()
    assert torch.autograd.gradcheck(negative_log_likelihood, inputs)


# all

ALL = ("AB", "AT", "FSP", "FT", "NST", "OFD", "VID")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e4, -1e4])
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
def test_constant_and_large_features_give_finite_gradients(name, fill, constant):
    student, teacher = ({key: 1e4 * draw(2, 4, 4, 4, seed=seed).float() for key in "ab"} for seed in (0, 1))
    for network, features in (("student", student), ("teacher", teacher)):
        if constant in (network, "both"):
            features["a"] = torch.full((2, 4, 4, 4), fill)
    single = name == "FT"
    loss = LOSSES[name](*(("a", "a") if single else (["a", "b"], ["a", "b"])))
    loss = ready(loss, student, teacher).float()
    leaves = [feature.requires_grad_() for feature in student.values()]
    value = run(loss, student, teacher)
    value.backward()
    assert value.isfinite()
    for tensor in (*(leaf.grad for leaf in leaves[: 1 if single else 2]), *(p.grad for p in loss.parameters())):
        assert tensor.isfinite().all()
    if name in ("AT", "NST", "FT"):  # scaled to unit length, which must not divide by almost nothing
        assert leaves[0].grad.abs().max() < 1


@pytest.mark.parametrize("name", ["AB", "OFD", "VID"])
def test_a_batch_of_one_vector_has_a_value_and_gradients(name):
    student, teacher = {"a": draw(1, 3).requires_grad_()}, {"a": draw(1, 5, seed=1)}
    loss = ready(LOSSES[name](["a"], ["a"]), student, teacher).train()
    value = run(loss, student, teacher)
    value.backward()
    assert value.isfinite()
    assert student["a"].grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", ALL)
def test_height_and_width_may_differ(name):
    student = {"a": draw(2, 4, 8, 8), "b": draw(2, 4, 3, 5)}
    teacher = {"a": draw(2, 4, 5, 4, seed=1), "b": draw(2, 4, 6, 6, seed=1)}
    arguments = ("a", "b") if name == "FT" else (["a", "b"], ["a", "b"])
    loss = ready(LOSSES[name](*arguments), student, teacher)
    assert run(loss, student, teacher).isfinite()


ONE, TWO = (["a"], ["b"]), (["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AT(*ONE, power=0.5), "AT: power 0.5 must be a finite number, 1 or more"),
        (lambda: FSP(*ONE), r"FSP: student_taps \['a'\] must be two or more"),
        (lambda: FT("a", "b", rate=0.0), "FT: rate 0.0 must be a finite number above 0"),
        (
            lambda: FT("a", "b", reconstruction_weight=0.0),
            "FT: reconstruction_weight 0.0 must be a finite number",
        ),
        (lambda: AB(*ONE, margin=0.0), "AB: margin 0.0 must be a finite number above 0"),
        (lambda: VID(*ONE, epsilon=0.0), "VID: epsilon 0.0 must be a finite number above 0"),
        (lambda: VID(*ONE, initial_variance=1e-6), "VID: initial_variance 1e-06 must be a finite number above epsilon"),
    ],
)
def test_bad_values_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    ("loss", "shapes", "words"),
    [
        (AT(*ONE), ((8,), (8,)), r"AT: the student's a is 8 and .*; tap maps \(CxHxW\) larger than 1x1"),
        (AT(*ONE), ((8, 4, 4), (8, 1, 1)), "AT: .* is 8x1x1; tap maps .* larger than 1x1"),
        (NST(*ONE), ((8,), (8, 4, 4)), "NST: .* larger than 1x1"),
        (NST(*ONE), ((8, 1, 1), (8, 4, 4)), "NST: .* larger than 1x1"),
        (FSP(*TWO), ((8, 4, 4), (16, 4, 4)), "FSP: .*; tap maps of as many channels, or use AT, NST or VID"),
        (FSP(*TWO), ((8,), (8,)), r"FSP: .*; tap maps \(CxHxW\)"),
        (FT("a", "b"), ((8,), (8, 4, 4)), r"FT: .*; tap maps \(CxHxW\)"),
        (AB(*ONE), ((8,), (8, 4, 4)), "AB: .* two vectors"),
        (OFD(*ONE), ((8, 4, 4), (8,)), "OFD: .* two vectors"),
        (VID(*ONE), ((8, 4), (8, 4)), "VID: the student's a is 8x4 .* two vectors"),
    ],
)
def test_shapes_that_do_not_suit_are_refused(loss, shapes, words):
    mine, theirs = shapes
    with pytest.raises(ValueError, match=words):
        loss.setup(Setting(dict.fromkeys("ab", mine), dict.fromkeys("ab", theirs)))
