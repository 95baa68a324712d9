"""Multi-Level Logit Distillation. Jin, Wang, Lin. 2023.
https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html

Probabilities p (B, K) at several temperatures ("prediction augmentation") are compared at three levels, and everything
is summed: each image's probabilities by KL (instance level), the Gram matrix p p^T between images (batch level), and
the Gram matrix p^T p between classes (class level), the latter two by the squared difference over B and over K.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LogitLoss
from kd.losses.kl import kl_divergence
from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows


def gram_losses(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The batch level and the class level at one temperature; logits (B, K), two scalars."""
    mine, theirs = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    images = (mine @ mine.T - theirs @ theirs.T).square().sum() / len(mine)
    classes = (mine.T @ mine - theirs.T @ theirs).square().sum() / mine.shape[1]
    return images, classes


class MLKD(LogitLoss):
    """Softened probabilities, their Gram matrix between images and that between classes (Jin et al. 2023).

    The batch and the class level compare images, so they see the global batch: the logits of all processes. Memory
    grows with the square of the global batch.

    Differs from the paper: one view of each image, the loop's own, instead of a weakly and a strongly augmented one. In
    the authors' code the instance level has both views, the other two the weak one only.

    Differs from the authors' code: no confidence masks. The code finds the less confident half of the images and of the
    classes, but multiplies sums by these masks, not elements, which is no more than a factor of 1/2 on the weak view's
    terms. The T^2 on the instance level, and only there, is the code's.

    `standardize` is of the instance level only, as in the authors' code of that paper.

    Args:
        temperatures: of the predictions; each has all three levels.
        weight: factor of this term in the objective; the authors have 0.9, beside a cross entropy of weight 0.1.
    """

    sees_batch = True

    def __init__(self, temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0), weight: float = 0.9, **kwargs):
        super().__init__(weight=weight, **kwargs)
        good = len(temperatures) > 0 and all(0 < temperature < float("inf") for temperature in temperatures)
        self.require(good, f"temperatures {list(temperatures)} must be finite numbers above 0, at least one")
        self.temperatures = tuple(temperatures)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        own = self.logits(student, teacher)
        everyone = [global_rows(outputs.logits, batch) for outputs in (student, teacher)]
        levels = [(kl_divergence(*own, T), *gram_losses(*everyone, T)) for T in self.temperatures]
        return sum(instance + images + classes for instance, images, classes in levels)
