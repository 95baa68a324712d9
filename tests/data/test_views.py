"""Random views: each image's is that of PIL or torchvision at its own draw, whatever the batch, and keyed by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_one_line
from PIL import Image
from test_data import batches, make_split, noise, smooth, tensors
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop, TrivialAugmentWide
from torchvision.transforms import functional as reference

from kd import keyed
from kd.data import TrainBatches, Views
from kd.data.views import colour, crop, mixes, rand, trivial
from kd.losses import LOSSES

pytestmark = pytest.mark.first_tier(2)

CPU = torch.device("cpu")
COUNT = 60
EVERY = Views(
    flip=True,
    random_resized_crop=0.08,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    trivial_augment=True,
    random_erasing=0.5,
    mixup=0.4,
    cutmix=1.0,
    colour=(0.5, 0.4, 0.3),
)


def photos(count: int = COUNT, height: int = 21, width: int = 17) -> torch.Tensor:
    """Pictures with slow and sharp parts, some noisy, some of few levels; uint8 (B, 3, H, W)."""
    base = torch.from_numpy(smooth(height, width)).permute(2, 0, 1).int()
    grain = torch.from_numpy(noise(count, 3, height, width)).int()
    scale = torch.arange(count).view(-1, 1, 1, 1) % 5
    images = (base.roll(3, 2) + (grain - 128) * scale // 8).clamp(0, 255)
    images[::7] = images[::7] // 64 * 40 + 30
    return images.to(torch.uint8)


def keys(count: int = COUNT, seed: int = 4) -> torch.Tensor:
    return keyed.keys(keyed.key(seed), torch.arange(count))


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(images: torch.Tensor, expected: list[torch.Tensor]) -> torch.Tensor:
    return (images.int() - torch.stack(expected).int()).abs()


# Crops


def test_a_resized_crop_is_that_of_torchvision():
    images, rectangles = photos(), crop.draw_crops(keys(), (21, 17), 0.08)
    expected = [
        reference.resized_crop(image, *box, [21, 17], InterpolationMode.BILINEAR, antialias=True)
        for image, box in zip(images, rectangles.tolist(), strict=True)
    ]
    apart = difference(crop.resized_crop(images, rectangles), expected)
    assert apart.max() <= 1
    assert apart.float().mean() < 0.1
    by_pil = [
        pixels(picture(image).resize((17, 21), Image.Resampling.BILINEAR, (x, y, x + w, y + h)))
        for image, (y, x, h, w) in zip(images, rectangles.tolist(), strict=True)
    ]
    assert difference(crop.resized_crop(images, rectangles), by_pil).float().mean() < 1


def test_a_crop_of_everything_changes_nothing():
    images = photos()
    assert torch.equal(crop.resized_crop(images, torch.tensor([[0, 0, 21, 17]]).expand(COUNT, -1)), images)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_crops_are_distributed_as_torchvisions(size):
    drawn = crop.draw_crops(keys(3000), size, 0.08).double()
    torch.manual_seed(0)
    blank = torch.zeros(3, *size)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    for mine, other in ((drawn, theirs.double()),):
        assert torch.allclose(mine.mean(0), other.mean(0), atol=0.04 * max(size))
        assert torch.allclose(mine.std(0), other.std(0), atol=0.04 * max(size))
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= torch.tensor(size)).all()
    assert drawn[:, 2:].min() >= 1


def test_a_shape_that_never_fits_gives_the_largest_crop_in_the_middle():
    assert crop.draw_crops(keys(5), (4, 40), 0.9).tolist() == [[0, 17, 4, 5]] * 5  # as torchvision's fallback
    assert RandomResizedCrop.get_params(torch.zeros(3, 4, 40), [0.9, 1.0], [3 / 4, 4 / 3])[2:] == (4, 5)


def test_erasing_fills_a_rectangle_as_torchvision_draws_it():
    drawn = crop.draw_erased(keys(4000), (32, 32), 0.25)
    some = drawn[drawn[:, 2] > 0]
    assert len(some) / 4000 == pytest.approx(0.25, abs=0.03)
    torch.manual_seed(0)
    blank = torch.zeros(3, 32, 32)
    theirs = torch.tensor([RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(1000)])
    assert torch.allclose(some.double().mean(0), theirs.double().mean(0), atol=1.0)
    assert torch.allclose(some.double().std(0), theirs.double().std(0), atol=1.0)
    images, rectangles = photos(), crop.draw_erased(keys(), (21, 17), 0.7)
    expected = [
        reference.erase(image, *box, torch.tensor([1, 2, 3]).view(3, 1, 1).to(torch.uint8)) if box[2] else image
        for image, box in zip(images, rectangles.tolist(), strict=True)
    ]
    assert torch.equal(crop.erase(images, rectangles, (1, 2, 3)), torch.stack(expected))


# Colours

ENHANCERS = {
    colour.brightness: reference.adjust_brightness,
    colour.contrast: reference.adjust_contrast,
    colour.saturation: reference.adjust_saturation,
    colour.sharpness: reference.adjust_sharpness,
}


@pytest.mark.parametrize("operation", ENHANCERS, ids=lambda function: function.__name__)
def test_enhancements_are_those_of_pil(operation):
    images, factors = photos(), torch.linspace(0, 2, COUNT)
    expected = [
        pixels(ENHANCERS[operation](picture(image), factor))
        for image, factor in zip(images, factors.tolist(), strict=True)
    ]
    apart = difference(operation(images, factors), expected)
    assert apart.max() <= 1
    assert apart.float().mean() < 0.05
    assert torch.equal(operation(images, torch.ones(COUNT)), images)


def test_hue_is_that_of_torchvision():
    images, shifts = photos(), torch.linspace(-0.5, 0.5, COUNT)
    expected = [reference.adjust_hue(image, shift) for image, shift in zip(images, shifts.tolist(), strict=True)]
    apart = difference(colour.hue(images, shifts), expected)
    assert apart.max() <= 2
    assert apart.float().mean() < 0.5  # torchvision rounds down where this rounds
    assert torch.equal(colour.hue(images, torch.zeros(COUNT)), images)


def test_colour_jitter_is_a_loop_over_images():
    images, strengths = photos(), (0.4, 0.5, 0.6, 0.2)
    factors, order = colour.draw_jitter(keys(), strengths)
    apply = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    expected = []
    for image, factor, sequence in zip(images, factors.tolist(), order.tolist(), strict=True):
        for number in sequence:
            image = apply[number](image, factor[number])
        expected.append(image)
    apart = difference(colour.color_jitter(images, factors, order), expected)
    assert apart.float().mean() < 1
    assert apart.float().quantile(0.999) <= 5  # a level of saturation is several of hue
    low = torch.tensor([0.6, 0.5, 0.4, -0.2])
    assert (factors >= low).all()
    assert (factors <= torch.tensor([1.4, 1.5, 1.6, 0.2])).all()
    many, orders = colour.draw_jitter(keys(4800), strengths)
    assert torch.allclose(many.mean(0).float(), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=0.02)
    assert len(orders.unique(dim=0)) == 24


def test_a_factor_is_never_below_zero():
    assert colour.draw_jitter(keys(500), (3.0, 0, 0, 0))[0][:, 0].min() >= 0


# TrivialAugment


def by_torchvision(name: str, image: torch.Tensor, amount: float) -> torch.Tensor:
    """What torchvision's TrivialAugmentWide does to a PIL image."""
    from torchvision.transforms.autoaugment import _apply_op

    return pixels(_apply_op(picture(image), name, amount, InterpolationMode.NEAREST, None))


