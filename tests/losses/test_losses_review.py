"""Losses on feature maps against slow references: loops in float64 over images, channels and pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from kd import keyed
from kd.losses import CKA, CWD, ICKD, MGD, ReviewKD, Setting, SimKD
from kd.losses.cka import linear_cka
from kd.losses.cwd import channel_divergence
from kd.losses.ickd import channel_correlations, correlation_error
from kd.losses.mgd import generation_error, kept
from kd.losses.parts import BatchNorm, average_pool, same_size, unit
from kd.losses.review import hierarchical_context
from kd.outputs import Batch, Outputs

pytestmark = pytest.mark.first_tier(3)


def draw(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def built(loss, student, teacher):
    """The loss in float64, set up for these features (by tap name), with norms that are not at their initial values."""
    torch.manual_seed(0)
    shapes = ({name: tuple(x.shape[1:]) for name, x in features.items()} for features in (student, teacher))
    loss.setup(Setting(*shapes))
    for module in loss.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return loss.double()


def batch_of(size, epoch=0, keys=None):
    index = torch.arange(size)
    return Batch({}, index, index, index + 7 if keys is None else keys, epoch)


def value(loss, student, teacher, epoch=0, keys=None):
    batch = batch_of(len(next(iter(student.values()))), epoch, keys)
    return loss(Outputs(None, student), Outputs(None, teacher), batch)


# References on nested lists [image][channel][row][column]


def reference_conv(x, conv):
    weight, bias = conv.weight.tolist(), [0.0] * len(conv.weight) if conv.bias is None else conv.bias.tolist()
    pad, side = conv.padding[0], range(conv.kernel_size[0])

    def at(image, c, i, j):
        inside = 0 <= i < len(image[c]) and 0 <= j < len(image[c][0])
        return image[c][i][j] if inside else 0.0

    def out(image, o, i, j):
        terms = (
            weight[o][c][di][dj] * at(image, c, i + di - pad, j + dj - pad)
            for c in range(len(image))
            for di in side
            for dj in side
        )
        return bias[o] + math.fsum(terms)

    rows, columns = range(len(x[0][0])), range(len(x[0][0][0]))
    return [[[[out(image, o, i, j) for j in columns] for i in rows] for o in range(len(weight))] for image in x]


def reference_norm(x, norm):
    """Batch normalization by the batch's own mean and variance."""
    result = [[[list(row) for row in channel] for channel in image] for image in x]
    for c, (scale, shift) in enumerate(zip(norm.weight.tolist(), norm.bias.tolist(), strict=True)):
        values = [v for image in x for row in image[c] for v in row]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for image in result:
            image[c] = [[scale * (v - mean) / math.sqrt(variance + norm.eps) + shift for v in row] for row in image[c]]
    return result


