"""A network that ends early: its modules up to a tap, and a small head behind them.

Be Your Own Teacher. Zhang, Song, Gao, Chen, Bao, Ma. 2019. https://arxiv.org/abs/1905.08094
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd.models.cifar import conv_norm
from kd.models.cut import up_to


class ExitHead(nn.Module):
    """A bottleneck from a map to one of the shape of the network's last map, its average, and a linear layer.

    The bottleneck is a 1x1 convolution, one that takes steps as long as it is wide down to the last map's size, and a
    1x1 convolution, each with batch norm and ReLU.

    Args:
        shape, last: (C, H, W) of the map and of the network's last one.
        num_classes: K.
        factor: the convolutions inside have the last map's channels divided by this.
    """

    def __init__(self, shape: list[int], last: list[int], num_classes: int, factor: int = 4):
        super().__init__()
        inner = max(1, last[0] // factor)
        stride = [max(1, side // small) for side, small in zip(shape[1:], last[1:], strict=True)]
        layers = [*conv_norm(shape[0], inner, 1), nn.Conv2d(inner, inner, stride, stride, bias=False)]
        layers += [nn.BatchNorm2d(inner), nn.ReLU(), *conv_norm(inner, last[0], 1)]
        self.bottleneck = nn.Sequential(*layers)
        self.fc = nn.Linear(last[0], num_classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the bottleneck's map (B, C, H, W)."""
        maps = self.bottleneck(maps)
        return self.fc(F.adaptive_avg_pool2d(maps, 1).flatten(1)), maps


class ExitNetwork(nn.Module):
    """A network's modules up to a tap, and the head there; float images to logits (B, K)."""

    def __init__(self, body: nn.Module, head: ExitHead):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))[0]


def exit_network(
    num_classes: int, student: str, student_args: dict, tap: str, shape: list[int], last: list[int], trust: bool = False
) -> ExitNetwork:
    """An `ExitNetwork` with random weights.

    Args:
        num_classes, trust: see `build_network`.
        student, student_args: the whole network's name, as `build_network` takes it, and its arguments.
        tap: dotted name of the module behind which the head stands.
        shape, last: of the map there and of the network's last one, (C, H, W).
    """
    from kd.models import build_network  # which knows this function

    body = up_to(build_network(student, num_classes, student_args, trust), tap)
    return ExitNetwork(body, ExitHead(shape, last, num_classes))
