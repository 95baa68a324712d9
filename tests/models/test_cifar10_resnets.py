"""He et al.'s networks for CIFAR-10: sizes, the shortcut without parameters, and the public weights' accuracy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import SHARED

from kd.data import load_data
from kd.measure import cost, metrics
from kd.measure.predict import predict
from kd.models import View, build_classifier, build_network, state_hash
from kd.models.cifar10_resnets import CIFAR10_RESNETS
from kd.models.cut import last_map
from kd.models.fold import folded
from kd.models.taps import tap_shapes
from kd.run.config import DataConfig

CLASSES = [str(i) for i in range(10)]
# parameters, and the accuracy in percent that is published with the weights
KNOWN = {20: (269_722, 91.73), 32: (464_154, 92.63), 44: (658_586, 93.10), 56: (853_018, 93.39)}


@pytest.mark.parametrize("depth", KNOWN)
def test_sizes_and_maps(depth):
    network = build_network(f"cifar10_resnet{depth}", 10)
    assert cost.num_params(network) == KNOWN[depth][0]
    shapes = tap_shapes(network, (3, 32, 32))
    assert [shapes[f"layer{number}"] for number in (1, 2, 3)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert last_map(network) == "layer3"
    assert len(CIFAR10_RESNETS) == len(KNOWN)


@torch.no_grad()
def test_a_shortcut_takes_every_second_pixel_and_adds_zeros_on_both_sides():
    block = build_network("cifar10_resnet20", 10).eval().layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    images = torch.rand(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, 8:24, row, column] = images[:, :, 2 * row, 2 * column]
    assert torch.equal(block(images), expected)


@torch.no_grad()
def test_batch_norms_fold_and_weights_of_a_file_are_read(tmp_path):
    torch.manual_seed(0)
    network = build_network("cifar10_resnet20", 10)
    network(torch.randn(8, 3, 32, 32))  # statistics other than 0 and 1
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    same = build_classifier("cifar10_resnet20", CLASSES, View(), weights=str(tmp_path / "weights.pth")).eval()
    assert state_hash(same.network) == state_hash(network.eval())
    small = folded(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in small.modules())
    assert torch.allclose(small(same.preprocess(images)), same(images), atol=1e-4)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs the public weights in ../shared/weights")
@pytest.mark.parametrize("depth", KNOWN)
def test_the_public_weights_have_the_published_accuracy(depth):
    data = load_data(DataConfig(source=str(SHARED / "data/cifar10"), val_fraction=0))
    view = View(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    weights = str(SHARED / f"weights/cifar10_resnet{depth}.safetensors")
    classifier = build_classifier(f"cifar10_resnet{depth}", data.classes, view, weights=weights)
    whole = depth == 20  # it takes half a minute; of the others two thousand images, of which 2 points are 3.5 errors
    test = data.test if whole else replace(data.test, places=data.test.places[:2000])
    logits, labels = predict(classifier, test, 500, Accelerator(cpu=True))
    assert metrics.accuracy(logits, labels) == pytest.approx(KNOWN[depth][1], abs=0.005 if whole else 2)