def reference_pool(x, height, width):
    def cell(channel, i, j):
        rows, columns = len(channel), len(channel[0])
        values = [
            v
            for row in channel[i * rows // height : math.ceil((i + 1) * rows / height)]
            for v in row[j * columns // width : math.ceil((j + 1) * columns / width)]
        ]
        return math.fsum(values) / len(values)

    return [[[[cell(ch, i, j) for j in range(width)] for i in range(height)] for ch in image] for image in x]


def reference_nearest(x, height, width):
    return [
        [
            [[ch[i * len(ch) // height][j * len(ch[0]) // width] for j in range(width)] for i in range(height)]
            for ch in im
        ]
        for im in x
    ]


def flat(x):
    return [x] if isinstance(x, float) else [v for part in x for v in flat(part)]


def reference_squares(x, y):
    return math.fsum((a - b) ** 2 for a, b in zip(flat(x), flat(y), strict=True))


def reference_mse(x, y):
    return reference_squares(x, y) / len(flat(x))


def reference_context(x, y, levels):
    terms = [(1.0, reference_mse(x, y))]
    for level in levels:
        if level < len(x[0][0]):
            pooled = reference_pool(x, level, level), reference_pool(y, level, level)
            terms.append((terms[-1][0] / 2, reference_mse(*pooled)))
    return math.fsum(w * e for w, e in terms) / math.fsum(w for w, _ in terms)


def test_average_pool_equals_loops_and_pytorchs_adaptive_pooling():
    x = draw(2, 3, 7, 6)
    for size in ((4, 4), (7, 3), (1, 1), (3, 5)):
        pooled = average_pool(x, size)
        assert torch.allclose(pooled, torch.tensor(reference_pool(x.tolist(), *size), dtype=torch.double), atol=1e-14)
        assert torch.allclose(pooled, torch.nn.functional.adaptive_avg_pool2d(x, size), atol=1e-14)
    assert average_pool(x, (7, 6)) is x
    one, other = same_size(x, draw(2, 5, 3, 9))
    assert one.shape == (2, 3, 3, 6)
    assert other.shape == (2, 5, 3, 6)
    assert gradcheck(lambda z: average_pool(z, (4, 5)), draw(1, 1, 7, 6).requires_grad_())


def test_batch_norm_is_pytorchs_but_takes_one_value_a_channel():
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    x = draw(4, 3, 2, 2, dtype=torch.float32)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(ours.state_dict()[key], buffer) for key, buffer in theirs.state_dict().items())
    alone = draw(1, 3, 1, 1, dtype=torch.float32).requires_grad_()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(alone)
    out = ours(alone)
    out.square().sum().backward()
    expected = (alone - ours.running_mean.view(1, 3, 1, 1)) / (ours.running_var.view(1, 3, 1, 1) + 1e-5).sqrt()
    assert torch.allclose(out, expected)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert ours.num_batches_tracked == 1
    assert (ours.weight.grad != 0).all()
    assert (alone.grad != 0).all()


def test_unit_has_length_one_and_a_finite_gradient_at_zero():
    x = torch.cat([draw(2, 3), torch.zeros(1, 3, dtype=torch.double)]).requires_grad_()
    lengths = unit(x, dim=1).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([1.0, 1.0, 0.0], dtype=torch.double))
    unit(x, dim=1)[:, 0].sum().backward()
    assert x.grad.isfinite().all()


# ReviewKD

REVIEW_STUDENT = {"a": (3, 4, 4), "b": (2, 2, 2), "c": (4,)}
REVIEW_TEACHER = {"a": (2, 8, 8), "b": (3, 2, 2), "c": (2,)}


def review(size=3, dtype=torch.double, **arguments):
    student, teacher = (
        {name: draw(size, *shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
        for seed, shapes in ((1, REVIEW_STUDENT), (11, REVIEW_TEACHER))
    )
    return built(ReviewKD(list("abc"), list("abc"), **arguments), student, teacher).to(dtype), student, teacher


@pytest.mark.parametrize("arguments", [{}, {"mid_channels": 3, "levels": (3, 1), "warmup_epochs": 2}])
def test_review_equals_loops(arguments):
    loss, student, teacher = review(**arguments)
    levels, total, deeper = arguments.get("levels", (4, 2, 1)), 0.0, None
    for name in "cba":
        x, y = (f[name].view(*f[name].shape, *[1] * (4 - f[name].ndim)).tolist() for f in (student, teacher))
        fusion = loss.fusions["abc".index(name)]
        x = reference_norm(reference_conv(x, fusion.reduce[0]), fusion.reduce[1])
        height, width = len(x[0][0]), len(x[0][0][0])
        if deeper is not None:
            deeper = reference_nearest(deeper, height, width)
            attention = reference_conv([a + b for a, b in zip(x, deeper, strict=True)], fusion.attend)
            for image, other, logits in zip(x, deeper, attention, strict=True):
                for c, channel in enumerate(image):
                    for i in range(height):
                        for j in range(width):
                            mine, theirs = (1 / (1 + math.exp(-logits[k][i][j])) for k in (0, 1))
                            channel[i][j] = mine * channel[i][j] + theirs * other[c][i][j]
        deeper = x
        x = reference_nearest(x, len(y[0][0]), len(y[0][0][0]))
        x = reference_norm(reference_conv(x, fusion.predict[0]), fusion.predict[1])
        total += reference_context(x, y, levels)
    warmup = arguments.get("warmup_epochs", 20)
    for epoch in (0, 1, warmup - 1, warmup + 5):
        expected = min(1, (epoch + 1) / warmup) * total
        assert value(loss, student, teacher, epoch).item() == pytest.approx(expected, rel=1e-9)


def test_review_learns_what_is_published():
    loss = review()[0]
    assert [fusion.reduce[0].weight.shape for fusion in loss.fusions] == [(4, 3, 1, 1), (4, 2, 1, 1), (4, 4, 1, 1)]
    assert [fusion.predict[0].weight.shape for fusion in loss.fusions] == [(2, 4, 3, 3), (3, 4, 3, 3), (2, 4, 3, 3)]
    assert [fusion.attend is None for fusion in loss.fusions] == [False, False, True]
    wide = ReviewKD(["a"], ["a"])
    wide.setup(Setting({"a": (600, 2, 2)}, {"a": (3, 2, 2)}))
    assert wide.fusions[0].reduce[0].weight.shape == (512, 600, 1, 1)


def test_review_gradients():
    loss, student, teacher = review()
    inputs = [feature.requires_grad_() for feature in student.values()]
    assert gradcheck(lambda *x: value(loss, dict(zip("abc", x, strict=True)), teacher), inputs, fast_mode=True)
    student, teacher = draw(2, 1, 5, 6).requires_grad_(), draw(2, 1, 5, 6, seed=1)
    assert gradcheck(lambda x: hierarchical_context(x, teacher), student)
    expected = reference_context(student.tolist(), teacher.tolist(), (4, 2, 1))
    assert hierarchical_context(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert hierarchical_context(teacher, teacher).item() == 0
    # every level sees a shift of all values alike
    assert hierarchical_context(teacher + 3, teacher).item() == pytest.approx(9, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_review_of_one_image_and_of_zeros(scale):
    """One image alone has one value a channel at 1x1: the deepest norms use, and leave, their running statistics."""
    loss, student, teacher = review(size=1, dtype=torch.float32)
    student = {name: (scale * feature).requires_grad_() for name, feature in student.items()}
    value(loss, student, teacher).backward()
    assert all(feature.grad.isfinite().all() for feature in student.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    tracked = [int(module.num_batches_tracked) for module in loss.modules() if isinstance(module, BatchNorm)]
    assert tracked == [1, 1, 1, 1, 0, 0]
    assert all((feature.grad != 0).any() for feature in student.values())


def test_review_refuses_what_it_cannot_fuse():
    def setup(student, teacher):
        names = list("abc")[: len(student)]
        shapes = (dict(zip(names, each, strict=True)) for each in (student, teacher))
        ReviewKD(names, names).setup(Setting(*shapes))

    with pytest.raises(ValueError, match=r"ReviewKD: the student's b is 3x8x8 .*from shallow to deep"):
        setup([(5, 4, 4), (3, 8, 8)], [(5, 4, 4), (3, 8, 8)])
    with pytest.raises(ValueError, match=r"b is 3x4x4 .*from shallow to deep"):
        setup([(5,), (3, 4, 4)], [(5,), (3, 4, 4)])
    with pytest.raises(ValueError, match=r"a is 16x5; tap maps \(CxHxW\) or vectors"):
        setup([(5, 4, 4)], [(16, 5)])
    for arguments, words in (
        ({"mid_channels": 0}, "mid_channels 0"),
        ({"levels": (4, 0)}, r"levels \(4, 0\)"),
        ({"warmup_epochs": -1}, "warmup_epochs -1"),
    ):
        with pytest.raises(ValueError, match=f"ReviewKD: {words}"):
            ReviewKD(["a"], ["a"], **arguments)


# MGD


def masks(loss, keys, count):
    """Which places each image keeps, by SplitMix64 on Python's integers; a resumed run must not change."""

    def mixed(base, index):
        z = (base + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    purpose = keyed.key(77, 71, 68, *loss.student_tap.encode())
    draws = ([mixed(mixed(key, purpose), place) >> 40 for place in range(count)] for key in keys.tolist())
    return [[float(each / 2**24 >= loss.mask_ratio) for each in row] for row in draws]


@pytest.mark.parametrize("mask", ["pixels", "channels"])
@pytest.mark.parametrize("channels", [2, 3])
def test_mgd_equals_loops(mask, channels):
    student, teacher = {"a": draw(3, 2, 4, 6)}, {"b": draw(3, channels, 4, 3, seed=1)}
    loss = built(MGD("a", "b", mask=mask, mask_ratio=0.4), student, teacher)
    x, y = reference_pool(student["a"].tolist(), 4, 3), teacher["b"].tolist()
    if channels != 2:
        x = reference_conv(x, loss.align)
    keep = masks(loss, batch_of(3).keys, 4 * 3 if mask == "pixels" else channels)
    for image, row in zip(x, keep, strict=True):
        for c, channel in enumerate(image):
            for i in range(4):
                for j in range(3):
                    channel[i][j] *= row[i * 3 + j if mask == "pixels" else c]
    x = reference_conv(x, loss.generate[0])
    x = [[[[max(v, 0.0) for v in row] for row in channel] for channel in image] for image in x]
    x = reference_conv(x, loss.generate[2])
    assert value(loss, student, teacher).item() == pytest.approx(reference_squares(x, y) / 3, rel=1e-9)
    assert 0 < sum(flat(keep)) < len(flat(keep))


def test_mgd_gives_no_gradient_to_what_is_masked():
    student, teacher = {"a": draw(4, 3, 5, 5).requires_grad_()}, {"b": draw(4, 3, 5, 5, seed=1)}
    loss = built(MGD("a", "b"), student, teacher)
    value(loss, student, teacher).backward()
    touched = (student["a"].grad != 0).any(1).flatten(1)
    assert touched.tolist() == [[bool(v) for v in row] for row in masks(loss, batch_of(4).keys, 25)]
    assert gradcheck(lambda x: value(loss, {"a": x}, teacher), student["a"])
    assert gradcheck(lambda x: generation_error(x, teacher["b"]), student["a"])


def test_mgd_masks_belong_to_the_images():
    """Whatever the batch or its order, an image's mask is its key's; other keys, places and taps have other masks."""
    keys = keyed.keys(1, torch.arange(2000))
    whole = kept(keys, 64, 0.3)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(keys[order], 64, 0.3), whole[order])
    assert torch.equal(torch.cat([kept(part, 64, 0.3) for part in keys.split(300)]), whole)
    assert whole.double().mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / whole.numel()))
    columns = whole.double().mean(0)
    assert (columns - 0.7).abs().max() < 5 * math.sqrt(0.21 / 2000)
    assert len({tuple(row) for row in whole.tolist()}) == 2000
    assert kept(keys, 8, 0.0).all()
    student, teacher = {"a": draw(2, 3, 4, 4)}, {"b": draw(2, 3, 4, 4, seed=1)}
    loss = built(MGD("a", "b"), student, teacher)
    first, again, other = (value(loss, student, teacher, keys=keys[i : i + 2]).item() for i in (0, 0, 2))
    assert first == again != other
    assert MGD("a", "b")._purpose != MGD("c", "b")._purpose


# CWD


def reference_channel_divergence(x, y, temperature):
    total = 0.0
    for image, other in zip(x, y, strict=True):
        for channel, target in zip(image, other, strict=True):
            logs = []
            for values in (flat(channel), flat(target)):
                top = max(values)
                norm = math.log(math.fsum(math.exp((v - top) / temperature) for v in values))
                logs.append([(v - top) / temperature - norm for v in values])
            total += math.fsum(math.exp(t) * (t - s) for s, t in zip(*logs, strict=True))
    return temperature**2 * total / (len(x) * len(x[0]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_equals_loops(temperature):
    student, teacher = 3 * draw(3, 4, 2, 5), 3 * draw(3, 4, 2, 5, seed=1)
    expected = reference_channel_divergence(student.tolist(), teacher.tolist(), temperature)
    assert channel_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-11)
    assert channel_divergence(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-13)
    shifted = student + draw(3, 4, 1, 1, seed=2)  # a softmax does not see a constant of its channel
    assert channel_divergence(shifted, teacher, temperature).item() == pytest.approx(expected, rel=1e-11)
    assert gradcheck(lambda x: channel_divergence(x, teacher, temperature), student.requires_grad_())


def test_cwd_aligns_channels_and_sizes():
    student, teacher = {"a": draw(2, 3, 6, 4)}, {"b": draw(2, 5, 3, 4, seed=1)}
    loss = built(CWD("a", "b"), student, teacher)
    x = reference_conv(reference_pool(student["a"].tolist(), 3, 4), loss.align)
    expected = reference_channel_divergence(x, teacher["b"].tolist(), 4.0)
    assert value(loss, student, teacher).item() == pytest.approx(expected, rel=1e-9)
    equal = CWD("a", "b")
    equal.setup(Setting({"a": (5, 6, 4)}, {"b": (5, 3, 4)}))
    assert not list(equal.parameters())


def test_cwd_is_finite_far_out():
    student = (draw(2, 3, 4, 4).sign() * 1e4).float().requires_grad_()
    found = channel_divergence(student, (draw(2, 3, 4, 4, seed=1).sign() * 1e4).float(), 4.0)
    found.backward()
    assert found.isfinite()
    assert found > 1e4
    assert student.grad.isfinite().all()


# ICKD


def reference_correlations(image):
    rows = [flat(channel) for channel in image]
    grams = [[math.fsum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
    lengths = [math.sqrt(math.fsum(v * v for v in row)) for row in grams]
    return [[v / length for v in row] for row, length in zip(grams, lengths, strict=True)]


def reference_ickd(x, y):
    pairs = [(reference_correlations(a), reference_correlations(b)) for a, b in zip(x, y, strict=True)]
    return math.fsum(reference_squares(a, b) for a, b in pairs) / (len(x) * len(x[0]))


def test_ickd_equals_loops():
    student, teacher = {"a": draw(3, 2, 4, 3)}, {"b": draw(3, 5, 2, 2, seed=1)}
    loss = built(ICKD("a", "b"), student, teacher)
    x = reference_norm(reference_conv(student["a"].tolist(), loss.align[0]), loss.align[1])
    expected = reference_ickd(x, teacher["b"].tolist())
    assert value(loss, student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert gradcheck(lambda z: value(loss, {"a": z}, teacher), student["a"].requires_grad_())


def test_ickd_sees_correlations_only():
    """Neither the order of the positions nor the scale of a map matters, the channels' relations do."""
    one, other = draw(3, 4, 3, 3), draw(3, 4, 3, 3, seed=1)
    expected = reference_ickd(one.tolist(), other.tolist())
    assert correlation_error(one, other).item() == pytest.approx(expected, rel=1e-11)
    assert correlation_error(5 * one.flip(2, 3), other.mT).item() == pytest.approx(expected, rel=1e-11)
    assert correlation_error(3 * one.mT, one).item() == pytest.approx(0, abs=1e-20)
    assert correlation_error(one.flip(1), one).item() > 0.1
    assert torch.allclose(channel_correlations(one).norm(dim=2), torch.ones(3, 4, dtype=torch.double))


@pytest.mark.parametrize("dead", [slice(None), slice(1, 2)], ids=["all", "one channel"])
def test_ickd_of_zeros_has_a_small_gradient(dead):
    student = draw(2, 3, 4, 4, dtype=torch.float32)
    student[:, dead] = 0
    student.requires_grad_()
    found = correlation_error(student, draw(2, 3, 4, 4, seed=1, dtype=torch.float32))
    found.backward()
    assert found.isfinite()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_ickd_of_one_image(size):
    student = {"a": draw(1, 3, *size).requires_grad_()}
    loss = built(ICKD("a", "b"), student, {"b": draw(1, 4, 2, 2)})
    value(loss, student, {"b": draw(1, 4, 2, 2)}).backward()
    assert student["a"].grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    assert loss.align[1].num_batches_tracked == (0 if size == (1, 1) else 1)


# CKA


def reference_cka(student, teacher):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with HSIC(K, L) = tr(K H L H), as the paper defines it."""

    def centered(rows):
        rows = [flat(row) for row in rows]
        n = len(rows)
        gram = [[math.fsum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
        means = [math.fsum(row) / n for row in gram]
        mean = math.fsum(means) / n
        return [[gram[i][j] - means[i] - means[j] + mean for j in range(n)] for i in range(n)]

    def inner(k, m):
        return math.fsum(a * b for a, b in zip(flat(k), flat(m), strict=True))

    k, m = centered(student.tolist()), centered(teacher.tolist())
    return inner(k, m) / math.sqrt(inner(k, k) * inner(m, m))


@pytest.mark.parametrize("shapes", [((6, 3), (6, 4)), ((4, 20), (4, 2, 3, 3)), ((9, 2), (9, 12))])
def test_cka_equals_loops(shapes):
    student, teacher = draw(*shapes[0]) + 2, draw(*shapes[1], seed=1) - 1
    expected = reference_cka(student, teacher)
    assert 0 < expected < 0.999
    assert linear_cka(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    found = value(CKA("a", "b"), {"a": student}, {"b": teacher})
    assert found.item() == pytest.approx(1 - expected, rel=1e-9)
    x, y = (f.flatten(1) - f.flatten(1).mean(0) for f in (student, teacher))
    features = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found.item() == pytest.approx(1 - features.item(), rel=1e-9)
    assert gradcheck(lambda z: linear_cka(z, teacher), student.requires_grad_())


def test_cka_does_not_change_with_rotation_scale_and_shift():
    student, teacher = draw(8, 5), draw(8, 3, seed=1)
    rotation = torch.linalg.qr(draw(5, 5, seed=2)).Q
    expected = linear_cka(student, teacher).item()
    moved = -7 * student @ rotation + draw(5, seed=3)
    assert linear_cka(moved, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert linear_cka(moved, student).item() == pytest.approx(1, rel=1e-12)
    assert linear_cka(student @ draw(5, 5, seed=4), student).item() < 0.99
    tiny = (1e-15 * student).float(), (1e15 * teacher).float()
    assert linear_cka(*tiny).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("filling", [0.0, 0.3, 1e4])
def test_cka_of_a_constant_feature_is_zero_with_no_gradient(filling):
    student = torch.full((7, 6), filling).requires_grad_()
    found = value(CKA("a", "b"), {"a": student}, {"b": draw(7, 4, dtype=torch.float32)})
    found.backward()
    assert found.item() == 1
    assert (student.grad == 0).all()


def test_cka_of_few_images():
    for size in (1, 2):
        student = draw(size, 4, dtype=torch.float32).requires_grad_()
        found = value(CKA("a", "b"), {"a": student}, {"b": draw(size, 3, seed=1, dtype=torch.float32)})
        found.backward()
        assert found.item() == pytest.approx(0, abs=1e-6)
        assert student.grad.abs().max() < 1e-5
    alone = draw(1, 4)
    assert value(CKA("a", "b"), {"a": alone}, {"b": alone}).item() == 0


# SimKD


@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((4, 6), (4, 3)), ((2, 3), (5, 6))])
def test_simkd_equals_loops(sizes):
    student, teacher = {"projector": draw(3, 2, *sizes[0])}, {"b": draw(3, 2, *sizes[1], seed=1)}
    loss = built(SimKD("projector", "b"), student, teacher)
    height, width = map(min, *sizes)
    pooled = (reference_pool(f.tolist(), height, width) for f in (student["projector"], teacher["b"]))
    assert value(loss, student, teacher).item() == pytest.approx(reference_mse(*pooled), rel=1e-11)
    assert value(loss, {"projector": teacher["b"]}, teacher).item() == 0
    assert gradcheck(lambda x: value(loss, {"projector": x}, teacher), student["projector"].requires_grad_())
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "words"),
    [
        (MGD, (4,), (4, 2, 2), "tap maps"),
        (CWD, (4, 2, 2), (4,), "tap maps"),
        (CWD, (4, 1, 1), (4, 8, 8), "a softmax over one position"),
        (CWD, (4, 1, 8), (4, 8, 1), "a softmax over one position"),
        (ICKD, (4,), (4,), "tap maps"),
        (SimKD, (4, 2, 2), (8, 2, 2), "as many channels"),
        (SimKD, (4,), (4,), "as many channels"),
    ],
)
def test_shapes_that_do_not_suit_are_refused(loss, student, teacher, words):
    shown = "x".join(map(str, student))
    with pytest.raises(ValueError, match=f"{loss.__name__}: the student's a is {shown} .*{words}"):
        loss("a", "b").setup(Setting({"a": student}, {"b": teacher}))


@pytest.mark.parametrize(
    ("loss", "arguments", "words"),
    [
        (MGD, {"mask_ratio": 1.0}, "mask_ratio 1.0 must be in"),
        (MGD, {"mask_ratio": -0.1}, "mask_ratio -0.1 must be in"),
        (MGD, {"mask": "rows"}, "mask 'rows' must be pixels or channels"),
        (CWD, {"temperature": 0.0}, "temperature 0.0 must be"),
        (CWD, {"temperature": math.inf}, "temperature inf must be"),
    ],
)
def test_bad_values_are_named(loss, arguments, words):
    with pytest.raises(ValueError, match=f"{loss.__name__}: {words}"):
        loss("a", "b", **arguments)
