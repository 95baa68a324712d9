"""Variational Information Distillation for Knowledge Transfer. Ahn et al. 2019. https://arxiv.org/abs/1904.05835

The mutual information of the teacher's and the student's features has a lower bound in the likelihood of the teacher's
given the student's: a Gaussian, its mean a learned regression on the student's feature, its variance one learned number
a channel, softplus(scale) + epsilon. Its negative logarithm is minimised, without its constant (section 2).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import Setting, StagesLoss
from kd.losses.parts import alike, same_size
from kd.outputs import Batch, Outputs


def negative_log_likelihood(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Half the mean over all elements of (teacher - mean)^2 / variance + log(variance); mean and teacher (B, C, H, W),
    variance (C,), above 0."""
    variance = variance[:, None, None]
    return ((teacher - mean).square() / variance + variance.log()).mean() / 2


class VID(StagesLoss):
    """Negative log-likelihood of the teacher's features given the student's, summed over the stages (Ahn et al. 2019).

    The regression is three 1x1 convolutions without bias, ReLU between them, as wide as the teacher's feature; a vector
    counts as a map of 1x1. Where height and width differ, the larger map is average-pooled to the smaller. The value
    falls below 0 once the variances are small.

    Differs from the paper: the mean over all elements instead of the sum, and the regression's width and no batch norm
    in it, as in the usual comparison's code, which the default weight is for.

    Args:
        student_taps, teacher_taps: dotted module names of maps (C, H, W) or vectors, in the order of the pairs.
        initial_variance: of every channel before the first step, above epsilon.
        epsilon: the least variance, above 0.
    """

    def __init__(self, *taps, initial_variance: float = 5.0, epsilon: float = 1e-5, weight: float = 1.0, **kwargs):
        super().__init__(*taps, weight=weight, **kwargs)
        self.keep_positive(epsilon=epsilon)
        self.require(
            epsilon < initial_variance < float("inf"),
            f"initial_variance {initial_variance} must be a finite number above epsilon ({epsilon})",
        )
        self.initial_variance = initial_variance

    def setup(self, setting: Setting) -> None:
        self.regressors, self.scales = nn.ModuleList(), nn.ParameterList()
        excess = self.initial_variance - self.epsilon
        scale = excess + math.log(-math.expm1(-excess))  # the inverse of softplus
        for mine, theirs in self.shapes(setting, alike, "tap two maps (CxHxW) or two vectors"):
            widths = (mine[0], theirs[0], theirs[0], theirs[0])
            first, second, third = (nn.Conv2d(*step, 1, bias=False) for step in pairwise(widths))
            self.regressors.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            self.scales.append(torch.full((theirs[0],), scale))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        total = 0.0
        stages = zip(self.regressors, self.scales, self.features(student, teacher), strict=True)
        for regressor, scale, pair in stages:
            mine, theirs = same_size(*pair)
            total = total + negative_log_likelihood(regressor(mine), theirs, F.softplus(scale) + self.epsilon)
        return total
