"""The terms an objective can be made of, by name. One file per paper."""

import inspect
import sys

from kd.losses.abkd import ABKD
from kd.losses.activation_boundary import AB
from kd.losses.attention_transfer import AT
from kd.losses.base import FeatureLoss, LogitLoss, Loss, RelationLoss, Setting, SoftenedLoss, StagesLoss
from kd.losses.binary_kl import BinaryKL
from kd.losses.cka import CKA
from kd.losses.correlation_congruence import CC
from kd.losses.crd import CRD
from kd.losses.cross_entropy import CrossEntropy
from kd.losses.ctkd import CTKD
from kd.losses.cwd import CWD
from kd.losses.dist import DIST
from kd.losses.dkd import DKD
from kd.losses.double_softmax import DoubleSoftmax
from kd.losses.factor_transfer import FT
from kd.losses.features import CosineEmbedding, FeatureDistance
from kd.losses.fitnet import FitNet
from kd.losses.fsp import FSP
from kd.losses.hard_labels import HardLabels
from kd.losses.ickd import ICKD
from kd.losses.ikl import IKL
from kd.losses.irg import IRG
from kd.losses.kl import KL
from kd.losses.logits import LogitsMSE, SoftCrossEntropy, SoftMAE
from kd.losses.mgd import MGD
from kd.losses.mlkd import MLKD
from kd.losses.nkd import NKD
from kd.losses.nst import NST
from kd.losses.ofa import OFA
from kd.losses.ofd import OFD
from kd.losses.pkt import PKT
from kd.losses.review import ReviewKD
from kd.losses.rkd import RKD
from kd.losses.rld import RLD
from kd.losses.similarity import SP
from kd.losses.simkd import SimKD
from kd.losses.term import Term
from kd.losses.vid import VID
from kd.losses.wkd import WKDF
from kd.losses.wttm import WTTM

LOSSES: dict[str, type[Loss]] = {loss.__name__: loss for loss in (
    AB, ABKD, AT, BinaryKL, CC, CKA, CosineEmbedding, CRD, CrossEntropy, CTKD, CWD, DIST, DKD, DoubleSoftmax,
    FeatureDistance, FitNet, FSP, FT, HardLabels, ICKD, IKL, IRG, KL, LogitsMSE, MGD, MLKD, NKD, NST, OFA, OFD, PKT,
    ReviewKD, RKD, RLD, SimKD, SoftCrossEntropy, SoftMAE, SP, VID, WKDF, WTTM,
)}  # fmt: skip

__all__ = [
    "LOSSES", "FeatureLoss", "LogitLoss", "Loss", "RelationLoss", "Setting", "SoftenedLoss", "StagesLoss", "Term",
    "paper", *LOSSES,
]  # fmt: skip


def paper(loss: type[Loss]) -> str:
    """The first paragraph of a loss's file that has an address; "" if there is none."""
    paragraphs = inspect.getdoc(sys.modules[loss.__module__]).split("\n\n")
    return next((" ".join(paragraph.split()) for paragraph in paragraphs if "http" in paragraph), "")
