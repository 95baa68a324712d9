"""The terms an objective can be made of, by name. One file a paper."""

from kd.losses.base import Loss
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.kl import KL

LOSSES: dict[str, type[Loss]] = {
    "CrossEntropy": CrossEntropy,
    "KL": KL,
}

__all__ = ["KL", "LOSSES", "CrossEntropy", "Loss"]
