"""Knowledge Distillation from A Stronger Teacher. Huang, You, Wang, Qian, Xu. 2022. https://arxiv.org/abs/2205.10536

DIST. Instead of the teacher's probabilities the student matches how they vary, by Pearson's correlation: for each image
across the classes (inter-class relation), and for each class across the images (intra-class relation). Each relation's
loss is 1 minus the mean correlation of student and teacher (section 4).

Differs from the paper: both are multiplied by T^2, as in the authors' code, from which the published numbers are.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import SoftenedLoss, z_score
from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation (N,) of each row of two (N, M), M at least 2; 0 where a row's entries are all equal."""
    return (z_score(one, epsilon=0.0) * z_score(other, epsilon=0.0)).sum(1) / (one.shape[1] - 1)


def relation_losses(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """T^2 times the inter-class and the intra-class loss; logits (B, K). One image has no intra-class relation: 0.

    Differs from the authors' code: the correlations are exact, as in the paper. The code adds 1e-8 to the product of
    norms that they divide by, which weakens classes whose probability is tiny for all images.
    """
    mine, theirs = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    inter = 1 - correlation(mine, theirs).mean()
    intra = 1 - correlation(mine.T, theirs.T).mean() if len(mine) > 1 else 0.0
    return temperature**2 * inter, temperature**2 * intra


class DIST(SoftenedLoss):
    """Correlations of student and teacher, across classes and across images (Huang et al. 2022).

    The intra-class relation compares images, so the loss sees the global batch: the logits of all processes. With 2
    classes every inter-class correlation is 1 or -1 and teaches nothing; the intra-class relation is what is left.

    Args:
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        temperature: T, above 0. The authors' CIFAR-100 configuration has T 4 and weight 2 on both relations.
    """

    sees_batch = True

    def __init__(self, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0, **kwargs):
        super().__init__(temperature, **kwargs)
        self.keep_nonnegative(beta=beta, gamma=gamma)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        logits = (global_rows(rows, batch) for rows in self.logits(student, teacher))
        inter, intra = relation_losses(*logits, self.temperature)
        return self.beta * inter + self.gamma * intra