NAMES = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
         "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_that_of_torchvision_at_every_strength(name):
    place = NAMES.index(name)
    operation, strengths, signed, base = trivial._SPACE[place]
    amounts = torch.cat([base + strengths, base - strengths if signed else base + strengths])[:COUNT]
    images = photos()
    asked = amounts - base if name in NAMES[6:10] else amounts  # torchvision adds the 1 itself
    if name == "Posterize":
        asked = asked.int()
    expected = [by_torchvision(name, image, amount) for image, amount in zip(images, asked.tolist(), strict=True)]
    apart = difference(operation(images, amounts), expected)
    if name in ("ShearX", "ShearY", "Rotate"):  # a pixel on the border between two is one or the other
        assert (apart > 0).float().mean() < 0.001
    else:
        assert apart.max() <= (1 if name in NAMES[6:10] + ("AutoContrast",) else 0)


def test_the_space_is_that_of_torchvision():
    theirs = TrivialAugmentWide()._augmentation_space(31)
    for name, (operation, strengths, signed, base) in zip(NAMES, trivial._SPACE, strict=True):
        magnitudes, their_sign = theirs[name]
        assert their_sign == signed, operation
        if magnitudes.ndim:
            assert torch.allclose(strengths.float(), magnitudes.float(), atol=1e-5)
        assert base == (1 if name in NAMES[6:10] else 0)
    which, amounts = trivial.draw_trivial(keys(6200))
    assert (abs(torch.bincount(which, minlength=14) / 6200 - 1 / 14) < 0.01).all()
    assert len(amounts[:, 1].unique()) == 61
    assert abs(amounts[:, 1].mean()) < 0.02


