"""The losses on how images relate to each other: against loops in float64, and what the papers say cannot change them.

That several processes give what one gives is tests/losses/test_losses_parallel.py's.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.losses import CC, IRG, PKT, RKD, SP, Setting
from kd.losses.correlation_congruence import neighbour_incongruence
from kd.losses.irg import edges, pooled, transformation
from kd.losses.parts import unit
from kd.losses.pkt import neighbour_divergence
from kd.losses.rkd import cosines, relative_distances
from kd.losses.similarity import similarity_distance
from kd.outputs import Batch, Outputs

BATCH = Batch({}, torch.empty(0), torch.empty(0))


def two(size=6, student=4, teacher=7):
    torch.manual_seed(0)
    return torch.randn(size, student, dtype=torch.double), torch.randn(size, teacher, dtype=torch.double)


def value(loss, student, teacher):
    """The loss of two features under the tap name "a"; their first two columns are the logits."""
    outputs = (Outputs(feature.flatten(1)[:, :2], {"a": feature}) for feature in (student, teacher))
    return loss(*outputs, BATCH)


def turned(feature):
    """The same features in another orthonormal basis."""
    basis, _ = torch.linalg.qr(torch.randn(feature.shape[1], feature.shape[1], dtype=feature.dtype))
    return feature @ basis


def dot(one, other):
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def minus(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def huber(one, other):
    gap = abs(one - other)
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def reference_distances(rows):
    distances = [[math.dist(one, other) for other in rows] for one in rows]
    average = mean(d for row in distances for d in row if d > 0)
    return [d / average for row in distances for d in row]


def reference_angles(rows):
    found = []
    for middle in rows:
        for one in rows:
            for other in rows:
                left, right = minus(one, middle), minus(other, middle)
                lengths = math.hypot(*left) * math.hypot(*right)
                found.append(dot(left, right) / lengths if lengths else 0.0)
    return found


@pytest.mark.parametrize("coincide", [False, True])
@pytest.mark.parametrize("far", [1, 30])
def test_rkd_equals_loops(coincide, far):
    student, teacher = two()
    student[0] *= far  # some pairs beyond the Huber loss's threshold, too
    if coincide:
        student[1], teacher[3] = student[4], teacher[2]
    expected = []
    for relation in (reference_distances, reference_angles):
        pairs = zip(relation(student.tolist()), relation(teacher.tolist()), strict=True)
        expected.append(mean(huber(s, t) for s, t in pairs))
    assert value(RKD("a", "a", angle_weight=0), student, teacher).item() == pytest.approx(25 * expected[0], rel=1e-12)
    assert value(RKD("a", "a", distance_weight=0), student, teacher).item() == pytest.approx(
        50 * expected[1], rel=1e-12
    )
    total = value(RKD("a", "a"), student, teacher).item()
    assert total == pytest.approx(25 * expected[0] + 50 * expected[1], rel=1e-12)


def test_rkd_does_not_see_a_shift_a_turn_or_a_scale():
    _, teacher = two()
    other = 3 * turned(teacher) + torch.randn(7, dtype=torch.double)
    assert value(RKD("a", "a"), other, teacher).item() == pytest.approx(0, abs=1e-12)
    assert value(RKD("a", "a"), other.square(), teacher).item() > 0.1


def test_rkd_keeps_its_digits_far_from_the_origin():
    student, teacher = two()
    expected = value(RKD("a", "a"), student, teacher).item()
    near = value(RKD("a", "a"), student.float() + 300, teacher.float() + 300).item()
    assert near == pytest.approx(expected, rel=1e-4)


def test_rkd_angles_are_those_of_a_right_isosceles_triangle():
    found = cosines(relative_distances(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.double)))
    half = math.sqrt(0.5)
    at_corner = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.double)
    at_side = torch.tensor([[1, 0, half], [0, 0, 0], [half, 0, 1]], dtype=torch.double)
    assert torch.allclose(found[0], at_corner, atol=1e-15)
    assert torch.allclose(found[1], at_side)


@pytest.mark.parametrize("num_equal", [2, 3, 6])
def test_rkd_has_a_gradient_where_images_coincide(num_equal):
    student, teacher = two()
    student[:num_equal] = student[0]
    student.requires_grad_()
    loss = value(RKD("a", "a"), student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert bool(student.grad.any()) == (num_equal < 6)


def reference_similarities(rows):
    found = []
    for one in rows:
        row = [dot(one, other) for other in rows]
        length = math.hypot(*row)
        found += [x / length if length else 0.0 for x in row]
    return found


@pytest.mark.parametrize("zeros", [False, True])
def test_sp_equals_loops(zeros):
    student, teacher = two()
    if zeros:
        student[2] = 0
    rows = (reference_similarities(feature.tolist()) for feature in (student, teacher))
    expected = mean((s - t) ** 2 for s, t in zip(*rows, strict=True))
    assert similarity_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    maps = student.view(6, 1, 2, 2)
    assert value(SP("a", "a"), maps, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_sp_does_not_see_a_turn_or_a_scale_but_a_shift():
    _, teacher = two()
    assert similarity_distance(3 * turned(teacher), teacher).item() == pytest.approx(0, abs=1e-15)
    assert similarity_distance(teacher + 1, teacher).item() > 1e-3


def reference_probabilities(rows):
    found = []
    for one in rows:
        row = [(dot(one, other) / (math.hypot(*one) * math.hypot(*other)) + 1) / 2 for other in rows]
        found += [max(x, 1e-7) for x in row]
        found[-len(row) :] = [x / math.fsum(found[-len(row) :]) for x in found[-len(row) :]]
    return found


def test_pkt_equals_loops():
    student, teacher = two()
    rows = (reference_probabilities(feature.tolist()) for feature in (student, teacher))
    expected = mean(p * (math.log(p) - math.log(q)) for q, p in zip(*rows, strict=True))
    assert neighbour_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-11)
    assert value(PKT("a", "a"), student, teacher).item() == pytest.approx(expected, rel=1e-11)


def test_pkt_does_not_see_a_turn_or_each_images_scale():
    _, teacher = two()
    scale = torch.rand(6, 1, dtype=torch.double) + 0.5
    assert neighbour_divergence(scale * turned(teacher), teacher).item() == pytest.approx(0, abs=1e-15)
    assert neighbour_divergence(teacher + 1, teacher).item() > 1e-4


def test_pkt_of_opposite_features_is_finite():
    student, teacher = two(2, 3, 3)
    student[1], teacher[1] = -student[0], teacher[0]
    student.requires_grad_()
    loss = neighbour_divergence(student, teacher)
    loss.backward()
    # The teacher's neighbours are even; the student's other image has the smallest kernel, 1e-7.
    expected = (math.log(0.5) - math.log(1 / (1 + 1e-7)) + math.log(0.5) - math.log(1e-7 / (1 + 1e-7))) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("function", [similarity_distance, neighbour_divergence])
@pytest.mark.parametrize("which", [slice(2, 4), slice(0, 6)])
def test_rows_of_zeros_have_a_bounded_gradient(function, which):
    student, teacher = two()
    student[which] = 0
    student.requires_grad_()
    function(student, teacher).backward()
    assert student.grad.abs().max() < 1


def test_unit_rows_are_of_length_1():
    student, _ = two()
    student[3] = 0
    lengths = [math.hypot(*row) for row in unit(student).tolist()]
    assert lengths == pytest.approx([1, 1, 1, 0, 1, 1], rel=1e-12)


def embedded(row, layer):
    return [dot(row, weights) + bias for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def correlation(train_teacher_embedding=True):
    loss = CC("a", "a", dimension=5, train_teacher_embedding=train_teacher_embedding)
    loss.setup(Setting({"a": (4,)}, {"a": (7,)}))
    return loss.double()


@pytest.mark.parametrize("size", [2, 6])
def test_cc_equals_loops(size):
    student, teacher = two(size)
    loss = correlation()
    gaps = [
        [abs(gap) for gap in minus(embedded(s, loss.student_embedding), embedded(t, loss.teacher_embedding))]
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    expected = mean(dot(one, following) for one, following in pairwise(gaps))
    assert value(loss, student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_cc_embeds_to_128_dimensions_unless_told_otherwise():
    loss = CC("a", "a")
    loss.setup(Setting({"a": (4, 2, 2)}, {"a": (7,)}))
    assert loss.student_embedding.weight.shape == (128, 16)
    assert loss.teacher_embedding.weight.shape == (128, 7)


def test_cc_has_a_trivial_solution():
    """Its documentation says so: embeddings that are one constant give 0, and nothing is left to learn from."""
    student, teacher = two()
    loss = correlation()
    for layer in (loss.student_embedding, loss.teacher_embedding):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 0.3)
    student.requires_grad_()
    found = value(loss, student, teacher)
    found.backward()
    assert found.item() == 0
    assert not student.grad.any()


def test_cc_may_leave_the_teachers_embedding_as_it_is():
    student, teacher = two()
    loss = correlation(train_teacher_embedding=False)
    value(loss, student, teacher).backward()
    assert loss.student_embedding.weight.grad.any()
    assert [name for name, p in loss.named_parameters() if not p.requires_grad] == [
        "teacher_embedding.weight",
        "teacher_embedding.bias",
    ]


def graphs():
    """Logits and two taps of each network: a map of 3 channels and a vector, longer than the map has channels."""
    torch.manual_seed(0)
    found = []
    for width in (6, 7):
        features = {"a": torch.randn(6, 3, 2, 2, dtype=torch.double), "b": torch.randn(6, width, dtype=torch.double)}
        found.append(Outputs(torch.randn(6, 5, dtype=torch.double), features))
    return found


def reference_graph(outputs):
    """Edges of both taps and the transformation between them, as flat lists."""
    first = [[mean(channel) for channel in image] for image in outputs.features["a"].flatten(2).tolist()]
    last = outputs.features["b"].tolist()
    found = []
    for rows in (first, last):
        distances = [math.dist(one, other) ** 2 for one in rows for other in rows]
        found.append([d / max(distances) for d in distances])
    # Adaptive pooling of n channels to 3: part i has the channels from floor(i n / 3) to ceil((i + 1) n / 3).
    n = len(last[0])
    parts = [(i * n // 3, -(-(i + 1) * n // 3)) for i in range(3)]
    shorter = [[mean(row[start:end]) for start, end in parts] for row in last]
    moved = [math.dist(one, other) ** 2 for one, other in zip(first, shorter, strict=True)]
    return [*found, [d / max(moved) for d in moved]]


def square_gap(one, other):
    return mean((a - b) ** 2 for a, b in zip(one, other, strict=True))


def weighing(*weights):
    return dict(zip(("vertex_weight", "edge_weight", "transformation_weight"), weights, strict=True))


def test_irg_equals_loops():
    student, teacher = graphs()
    parts = [square_gap(s, t) for s, t in zip(reference_graph(student), reference_graph(teacher), strict=True)]
    logits = square_gap(student.logits.flatten().tolist(), teacher.logits.flatten().tolist())
    taps = ["a", "b"], ["a", "b"]
    expected = {
        (1.0, 0.0, 0.0): logits,
        (0.0, 1.0, 0.0): (parts[0] + parts[1]) / 2,
        (0.0, 0.0, 1.0): parts[2],
    }
    for weights, part in expected.items():
        assert IRG(*taps, **weighing(*weights))(student, teacher, BATCH).item() == pytest.approx(part, rel=1e-12)
    total = 0.1 * logits + 5 * (parts[0] + parts[1]) / 2 + 5 * parts[2]
    assert IRG(*taps)(student, teacher, BATCH).item() == pytest.approx(total, rel=1e-12)


def test_irg_averages_its_transformations():
    student, teacher = graphs()
    for outputs in (student, teacher):
        outputs.features["c"] = outputs.features["b"].flip(1)
    both = IRG(["a", "b", "c"], ["a", "b", "c"], **weighing(0.0, 0.0, 1.0))(student, teacher, BATCH).item()
    each = [
        IRG(pair, pair, **weighing(0.0, 0.0, 1.0))(student, teacher, BATCH).item() for pair in (["a", "b"], ["b", "c"])
    ]
    assert both == pytest.approx(sum(each) / 2, rel=1e-12)
    assert each[0] != pytest.approx(each[1], rel=0.01)


def test_irg_does_not_see_a_common_turn_and_scale_of_the_layers():
    torch.manual_seed(0)
    first, last, logits = torch.randn(3, 6, 4, dtype=torch.double)
    teacher = Outputs(logits, {"a": first, "b": last})
    basis = 3 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.double))[0]
    student = Outputs(logits, {"a": first @ basis, "b": last @ basis})
    loss = IRG(["a", "b"], ["a", "b"])
    assert loss(student, teacher, BATCH).item() == pytest.approx(0, abs=1e-14)
    student.features["a"] = first
    assert loss(student, teacher, BATCH).item() > 1e-3  # the edges are as they were, the transformation is not


def test_irg_of_images_and_layers_that_are_all_equal():
    student = torch.ones(6, 4, dtype=torch.double, requires_grad=True)
    for found in (edges(student), transformation(student, student)):
        assert not found.any()
        found.sum().backward()
    assert not student.grad.any()
    _, teacher = two()
    (F.mse_loss(edges(student), edges(teacher)) + transformation(student, teacher[:, :4]).var()).backward()
    assert student.grad.isfinite().all()


def test_irg_averages_a_map_over_its_places():
    feature = torch.arange(24.0).view(2, 3, 2, 2)
    assert pooled(feature).tolist() == [[1.5, 5.5, 9.5], [13.5, 17.5, 21.5]]
    assert torch.equal(pooled(feature[:, :, 0, 0]), feature[:, :, 0, 0])


SMOOTH = {
    "rkd": lambda student, teacher: value(RKD("a", "a"), student, teacher),
    "sp": similarity_distance,
    "pkt": neighbour_divergence,
    "cc": neighbour_incongruence,
    "irg edges": lambda student, teacher: F.mse_loss(edges(student), edges(teacher)),
    "irg transformation": lambda student, teacher: transformation(student, teacher).square().sum(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_function(name):
    student, teacher = two(5, 4, 4 if name == "cc" else 6)
    assert torch.autograd.gradcheck(lambda x: SMOOTH[name](x, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    "loss", [RKD("a", "a"), SP("a", "a"), PKT("a", "a"), correlation()], ids=lambda loss: str(loss)
)
def test_one_image_has_no_relations(loss):
    student, teacher = two(1)
    student.requires_grad_()
    found = value(loss, student, teacher)
    found.backward()
    assert found.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RKD("a", "a", distance_weight=-1), "RKD: distance_weight -1 must be a finite number, 0 or more"),
        (lambda: RKD("a", "a", angle_weight=math.inf), "RKD: angle_weight inf must be a finite number"),
        (lambda: CC("a", "a", dimension=0), "CC: dimension 0 must be 1 or more"),
        (lambda: IRG(["a", "b"], ["a", "b"], edge_weight=-2), "IRG: edge_weight -2 must be a finite number"),
        (lambda: IRG(["a"], ["a"]), "IRG: one pair of taps has no transformation; name two"),
        (lambda: IRG(["a", "b"], ["a"]), "IRG: 2 student_taps and 1 teacher_taps"),
    ],
)
def test_bad_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_irg_refuses_what_is_neither_a_map_nor_a_vector():
    assert IRG(["a"], ["a"], transformation_weight=0).setup(Setting({"a": (3, 4, 4)}, {"a": (5,)})) is None
    with pytest.raises(ValueError, match="IRG: the student's a is 3x4x4 and the teacher's b is 9x5; tap maps"):
        IRG(["a"], ["b"], transformation_weight=0).setup(Setting({"a": (3, 4, 4)}, {"b": (9, 5)}))
