"""What every loss is."""

from __future__ import annotations

from torch import Tensor, nn

from kd.outputs import Batch, Outputs


class Loss(nn.Module):
    """One weighted term of the objective.

    A subclass takes its hyperparameters as keyword arguments with the paper's defaults, hands `weight` to this
    constructor, and computes its unweighted scalar in `forward`; the distiller multiplies it by `weight`.

    A loss on features names the modules it needs in `student_taps` and `teacher_taps` and finds their outputs in
    `Outputs.features`. What it must learn (a regressor) it builds in `setup` as submodules, from the features' shapes.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{type(self).__name__}: weight {weight} must be a finite number, 0 or more")
        self.weight = weight

    @property
    def student_taps(self) -> list[str]:
        """Dotted names of the student's modules whose outputs it needs."""
        return []

    @property
    def teacher_taps(self) -> list[str]:
        """Dotted names of the teacher's modules whose outputs it needs."""
        return []

    def setup(self, student_shapes: dict[str, tuple], teacher_shapes: dict[str, tuple]) -> None:
        """Build what is learned, and check what can be; called once, before the first step.

        Args:
            student_shapes, teacher_shapes: shapes of the tapped features by tap name, without the batch axis.

        Raises:
            ValueError: the shapes do not suit this loss.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over this process's images, a scalar."""
        raise NotImplementedError


class SoftenedLoss(Loss):
    """A loss on probabilities softened by a temperature: softmax(logits / temperature).

    Args:
        temperature: T, above 0; higher makes small probabilities count more.
        weight: factor of this term in the objective.
    """

    def __init__(self, temperature: float, weight: float = 1.0):
        super().__init__(weight)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{type(self).__name__}: temperature {temperature} must be a finite number above 0")
        self.temperature = temperature


class FeatureLoss(Loss):
    """A loss between one feature of the student and one of the teacher.

    Args:
        student_tap, teacher_tap: dotted module names; `python -m kd.models NAME` lists them.
        weight: factor of this term in the objective.
    """

    def __init__(self, student_tap: str, teacher_tap: str, weight: float = 1.0):
        super().__init__(weight)
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    @property
    def student_taps(self) -> list[str]:
        return [self.student_tap]

    @property
    def teacher_taps(self) -> list[str]:
        return [self.teacher_tap]

    def features(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's feature."""
        return student.features[self.student_tap], teacher.features[self.teacher_tap]

    def mismatch(self, student_shape: tuple, teacher_shape: tuple, remedy: str) -> ValueError:
        """The error for two features that cannot be compared."""
        shapes = [("x".join(map(str, shape))) for shape in (student_shape, teacher_shape)]
        return ValueError(
            f"{type(self).__name__}: the student's {self.student_tap} is {shapes[0]} and the teacher's "
            f"{self.teacher_tap} is {shapes[1]}; {remedy}"
        )