def test_each_image_has_its_own_operation():
    images = photos()
    which, amounts = trivial.draw_trivial(keys())
    done = trivial.trivial_augment(images, which, amounts)
    for i in range(COUNT):
        number = int(which[i])
        alone = trivial.OPERATIONS[number](images[i : i + 1], amounts[i : i + 1, number])
        assert torch.equal(done[i : i + 1], alone)


# RandAugment

# timm's operations in the order of `rand.OPERATIONS`, and its amount at level m of 10, as its auto_augment.py has them:
# for a string without inc1, and with it; the sign is drawn
RAND = {
    "AutoContrast": (lambda m: 0, None),
    "Equalize": (lambda m: 0, None),
    "Invert": (lambda m: 0, None),
    "Rotate": (lambda m: m / 10 * 30, None),
    "Posterize": (lambda m: int(m / 10 * 4), lambda m: 4 - int(m / 10 * 4)),
    "Solarize": (lambda m: int(m / 10 * 256), lambda m: 256 - int(m / 10 * 256)),
    "SolarizeAdd": (lambda m: int(m / 10 * 110), None),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (lambda m: m / 10 * 1.8 + 0.1, "signed")),
    "ShearX": (lambda m: m / 10 * 0.3, None),
    "ShearY": (lambda m: m / 10 * 0.3, None),
    "TranslateXRel": (lambda m: m / 10 * 0.45 * 17, None),
    "TranslateYRel": (lambda m: m / 10 * 0.45 * 21, None),
}
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.mark.parametrize("inc", [0, 1])
@pytest.mark.parametrize("m", [0, 5, 9, 10])
def test_rand_augment_has_the_amounts_of_timm(m, inc):
    ((_which, amounts),) = rand.RandAugment.of(f"rand-m{m}-n1-inc{inc}").draw(keys(), (21, 17))
    assert amounts.shape == (COUNT, len(RAND))
    for (name, (plain, increasing)), column in zip(RAND.items(), amounts.T, strict=True):
        found = {round(value, 6) for value in column.tolist()}
        if inc and increasing == "signed":
            expected = {round(max(0.1, 1 + sign * m / 10 * 0.9), 6) for sign in (1, -1)}
        else:
            amount = (increasing if inc and increasing else plain)(m)
            expected = {round(sign * amount, 6) for sign in ((1, -1) if name in SIGNED else (1,))}
        assert found == expected, name


def test_rand_augments_own_operations_are_those_of_pil():
    images, amounts = photos(), torch.arange(COUNT, dtype=torch.double) * 110 // COUNT
    assert torch.equal(rand.invert(images, amounts), torch.stack([reference.invert(image) for image in images]))
    expected = [  # timm's table: values below 128 get the amount, up to 255
        pixels(picture(image).point([min(255, value + int(add)) if value < 128 else value for value in range(256)] * 3))
        for image, add in zip(images, amounts.tolist(), strict=True)
    ]
    assert torch.equal(rand.solarize_add(images, amounts), torch.stack(expected))
    assert (rand.OPERATIONS[4](images, torch.zeros(COUNT)) == 0).all()  # posterize to no bit at all, as timm at m0


