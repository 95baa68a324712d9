"""Deep Residual Learning for Image Recognition, section 4.2. He et al. 2016. https://arxiv.org/abs/1512.03385

The paper's own networks for CIFAR-10, whose shortcuts have no parameters (option A), with the names of modules of the
public weights, so that these load with `--weights FILE` (https://github.com/akamaster/pytorch_resnet_cifar10). The
networks of the CIFAR-100 comparison, `resnet20` and its like in `kd.models.cifar`, have shortcuts of another kind.

`layer1` to `layer3` are maps (B, C, H, W) after the last ReLU, `layerN.LAST.preact` before it, `pool` the last map's
average, `linear` the head.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.cifar import CifarNet


class Block(nn.Module):
    """Two convolutions and a shortcut: every `stride`-th pixel, with channels of zeros added on both sides."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.preact = nn.Identity()  # for a tap
        self.stride, self.zeros = stride, (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(self.preact(branch + shortcut))


def cifar10_resnet(num_classes: int, depth: int) -> CifarNet:
    """Float images (B, 3, H, W), meant for 32x32, to logits (B, K); depth 6n + 2, first weights as in the paper."""
    modules = OrderedDict(conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(16), relu=nn.ReLU())
    for number, (before, channels, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
        others = [Block(channels, channels, 1) for _ in range((depth - 2) // 6 - 1)]
        modules[f"layer{number}"] = nn.Sequential(Block(before, channels, stride), *others)
    modules["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    modules["linear"] = nn.Linear(64, num_classes)
    network = CifarNet(modules)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network


CIFAR10_RESNETS = {
    "cifar10_resnet20": lambda num_classes: cifar10_resnet(num_classes, 20),
    "cifar10_resnet32": lambda num_classes: cifar10_resnet(num_classes, 32),
    "cifar10_resnet44": lambda num_classes: cifar10_resnet(num_classes, 44),
    "cifar10_resnet56": lambda num_classes: cifar10_resnet(num_classes, 56),
}
