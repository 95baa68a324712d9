"""Paraphrasing Complex Network. Kim, Park, Kwak. 2018. https://arxiv.org/abs/1802.04977

A paraphraser, a convolutional autoencoder, compresses the teacher's feature map to a factor; a translator on the
student's feature map learns to give the same factor, both scaled to unit length (section 3).
"""

from itertools import chain, pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import FeatureLoss, Setting
from kd.losses.parts import maps, same_size, unit
from kd.outputs import Batch, Outputs


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean absolute difference of factors (B, C, H, W), each image's scaled to unit length; a scalar.

    Where height and width differ, the larger factor is average-pooled to the smaller.
    """
    return F.l1_loss(*(unit(factor.flatten(1)) for factor in same_size(student, teacher)))


def layers(kind: type[nn.Module], *channels: int) -> nn.Sequential:
    """3x3 (transposed) convolutions between these numbers of channels, a leaky ReLU after each."""
    steps = ((kind(*pair, 3, padding=1), nn.LeakyReLU(0.1)) for pair in pairwise(channels))
    return nn.Sequential(*chain.from_iterable(steps))


class FT(FeatureLoss):
    """Distance of the student's translated map from the teacher's factor (Kim et al. 2018).

    The paraphraser's reconstruction error is added.

    Differs from the paper: the paraphraser is trained at the same time, by the squared error of its reconstruction of
    the teacher's map, not in a stage before; the translator approaches the factor of the moment, through which no
    gradient flows. As in the authors' code, the mean over a factor's elements instead of their sum and no batch norm in
    either network. Their weight on CIFAR-10 is 500; the default is the usual comparison's, whose code squares a factor
    and averages it over its channels before it is scaled to unit length.

    Args:
        student_tap, teacher_tap: dotted module names of maps (C, H, W).
        rate: channels of the factor as a share of the teacher's, above 0.
        reconstruction_weight: factor of the paraphraser's error beside the distance; with `weight` the default makes 1.
    """

    def __init__(self, *taps, rate: float = 0.5, reconstruction_weight: float = 0.005, weight: float = 200.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_positive(rate=rate, reconstruction_weight=reconstruction_weight)

    def setup(self, setting: Setting) -> None:
        mine, theirs = self.shapes(setting, maps, "tap maps (CxHxW)")
        factor = max(1, round(theirs[0] * self.rate))
        self.encoder = layers(nn.Conv2d, theirs[0], theirs[0], factor, factor)
        self.decoder = layers(nn.ConvTranspose2d, factor, factor, theirs[0], theirs[0])
        self.translator = layers(nn.Conv2d, mine[0], mine[0], factor, factor)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = self.features(student, teacher)
        theirs = theirs.detach()
        factor = self.encoder(theirs)
        reconstruction = F.mse_loss(self.decoder(factor), theirs)
        return factor_distance(self.translator(mine), factor.detach()) + self.reconstruction_weight * reconstruction
