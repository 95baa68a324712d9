"""The networks of the public notebooks that most first experiments start from, with exactly their layers.

`deep_nn` and `light_nn` are those of PyTorch's knowledge distillation tutorial
(https://pytorch.org/tutorials/beginner/knowledge_distillation_tutorial.html), `deeper_cnn` the STL-10 student,
`mnist_teacher` and `mnist_student` those of the MNIST example. Module names are ours.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


def _conv(channels_in: int, channels_out: int, bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias), nn.ReLU()]


class SmallNet(nn.Module):
    """Convolutions (`features`), then fully connected layers (`classifier`), for images of one size.

    Input (B, 3, image_size, image_size), output logits (B, num_classes).
    """

    def __init__(self, features: list[nn.Module], hidden: list[int], image_size: int, dropout: float, num_classes: int):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} must be in [0, 1)")
        self.image_size = image_size
        self.features = nn.Sequential(*features)
        layers: list[nn.Module] = [nn.Flatten()]
        for size_in, size_out in pairwise(hidden):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def deep_nn(num_classes: int, dropout: float = 0.1) -> SmallNet:
    """The CIFAR-10 tutorial's teacher: 1,186,986 parameters for 10 classes, images 32x32."""
    features = [*_conv(3, 128), *_conv(128, 64), nn.MaxPool2d(2), *_conv(64, 64), *_conv(64, 32), nn.MaxPool2d(2)]
    return SmallNet(features, [2048, 512], 32, dropout, num_classes)


def light_nn(num_classes: int, dropout: float = 0.1) -> SmallNet:
    """The CIFAR-10 tutorial's student: 267,738 parameters for 10 classes, images 32x32."""
    features = [*_conv(3, 16), nn.MaxPool2d(2), *_conv(16, 16), nn.MaxPool2d(2)]
    return SmallNet(features, [1024, 256], 32, dropout, num_classes)


def deeper_cnn(num_classes: int) -> SmallNet:
    """The STL-10 notebook's student: 13,429,354 parameters for 10 classes, images 224x224.

    Four blocks without bias or batch norm; `features.9` is the second block's map after pooling, 64x56x56.
    """
    features = []
    for channels_in, channels_out in ((3, 32), (32, 64), (64, 128)):
        features += [*_conv(channels_in, channels_out, False), *_conv(channels_out, channels_out, False)]
        features.append(nn.MaxPool2d(2))
    features += [*_conv(128, 256, False), nn.MaxPool2d(2)]
    return SmallNet(features, [256 * 14 * 14, 256], 224, 0.0, num_classes)


def _strided(width: int, num_classes: int) -> SmallNet:
    """Three convolutions of one width without padding: maps of 13x13, 6x6, 5x5 and, pooled, 2x2."""
    features: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2)]
    features += [nn.ReLU(), nn.Conv2d(width, width, 2), nn.ReLU()]
    # At 5x5 the same function as the example's AdaptiveAvgPool2d(2), whose gradient is not deterministic on a GPU.
    features.append(nn.AvgPool2d(3, stride=2))
    return SmallNet(features, [4 * width], 28, 0.0, num_classes)


def mnist_teacher(num_classes: int) -> SmallNet:
    """The MNIST example's teacher: 221,962 parameters for 10 classes, images 28x28."""
    return _strided(128, num_classes)


def mnist_student(num_classes: int) -> SmallNet:
    """The MNIST example's student: 15,562 parameters for 10 classes, images 28x28."""
    return _strided(32, num_classes)


SMALL_NETS = {
    "deep_nn": deep_nn,
    "light_nn": light_nn,
    "deeper_cnn": deeper_cnn,
    "mnist_teacher": mnist_teacher,
    "mnist_student": mnist_student,
}
