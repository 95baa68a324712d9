"""What a tracker is shown at a run's end: how the test images were classified, and the hardest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.data import Split
from kd.measure.metrics import confusion_matrix

NUM_HARDEST = 32
SIDE = 64  # pixels that a small image is enlarged to, at least


@dataclass
class Outcome:
    """The chosen weights on the test split: logits (N, K), labels (N,), and `hardest`'s rows."""

    classes: list[str]
    logits: Tensor
    labels: Tensor
    hardest: list[dict]

    def confusion_picture(self) -> np.ndarray:
        """uint8 (H, W, 3), a square of pixels for each pair: row the label, column the prediction, dark blue all."""
        counts = confusion_matrix(self.logits, self.labels).double()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        white, blue = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([8.0, 48.0, 107.0])
        picture = (white + shares[:, :, None] * (blue - white)).round().byte().numpy()
        return _enlarged(picture, 512)


@torch.inference_mode()
def hardest(
    split: Split,
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    teacher: nn.Module | None,
    device: torch.device,
    count: int = NUM_HARDEST,
) -> list[dict]:
    """The images of a split with the highest cross entropy, the hardest first, as rows of a table.

    Args:
        logits: (N, K), of the split's images in its order; labels (N,).
        teacher: `kd.teachers.Teachers`, whose predictions are shown too; None where there are none.
        device: where the teacher is.

    Returns:
        For each an `image` uint8 (H, W, 3), its `position` in the split, `label`, `prediction`, the `probability` of
        that, the `loss`, and with a teacher `teacher_prediction` and `teacher_probability`.
    """
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    where = losses.argsort(descending=True, stable=True)[:count]
    inputs = split.read(where.numpy(), device)[0]
    images, scores_of = inputs["image"], {"": logits[where]}
    if teacher is not None:
        scores_of["teacher_"] = teacher.logits(inputs).cpu()
    rows = []
    for i, position in enumerate(where.tolist()):
        pixels = images[i].permute(1, 2, 0).cpu().numpy()
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        row = {"image": _enlarged(pixels, SIDE), "position": position, "label": classes[int(labels[position])]}
        for who, scores in scores_of.items():
            probability, best = scores[i].double().softmax(0).max(0)
            row |= {f"{who}prediction": classes[int(best)], f"{who}probability": probability.item()}
        rows.append({**row, "loss": losses[position].item()})
    return rows


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pixels (H, W, 3) repeated so that the longer side is about `side`, where it is shorter than that."""
    factor = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