def test_rand_augment_draws_each_operation_for_itself_and_applies_half_of_them():
    drawn = list(rand.RandAugment.of("rand-m5-n3-mstd1.5-inc1").draw(keys(6000), (32, 32)))
    assert len(drawn) == 3
    for which, amounts in drawn:
        assert (which < 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
        shares = torch.bincount(which[which >= 0], minlength=15) / 6000
        assert (abs(shares - 1 / 30) < 0.01).all()
        strength = amounts[:, 3].abs() / 3  # of rotate, whose sign is drawn
        assert strength.mean().item() == pytest.approx(5, abs=0.1)
        assert strength.std().item() == pytest.approx(1.5, abs=0.1)
        assert abs(amounts[:, 3].sign().mean().item()) < 0.05
    (one, first), (other, second), _ = drawn
    assert (one == other).float().mean() < 0.35
    assert not torch.equal(first, second)
    for text, low, high in (("rand-m8-n1-mstd101", 0, 8), ("rand-n1-mstd4", 0, 10)):
        ((_which, amounts),) = rand.RandAugment.of(text).draw(keys(6000), (32, 32))
        strength = amounts[:, 3].abs() / 3
        assert strength.min() >= low
        assert strength.max() <= high + 1e-9
    assert (strength == 10).float().mean().item() == pytest.approx(0.5, abs=0.03)  # what is above is cut


def test_rand_augment_is_a_loop_over_images_and_operations():
    images, text = photos(), "rand-m9-n2-mstd0.5-inc1"
    done, expected = Views(rand_augment=text).apply(images, keys()), images.clone()
    for which, amounts in rand.RandAugment.of(text).draw(keys(), (21, 17)):
        for i, number in enumerate(which.tolist()):
            if number >= 0:
                expected[i : i + 1] = rand.OPERATIONS[number](expected[i : i + 1], amounts[i : i + 1, number])
    assert torch.equal(done, expected)
    assert Views(rand_augment=text).identity() != Views(rand_augment="rand-m9").identity() != Views().identity()


def test_rand_augment_is_frozen():
    """A change here changes the views of every run that has it."""
    shown = Views(rand_augment="rand-m9-mstd0.5-inc1").apply(photos(8), keys(8))
    assert shown.long().sum((1, 2, 3)).tolist() == FROZEN_RAND


FROZEN_RAND = [79540, 78515, 87748, 142367, 146607, 45312, 80504, 84910]


@pytest.mark.parametrize(
    "text", ["", "rand-m9-w0", "rand-m11", "rand-m9-m8", "auto-m9", "rand-n0", "rand-inc2", "rand-m9.5"]
)
def test_a_string_that_is_none_of_timms_is_one_line(call, text):
    result = call("train_teacher", f"--data.rand_augment={text}")
    assert_one_line(result, f"data.rand_augment '{text}'", "such as rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_and_grey_images_are_taken(size, channels):
    images = torch.from_numpy(noise(COUNT, channels, *size))
    for views in (Views(rand_augment="rand-n9-mstd101"), Views(rand_augment="rand-n9-mstd101-inc1")):
        assert views.apply(images, keys()).shape == images.shape
    shown = Views(True, 0, 0.2, (0.4, 0.4, 0.4, 0.1), True, 0.5, colour=(0.5,) * 3).apply(images, keys())
    assert shown.shape == images.shape
    assert shown.dtype == torch.uint8


# Mixed images


def test_mixed_images_and_labels_are_the_papers_formulas():
    images, others = photos(), photos().flip(0)
    shares, rectangles = mixes.draw_mixes(keys(), (21, 17), 0.4, 1.0)
    mixed = mixes.mix(images, others, shares, rectangles)
    kinds = set()
    for i, (share, (top, left, height, width)) in enumerate(zip(shares.tolist(), rectangles.tolist(), strict=True)):
        if height and width:
            expected = images[i].clone()
            expected[:, top : top + height, left : left + width] = others[i][:, top : top + height, left : left + width]
            assert share == pytest.approx(1 - height * width / (21 * 17))
            assert torch.equal(mixed[i], expected)
        else:
            expected = share * images[i].double() + (1 - share) * others[i].double()
            assert (mixed[i].double() - expected).abs().max() <= 0.51
        kinds.add(bool(height and width))
    assert kinds == {True, False}
    labels, theirs = torch.arange(COUNT) % 4, torch.arange(COUNT) % 3
    soft = mixes.mixed_labels(labels, theirs, shares, 4)
    assert soft.dtype == torch.float32
    for row, share, one, other in zip(soft, shares.tolist(), labels.tolist(), theirs.tolist(), strict=True):
        expected = torch.zeros(4)
        expected[one] += share
        expected[other] += 1 - share
        assert torch.allclose(row, expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.5)])
