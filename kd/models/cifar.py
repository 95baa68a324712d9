"""The networks of the usual CIFAR-100 comparison: the same functions, sizes and first weights, one set of taps.

The comparison is that of Contrastive Representation Distillation, Tian et al. 2020, https://arxiv.org/abs/1910.10699
(code https://github.com/HobbitLong/RepDistiller), on which https://github.com/megvii-research/mdistiller and later
papers build. Meant for 32x32 pixels; every network takes other sizes too. Each is a row of modules:

    stem                   the first convolution, with its batch norm and ReLU except in `wide_resnet` and `vgg`
    stage1, stage2, ...    maps (B, C, H, W); `stageN` is after the stage's last ReLU, `stageN.preact` before it
    last                   one more 1x1 convolution, in `mobilenet_v2` and `shufflenet_v2`, with `last.preact` likewise
    pool                   the last map's average, (B, D)
    fc                     the head, logits (B, K)

`stem`, `stage1`, ... are the comparison's features 0, 1, ...; in `vgg` its features 0 to 4 are `stage1` to `stage5`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class CifarNet(nn.Sequential):
    """Modules in a row; float images (B, 3, H, W) to logits (B, K)."""

    usual_size = 32


class Residual(nn.Module):
    """`branch(x) + shortcut(x)`, or both beside each other along the channels."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, beside: bool = False):
        super().__init__()
        self.branch, self.shortcut, self.beside = branch, shortcut or nn.Identity(), beside

    def forward(self, x: Tensor) -> Tensor:
        parts = self.branch(x), self.shortcut(x)
        return torch.cat(parts, 1) if self.beside else parts[0] + parts[1]


class SplitShuffle(nn.Module):
    """One half of the channels goes past the branch, or all channels through both; then the halves are shuffled."""

    def __init__(self, branch: nn.Module, other: nn.Module | None = None):
        super().__init__()
        self.branch, self.other, self.shuffle = branch, other, nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        past, through = x.chunk(2, 1) if self.other is None else (self.other(x), x)
        return self.shuffle(torch.cat((past, self.branch(through)), 1))


def _conv(channels_in: int, channels_out: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False):
    return nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=bias)


def conv_norm(channels_in: int, channels_out: int, *arguments, relu: bool = True) -> list[nn.Module]:
    """A convolution by the arguments of `_conv`, batch norm and ReLU."""
    layers = [_conv(channels_in, channels_out, *arguments), nn.BatchNorm2d(channels_out)]
    return [*layers, nn.ReLU()] if relu else layers


def _row(layers: list[nn.Module], **named: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict([*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]))


def _stage(layers: list[nn.Module], preact: nn.Module | None = None) -> nn.Sequential:
    return _row(layers, preact=preact or nn.Identity(), relu=nn.ReLU())


def _blocks(channels: int, plan: list[tuple[int, int, int]], block) -> list[list[nn.Module]]:
    """For each (channels out, number of blocks, first stride) of the plan the blocks `block(in, out, stride)`."""
    stages = []
    for channels_out, count, stride in plan:
        stages.append([])
        for i in range(count):
            stages[-1].append(block(channels, channels_out, 1 if i else stride))
            channels = channels_out
    return stages


