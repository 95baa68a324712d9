"""The terms an objective can be made of, by name. One file a paper."""

from kd.losses.base import FeatureLoss, Loss, SoftenedLoss
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.double_softmax import DoubleSoftmax
from kd.losses.features import CosineEmbedding, FeatureDistance
from kd.losses.fitnet import FitNet
from kd.losses.kl import KL
from kd.losses.logits import LogitsMSE, SoftCrossEntropy, SoftMAE

LOSSES: dict[str, type[Loss]] = {
    "CosineEmbedding": CosineEmbedding,
    "CrossEntropy": CrossEntropy,
    "DoubleSoftmax": DoubleSoftmax,
    "FeatureDistance": FeatureDistance,
    "FitNet": FitNet,
    "KL": KL,
    "LogitsMSE": LogitsMSE,
    "SoftCrossEntropy": SoftCrossEntropy,
    "SoftMAE": SoftMAE,
}

__all__ = ["LOSSES", "FeatureLoss", "Loss", "SoftenedLoss", *LOSSES]