def test_shares_are_of_the_beta_distribution(mixup, cutmix):
    shares, rectangles = mixes.draw_mixes(keys(20_000), (1000, 1000), mixup, cutmix)
    alpha = mixup or cutmix
    if mixup:
        assert not rectangles.any()
        assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    else:
        inner = rectangles[(rectangles[:, :2] > 0).all(1) & (rectangles.sum(1) > 0)]
        assert (rectangles[:, :2] >= 0).all()
        assert (rectangles[:, :2] + rectangles[:, 2:] <= 1000).all()
        assert len(inner) > 1000
        assert shares.min() >= 0


def test_cross_entropy_takes_mixed_labels_as_the_mixture_of_two():
    torch.manual_seed(0)
    logits, one, other = torch.randn(8, 5), torch.arange(8) % 5, (torch.arange(8) * 3) % 5
    shares = torch.rand(8, dtype=torch.double)
    soft = mixes.mixed_labels(one, other, shares, 5)
    for smoothing in (0.0, 0.1):
        loss = LOSSES["CrossEntropy"](label_smoothing=smoothing)
        from kd.outputs import Batch, Outputs

        value = loss(Outputs(logits), None, Batch({}, soft, one))
        log = [
            torch.nn.functional.cross_entropy(logits, part, label_smoothing=smoothing, reduction="none")
            for part in (one, other)
        ]
        assert value.item() == pytest.approx((shares * log[0] + (1 - shares) * log[1]).mean().item(), rel=1e-6)


def test_losses_that_read_labels_say_which_labels_they_take():
    """Every loss that reads labels either takes shares of classes or says that it needs one class per image."""
    import inspect

    reading = {name for name, loss in LOSSES.items() if "batch.labels" in inspect.getsource(loss)}
    assert {name for name in reading if not LOSSES[name].hard_labels} == {"CrossEntropy", "DoubleSoftmax"}
    assert {name for name, loss in LOSSES.items() if loss.hard_labels} == reading - {"CrossEntropy", "DoubleSoftmax"}


# Keys


def test_views_do_not_depend_on_the_batch():
    images, drawn = photos(), keys()
    whole = EVERY.apply(images, drawn)
    some = torch.tensor([50, 3, 3, 17])
    assert torch.equal(EVERY.apply(images[some], drawn[some]), whole[some])
    for i in range(0, COUNT, 9):
        assert torch.equal(EVERY.apply(images[i : i + 1], drawn[i : i + 1])[0], whole[i])


def test_views_are_frozen():
    """A change here changes the views of every run."""
    images = photos(8)
    shown = EVERY.apply(images, keys(8))
    mixed, shares = EVERY.mix(shown, shown.flip(0), keys(8))
    assert shown.long().sum((1, 2, 3)).tolist() == FROZEN_SHOWN
    assert mixed.long().sum((1, 2, 3)).tolist() == FROZEN_MIXED
    assert (shares * 1000).round().int().tolist() == FROZEN_SHARES


FROZEN_SHOWN = [124217, 162528, 80221, 143556, 139420, 162299, 144345, 136650]
FROZEN_MIXED = [132769, 148217, 130382, 136283, 143460, 80221, 142837, 135715]
FROZEN_SHARES = [697, 214, 389, 882, 25, 1, 983, 925]


def mixed_batches(views: Views, rank: int = 0, world: int = 1, accumulate: int = 1, seed: int = 5) -> TrainBatches:
    return TrainBatches(make_split(26), 12, seed, rank, world, views, accumulate, num_classes=4)