def _network(stem: nn.Module, stages: list[nn.Module], width: int, num_classes: int, **last: nn.Module) -> CifarNet:
    named = {f"stage{number}": stage for number, stage in enumerate(stages, 1)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return CifarNet(OrderedDict(stem=stem, **named, **last, pool=pool, fc=nn.Linear(width, num_classes)))


def _he(network: CifarNet, linear_std: float | None = None) -> CifarNet:
    """He's normal weights by fan-out in convolutions, biases 0; the head's weights too if told their deviation."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if linear_std is not None:
        nn.init.normal_(network.fc.weight, std=linear_std)
        nn.init.zeros_(network.fc.bias)
    return network


def resnet(num_classes: int, depth: int, channels: tuple[int, int, int, int] = (16, 16, 32, 64)) -> CifarNet:
    """Deep Residual Learning, section 4.2. He et al. 2016. https://arxiv.org/abs/1512.03385

    Where the shape changes the shortcut is a 1x1 convolution with batch norm, as in the comparison, not the paper's
    padding with zeros.
    """

    def block(channels_in, channels_out, stride):
        branch = conv_norm(channels_in, channels_out, 3, stride)
        branch += conv_norm(channels_out, channels_out, relu=False)
        same = (channels_in, stride) == (channels_out, 1)
        shortcut = None if same else nn.Sequential(*conv_norm(channels_in, channels_out, 1, stride, relu=False))
        return Residual(nn.Sequential(*branch), shortcut)

    count = (depth - 2) // 6
    plan = [(channels_out, count, stride) for channels_out, stride in zip(channels[1:], (1, 2, 2), strict=True)]
    stages = [_stage(_relu_between(blocks)) for blocks in _blocks(channels[0], plan, block)]
    return _he(_network(nn.Sequential(*conv_norm(3, channels[0])), stages, channels[-1], num_classes))


def _relu_between(blocks: list[nn.Module]) -> list[nn.Module]:
    return [layer for block in blocks for layer in (block, nn.ReLU())][:-1]


def wide_resnet(num_classes: int, depth: int, width: int) -> CifarNet:
    """Wide Residual Networks. Zagoruyko and Komodakis 2016. https://arxiv.org/abs/1605.07146

    In the paper's order each block starts with batch norm and ReLU. In the first block of stages 2 and 3 both branches
    use their result, so here they end the stage before: the same function, and `stageN` is after a ReLU as elsewhere.
    The comparison taps the sum before that batch norm: here the stage's last block, `stage1.1` to `stage3.1` in
    wrn_16, `stage1.5` to `stage3.5` in wrn_40. `stem` is the convolution alone.
    """
    plan = [(16 * width, (depth - 4) // 6, 1), (32 * width, (depth - 4) // 6, 2), (64 * width, (depth - 4) // 6, 2)]

    def block(channels_in, channels_out, stride):
        branch = nn.Sequential(*conv_norm(channels_in, channels_out, 3, stride), _conv(channels_out, channels_out))
        norm = [] if stride == 2 else [nn.BatchNorm2d(channels_in), nn.ReLU()]
        if channels_in == channels_out:
            return Residual(nn.Sequential(*norm, *branch))
        return nn.Sequential(*norm, Residual(branch, _conv(channels_in, channels_out, 1, stride)))

    rows = zip(plan, _blocks(16, plan, block), strict=True)
    stages = [_stage(blocks, preact=nn.BatchNorm2d(channels)) for (channels, _, _), blocks in rows]
    network = _he(_network(_conv(3, 16), stages, 64 * width, num_classes))
    nn.init.zeros_(network.fc.bias)
    return network


def vgg(num_classes: int, count: int) -> CifarNet:
    """Very Deep Convolutional Networks. Simonyan and Zisserman 2015. https://arxiv.org/abs/1409.1556

    Five stages of `count` convolutions with batch norm and one linear layer, as in the comparison. Max pooling lies
    between stages, at the start of stages 2, 3 and 4 (the comparison has one more for 64x64 pixels): `stageN` is before
    it. `stem` is the first convolution alone.
    """
    stages, channels = [], 3
    for number, channels_out in enumerate((64, 128, 256, 512, 512)):
        layers = [nn.MaxPool2d(2)] if number in (1, 2, 3) else []
        for _ in range(count):
            layers += [_conv(channels, channels_out, bias=True), nn.BatchNorm2d(channels_out), nn.ReLU()]
            channels = channels_out
        stages.append(layers[:-1])
    stem = stages[0].pop(0)
    stages = [_stage(layers[:-1], preact=layers[-1]) for layers in stages]
    return _he(_network(stem, stages, 512, num_classes), linear_std=0.01)


def mobilenet_v2(num_classes: int, width: float, expansion: int) -> CifarNet:
    """MobileNetV2. Sandler et al. 2018. https://arxiv.org/abs/1801.04381

    The comparison's: fewer strides than the paper's, ReLU instead of ReLU6, no dropout. Its blocks end with a batch
    norm, without ReLU, so `stageN` is the last block's output as it is, and `stageN.preact` is the same.
    """

    def block(expansion):
        def make(channels_in, channels_out, stride):
            hidden = channels_in * expansion
            branch = [*conv_norm(channels_in, hidden, 1), *conv_norm(hidden, hidden, 3, stride, hidden)]
            branch = nn.Sequential(*branch, *conv_norm(hidden, channels_out, 1, relu=False))
            return Residual(branch) if (channels_in, stride) == (channels_out, 1) else branch

        return make

    first, *others = (int(width * channels) for channels in (32, 16, 24, 32, 64, 96, 160, 320))
    counts, strides = (1, 2, 3, 4, 3, 3, 1), (1, 1, 2, 2, 1, 2, 1)
    plan = list(zip(others, counts, strides, strict=True))
    groups = [*_blocks(first, plan[:1], block(1)), *_blocks(others[0], plan[1:], block(expansion))]
    joined = [groups[0] + groups[1], groups[2], groups[3] + groups[4], groups[5] + groups[6]]
    stages = [_row(blocks, preact=nn.Identity()) for blocks in joined]
    stem = nn.Sequential(*conv_norm(3, first, 3, 2))
    last = _stage([_conv(others[-1], 1280, 1)], preact=nn.BatchNorm2d(1280))
    return _he(_network(stem, stages, 1280, num_classes, last=last), linear_std=0.01)


def shufflenet_v1(num_classes: int) -> CifarNet:
    """ShuffleNet. Zhang et al. 2018. https://arxiv.org/abs/1707.01083

    The comparison's with 3 groups: a 1x1 convolution without stride or pooling as stem, torch's own first weights.
    """

    def block(channels_in, channels_out, stride):
        made = channels_out - channels_in if stride == 2 else channels_out  # the shortcut brings the others
        inner, first = made // 4, 1 if channels_in == 24 else 3
        branch = [*conv_norm(channels_in, inner, 1, 1, first), nn.ChannelShuffle(first)]
        branch += [*conv_norm(inner, inner, 3, stride, inner), *conv_norm(inner, made, 1, 1, 3, relu=False)]
        shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        return Residual(nn.Sequential(*branch), shortcut, beside=stride == 2)

    plan = [(240, 4, 2), (480, 8, 2), (960, 4, 2)]
    stages = [_stage(_relu_between(blocks)) for blocks in _blocks(24, plan, block)]
    return _network(nn.Sequential(*conv_norm(3, 24, 1)), stages, 960, num_classes)


def shufflenet_v2(num_classes: int) -> CifarNet:
    """ShuffleNet V2. Ma et al. 2018. https://arxiv.org/abs/1807.11164

    The comparison's at width 1: a 1x1 convolution without stride or pooling as stem, torch's own first weights. A
    block's ReLU stands here after its shuffle; the half that went past is never negative, so the function is the same,
    and `stageN.preact` has the order of channels of `stageN`.
    """

    def block(channels_in, channels_out, stride):
        half = channels_out // 2
        entering = channels_in if stride == 2 else half
        branch = [*conv_norm(entering, half, 1), *conv_norm(half, half, 3, stride, half, relu=False)]
        branch = nn.Sequential(*branch, *conv_norm(half, half, 1, relu=False))
        if stride == 1:
            return SplitShuffle(branch)
        other = conv_norm(channels_in, channels_in, 3, 2, channels_in, relu=False)
        return SplitShuffle(branch, nn.Sequential(*other, *conv_norm(channels_in, half, 1, relu=False)))

    plan = [(116, 4, 2), (232, 8, 2), (464, 4, 2)]
    stages = [_stage(_relu_between(blocks)) for blocks in _blocks(24, plan, block)]
    last = _stage([_conv(464, 1024, 1)], preact=nn.BatchNorm2d(1024))
    return _network(nn.Sequential(*conv_norm(3, 24, 1)), stages, 1024, num_classes, last=last)


CIFAR_NETS = {
    "resnet8": lambda num_classes: resnet(num_classes, 8),
    "resnet14": lambda num_classes: resnet(num_classes, 14),
    "resnet20": lambda num_classes: resnet(num_classes, 20),
    "resnet32": lambda num_classes: resnet(num_classes, 32),
    "resnet44": lambda num_classes: resnet(num_classes, 44),
    "resnet56": lambda num_classes: resnet(num_classes, 56),
    "resnet110": lambda num_classes: resnet(num_classes, 110),
    "resnet8x4": lambda num_classes: resnet(num_classes, 8, (32, 64, 128, 256)),
    "resnet32x4": lambda num_classes: resnet(num_classes, 32, (32, 64, 128, 256)),
    "wrn_16_1": lambda num_classes: wide_resnet(num_classes, 16, 1),
    "wrn_16_2": lambda num_classes: wide_resnet(num_classes, 16, 2),
    "wrn_40_1": lambda num_classes: wide_resnet(num_classes, 40, 1),
    "wrn_40_2": lambda num_classes: wide_resnet(num_classes, 40, 2),
    "vgg8": lambda num_classes: vgg(num_classes, 1),
    "vgg13_cifar": lambda num_classes: vgg(num_classes, 2),  # torchvision has a vgg13, of another kind
    "mobilenet_v2_half": lambda num_classes: mobilenet_v2(num_classes, 0.5, 6),
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2_cifar": shufflenet_v2,
}
