"""Training data-efficient image transformers & distillation through attention. Touvron et al. 2020.
https://arxiv.org/abs/2012.12877

Hard-label distillation (section 4, "Hard-label distillation"): the class that the teacher finds most likely is a second
label, and the cross entropies with both have the weight 1/2. A view of an image may show another class than its label
says; the teacher's class follows the view. Nothing is to be tuned.

Differs from DeiT: both terms see the same logits; DeiT gives the teacher's class to a token and a head of its own.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Loss
from kd.outputs import Batch, Outputs


class HardLabels(Loss):
    """Cross entropy with the class that the teacher finds most likely (DeiT, Touvron et al. 2020).

    Args:
        weight: factor of this term in the objective; the paper has 0.5, beside a cross entropy of weight 0.5.
    """

    def __init__(self, weight: float = 0.5):
        super().__init__(weight)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return F.cross_entropy(student.logits, teacher.logits.argmax(1))
