"""Batch norm folded into convolutions: the same logits and taps, untouched weights and keys, nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.models import View, build_classifier, build_network, state_hash
from kd.models.cifar import CIFAR_NETS
from kd.models.fold import folded
from kd.models.small import SMALL_NETS
from kd.teachers import Teachers

CLASSES = ["a", "b", "c"]
# One of each way to be folded first: these are the first tier's.
NETWORKS = ["resnet8", "wrn_16_1", "shufflenet_v2_x0_5", *SMALL_NETS, *CIFAR_NETS, "resnet18", "mobilenet_v3_small"]
NETWORKS += ["squeezenet1_1", "vgg11_bn", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5"]
NETWORKS += ["regnet_y_400mf", "resnext50_32x4d", "swin_t", "vit_b_32", "convnext_tiny"]


def trained(network: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights as of a trained network, none of them 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.first_tier(3)
@pytest.mark.parametrize("name", dict.fromkeys(NETWORKS))
@torch.no_grad()
def test_a_folded_network_gives_the_same_logits_and_leaves_the_first_one_alone(name):
    torch.manual_seed(0)
    network = trained(build_network(name, 3))
    before, count = state_hash(network), norms(network)
    side = getattr(network, "image_size", 32 if name in CIFAR_NETS else 96)
    side = side if isinstance(side, int) and name not in ("vit_b_32", "inception_v3") else 224
    images = torch.randn(2, 3, side, side)
    wanted = network(images)
    network.double()
    exact = network(images.double())
    network.float()
    copied = folded(network)
    got = copied(images)
    # as near to float64's answer as the network itself, up to a factor: rounding, and nothing else
    error, own = ((value - exact).abs().max() for value in (got, wanted))
    assert error <= 10 * own + 1e-6 * exact.abs().max()
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert state_hash(network) == before
    if name.startswith(
        ("resnet", "vgg8", "vgg13", "vgg11", "mobilenet", "shufflenet_v2_x", "efficient", "mnas", "incep")
    ):
        assert norms(copied) == 0
    if name.startswith("wrn"):  # those before a convolution cannot be folded into one
        assert 0 < norms(copied) < count


class Odd(nn.Module):
    """Convolutions that must not be folded: read twice, called twice, read beside the call, normalised weights."""

    def __init__(self, num_classes: int):
        super().__init__()
        for name in ("split", "twice", "read", "weighed", "plain"):
            self.add_module(name, nn.Conv2d(3, 3, 3, padding=1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(3))
        nn.utils.parametrizations.weight_norm(self.weighed)
        self.batch_norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.last = nn.Linear(3, num_classes)

    def forward(self, x):
        x = self.split(x)
        x = x + self.split_norm(x)
        x = self.twice_norm(self.twice(x)) + self.twice(x)
        x = self.read_norm(self.read(x)) + self.read.bias.view(-1, 1, 1)
        x = self.batch_norm(self.plain(self.weighed_norm(self.weighed(x))))
        return self.last(self.plain_norm(x).mean((2, 3)))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.norm(self.convolution(x))
        return -x if x.sum() > 0 else x


@pytest.mark.parametrize("network", [Odd(3), Untraceable()], ids=["odd", "untraceable"])
@torch.no_grad()
def test_what_cannot_be_folded_stays(network):
    trained(network)
    images = torch.randn(4, 3, 8, 8)
    copied = folded(network)
    assert torch.equal(copied(images), network(images))
    assert norms(copied) == norms(network)


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "shufflenet_v2_cifar"])
def test_every_tap_of_a_folded_teacher_is_what_its_module_gives(name):
    torch.manual_seed(0)
    classifier = build_classifier(name, CLASSES, View())
    trained(classifier.network)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    names = [known for known, _ in classifier.network.named_modules() if known]
    twin = build_classifier(name, CLASSES, View()).eval()
    twin.network.load_state_dict(classifier.network.state_dict())
    twin.tap(names)
    with torch.no_grad():
        wanted = twin.outputs({"image": images})
    teacher = Teachers({"teacher": classifier}, CLASSES)
    assert norms(folded(classifier.network)) < norms(classifier.network)
    before = state_hash(teacher)
    teacher.outputs({"image": images})  # folded without taps first
    for one in (["pool"], ["stage1.preact", "stage2"], ["stem"], names):
        teacher.tap("teacher", one)
        got = teacher.outputs({"image": images})["teacher"]
        assert set(one) <= set(got.features)
        for tap, value in got.features.items():
            assert torch.allclose(value, wanted.features[tap], rtol=1e-4, atol=1e-4), tap
        assert torch.allclose(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert state_hash(teacher) == before


def test_a_teachers_outputs_can_be_kept_for_a_backward_pass():
    teacher = Teachers({"teacher": build_classifier("resnet8", CLASSES, View())}, CLASSES)
    teacher.tap("teacher", ["pool"])
    given = teacher.outputs({"image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)})["teacher"]
    weights = torch.ones(3, requires_grad=True)
    for value in (given.logits, given.features["pool"]):
        assert not value.is_inference()
        assert not value.requires_grad
    (given.logits * weights).square().sum().backward()
    assert weights.grad is not None
