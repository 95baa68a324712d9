"""What every loss is."""

from __future__ import annotations

from torch import Tensor, nn

from kd.outputs import Batch, Outputs


class Loss(nn.Module):
    """One weighted term of the objective.

    A subclass takes its hyperparameters as keyword arguments with the paper's defaults, hands `weight` to this
    constructor, and computes its unweighted scalar in `forward`; the distiller multiplies it by `weight`. What it must
    learn is a submodule.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{type(self).__name__}: weight {weight} must be a finite number, 0 or more")
        self.weight = weight

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over this process's images, a scalar."""
        raise NotImplementedError