@pytest.mark.parametrize(
    "views",
    [
        EVERY,
        Views(True, 2, views_per_image=3),
        Views(mixup=1.0, views_per_image=2),
        Views(rand_augment="rand-m9-mstd1"),
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_and_micro_batches_see_the_same_views(views, world):
    for step in (0, 2, 4):
        whole, _ = mixed_batches(views).read(step, CPU)
        parts = []
        for rank in range(world):
            source = mixed_batches(views, rank, world, accumulate=2)
            parts += [source.read(step, CPU, micro) for micro in range(source.num_micro(step))]
        for name, expected in tensors(whole).items():
            together = torch.cat([tensors(part)[name] for part, weight in parts if weight])
            assert torch.equal(together, expected)


def test_mixed_images_and_labels_are_of_the_same_partner():
    source = mixed_batches(Views(cutmix=1.0))
    batch, _ = source.read(0, CPU)
    plain, _ = batches(source.split, view=False).read(0, CPU)
    assert torch.equal(batch.index, plain.index)
    for image, label, own in zip(batch.inputs["image"], batch.labels, plain.inputs["image"], strict=True):
        share = (image == own).all(0).float().mean().item()
        classes = label.nonzero()[:, 0].tolist()
        assert label.sum().item() == pytest.approx(1)
        assert len(classes) <= 2
        assert label.max().item() >= share - 1e-6 or share == pytest.approx(1 - label.max().item(), abs=0.05)


def test_so_many_views_an_image_come_in_turn_and_are_those_of_every_seed():
    views, images = Views(random_resized_crop=0.08, views_per_image=4, split_seed=7), photos(10)
    assert views.count == 4
    shown: dict[tuple[int, int], torch.Tensor] = {}
    for seed in (0, 1):
        seen = []
        for epoch in range(8):
            drawn, numbers = views.draw(seed, epoch, torch.arange(10))
            seen.append(numbers)
            for i, (number, image) in enumerate(zip(numbers.tolist(), views.apply(images, drawn), strict=True)):
                assert torch.equal(shown.setdefault((i, number), image), image)
        assert torch.equal(torch.stack(seen[:4]).sort(0).values, torch.arange(4)[:, None].expand(-1, 10))
        assert torch.equal(seen[0], seen[4])
    assert len(shown) == 40
    assert len({image.numpy().tobytes() for image in shown.values()}) > 30
    assert not torch.equal(views.draw(0, 0, torch.arange(10))[1], views.draw(1, 0, torch.arange(10))[1])


# Runs


@pytest.mark.parametrize("loss", ["DKD", "NKD", "CRD"])
def test_a_loss_of_one_class_an_image_refuses_mixed_images(call, loss):
    arguments = {"student_tap": "a", "teacher_tap": "b"} if loss == "CRD" else {}
    losses = [{"class_path": loss, "init_args": arguments}]
    result = call("distill", "--teacher", "x", "--data.cutmix", 1, "--losses", str(losses))
    assert_one_line(result, "data.cutmix", loss, "needs one class per image")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.pad_crop", 4, "--data.random_resized_crop", 0.2), ("pad_crop", "random_resized_crop")),
        (("--data.color_jitter", "[0.4, 0.4]"), ("color_jitter", "four numbers")),
        (("--data.color_jitter", "[0, 0, 0, 0.6]"), ("color_jitter", "0.5")),
        (("--data.random_erasing", 1.5), ("random_erasing 1.5", "at most 1")),
        (("--data.mixup", -1), ("mixup -1", "at least 0")),
        (("--data.views_per_image", 3), ("views_per_image 3", "no view is random")),
        (("--data.rand_augment", "rand-m9", "--data.trivial_augment"), ("trivial_augment and data.rand_augment",)),
    ],
)
def test_impossible_views_are_one_line(call, arguments, words):
    assert_one_line(call("train_teacher", *arguments), *words)


@pytest.mark.slow
def test_a_run_with_every_view_says_them_and_ends(call, tmp_path):
    views = ("--data.flip", "true", "--data.random_resized_crop", 0.3, "--data.color_jitter", "[0.4, 0.4, 0.4, 0.1]",
             "--data.trivial_augment", "true", "--data.random_erasing", 0.25, "--data.mixup", 0.2, "--data.cutmix",
             1.0)  # fmt: skip
    result = call("train_teacher", *SMALL, *views, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert (
        "views: random crops of 30% to 100 % of the area, resized, flips left-right, colour jitter 0.4/0.4/0.4/0.1, "
        "TrivialAugment, a rectangle erased in 25% of the images, mixup (alpha 0.2), CutMix (alpha 1)" in result.out
    )
    assert math.isfinite(float(result.out.split("loss ")[-1].split()[0]))
