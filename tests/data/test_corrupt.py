"""Corrupted images: what each corruption does, by loops over pixels, and that an image's place alone decides."""

from __future__ import annotations

import colorsys
import io
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from kd import keyed
from kd.data import load_data
from kd.data.corrupt import SEVERITIES, STRENGTHS, CorruptedSplit, corrupt
from kd.run.config import DataConfig, EvaluateConfig


@pytest.fixture
def images():
    """Smooth coloured pictures, so that neighbours are alike as in photos: uint8 (6, 3, 40, 32)."""
    torch.manual_seed(0)
    small = torch.rand(6, 3, 5, 4)
    return (255 * torch.nn.functional.interpolate(small, size=(40, 32), mode="bilinear")).round().to(torch.uint8)


INDEX = torch.arange(6) * 7


def test_the_flag_names_all_corruptions():
    names, _ = get_args(get_type_hints(EvaluateConfig)["corruption"])
    assert set(get_args(names)) == {*STRENGTHS, "all"}
    for name in STRENGTHS:
        EvaluateConfig(corruption=name, severity=1)


@pytest.mark.parametrize("name", STRENGTHS)
def test_an_image_is_the_same_alone_and_in_a_batch_and_worse_with_severity(images, name):
    differences = []
    for severity in SEVERITIES:
        worse = corrupt(images, INDEX, name, severity)
        assert worse.dtype == torch.uint8
        assert worse.shape == images.shape
        assert corrupt(images[4:5], INDEX[4:5], name, severity).equal(worse[4:5])
        differences.append((worse.double() - images.double()).abs().mean().item())
    assert differences[0] > 0
    assert differences == sorted(differences)
    grey = images[:, :1]
    assert corrupt(grey, INDEX, name, 3).shape == grey.shape


def test_noise_is_normal_a_function_of_the_place_and_the_same_at_each_severity():
    grey = torch.full((4, 3, 50, 50), 128, dtype=torch.uint8)
    index = torch.tensor([0, 1, 2, 1])
    noise = (corrupt(grey, index, "gaussian_noise", 5).double() - 128) / 255
    assert noise[1].equal(noise[3])
    assert not noise[0].equal(noise[1])
    assert noise.std().item() == pytest.approx(0.10, rel=0.02)
    weaker = (corrupt(grey, index, "gaussian_noise", 1).double() - 128) / 255
    assert torch.corrcoef(torch.stack([noise.flatten(), weaker.flatten()]))[0, 1] > 0.99
    black = corrupt(torch.zeros(1, 1, 50, 50, dtype=torch.uint8), index[:1], "gaussian_noise", 5)
    assert 0.4 < (black == 0).double().mean() < 0.6


def test_keyed_draws_are_normal():
    draws = keyed.normal(keyed.keys(keyed.key(9), torch.arange(100_000)))
    assert stats.kstest(draws.numpy(), "norm").pvalue > 0.01
    assert draws.abs().max() < 6.8
    again = keyed.normal(keyed.keys(keyed.key(9), torch.tensor([5, 99_999])))
    assert again.tolist() == draws[[5, 99_999]].tolist()


@pytest.mark.parametrize("severity", [1, 5])
def test_blur_is_scipys_gaussian_that_grows_with_the_image(images, severity):
    for batch, scale in ((images, 1.0), (images.repeat(1, 1, 2, 2), 2.0), (images[:, :, :8, :8], 1.0)):
        sigma = STRENGTHS["blur"][severity - 1] * scale
        expected = ndimage.gaussian_filter(batch[0, 1].double().numpy(), sigma, mode="nearest", truncate=4.0)
        result = corrupt(batch, INDEX, "blur", severity)[0, 1].numpy()
        assert np.abs(result - expected).max() <= 0.5 + 1e-9


def test_brightness_adds_to_the_value_of_hsv(images):
    result = corrupt(images, INDEX, "brightness", 4)
    dark = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert corrupt(dark, INDEX[:1], "brightness", 4).eq(51).all()
    for y in range(0, 40, 7):
        for x in range(0, 32, 5):
            h, s, v = colorsys.rgb_to_hsv(*(images[2, :, y, x].double() / 255).tolist())
            expected = colorsys.hsv_to_rgb(h, s, min(1, v + 0.2))
            assert result[2, :, y, x].tolist() == pytest.approx([255 * value for value in expected], abs=0.5 + 1e-6)


def test_contrast_shrinks_towards_each_channels_mean(images):
    result = corrupt(images, INDEX, "contrast", 5)
    for c in range(3):
        pixels = images[3, c].double().flatten().tolist()
        mean = math.fsum(pixels) / len(pixels)
        expected = [mean + 0.15 * (pixel - mean) for pixel in pixels]
        assert result[3, c].flatten().tolist() == pytest.approx(expected, abs=0.5 + 1e-6)


def test_jpeg_is_that_of_a_file(images):
    file = io.BytesIO()
    Image.fromarray(images[5].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=58)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert corrupt(images, INDEX, "jpeg", 3)[5].equal(expected)


def test_a_corrupted_split_reads_its_own_images_and_leaves_the_store():
    split = load_data(DataConfig()).test
    before = split.store.images.copy()
    worse = CorruptedSplit(split.store, split.places, "gaussian_noise", 2)
    columns, labels, index = worse.read(np.array([3, 9]), torch.device("cpu"))
    clean, same, places = split.read(np.array([3, 9]), torch.device("cpu"))
    images, clean = columns["image"], clean["image"]
    assert labels.equal(same)
    assert index.equal(places)
    assert images.equal(corrupt(clean, places, "gaussian_noise", 2))
    assert not images.equal(clean)
    assert len(worse) == len(split)
    assert np.array_equal(before, split.store.images)
