"""The student and its losses as one module: all that learns, and the only module that is prepared for training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd import keyed
from kd.losses import Loss, Setting
from kd.outputs import Batch, Outputs
from kd.train.trial import scalar
from kd.util.errors import UserError


class Distiller(nn.Module):
    """Student and losses behind one `forward`, so that what a loss learns is in the optimizer, in DDP and in the
    checkpoint by construction.

    Args:
        student: maps (images, keys) to `Outputs`; a `kd.models.Classifier`.
        losses: the terms; two of one class are told apart by a number.
        teacher: a `kd.teachers.Teacher`, which is tapped for the features that the losses need; not kept.
        image_shape: (C, H, W) of the stored images, from which the features' shapes are found.
        labels: int64 (N,), the label at each place of the store; -1 where no training image is.
        seed: of the first weights of what the losses learn.

    Raises:
        UserError: there is no loss, a tap does not exist, or the features' shapes do not suit a loss.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[Loss],
        teacher: nn.Module | None = None,
        image_shape: tuple[int, int, int] | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not losses:
            raise UserError("no loss is given; add one to losses, for example CrossEntropy")
        self.student = student
        self.losses = nn.ModuleDict()
        for loss in losses:
            name = type(loss).__name__
            count = sum(other == name or other.startswith(name + "_") for other in self.losses)
            self.losses[f"{name}_{count + 1}" if count else name] = loss
        self._connect(teacher, image_shape, labels, seed)
        # DistributedDataParallel need not send what the losses keep equal themselves, a memory bank for example.
        self._ddp_params_and_buffers_to_ignore = [
            f"losses.{name}.{buffer}" for name, loss in self.losses.items() for buffer in loss.replicated
        ]

    def _connect(self, teacher: nn.Module | None, image_shape, labels: Tensor | None, seed: int) -> None:
        """Tap both networks for the losses, and let the losses build what they learn."""
        shapes = []
        student_taps = sorted({name for loss in self.losses.values() for name in loss.student_taps})
        for network, names in ((self.student, student_taps), (teacher, self.teacher_taps)):
            shapes.append({})
            if names and network is not None:
                network.tap(names)
                shapes[-1] = _feature_shapes(network, image_shape)
        classes = getattr(self.student, "classes", None)
        setting = Setting(*shapes, len(classes) if classes else None, labels)
        torch.manual_seed(keyed.key(seed, keyed.Purpose.FIRST_WEIGHTS) & (2**63 - 1))
        for loss in self.losses.values():
            try:
                loss.setup(setting)
            except ValueError as error:
                raise UserError(str(error)) from None

    @property
    def needs_teacher(self) -> list[str]:
        """Names of the terms that compare the student with a teacher."""
        return [name for name, loss in self.losses.items() if loss.needs_teacher]

    @property
    def teacher_taps(self) -> list[str]:
        """Names of the teacher's modules whose outputs the terms need."""
        return sorted({name for loss in self.losses.values() for name in loss.teacher_taps})

    def forward(self, batch: Batch, teacher: Outputs | None) -> dict[str, Tensor]:
        """The weighted terms, each a float32 scalar, the mean over this process's images."""
        student = _float(self.student.outputs(batch.images, batch.keys))
        # Half precision has too few bits for a logarithm of a small probability: losses always run in float32.
        with torch.autocast(batch.images.device.type, enabled=False):
            values = {name: loss(student, teacher, batch) for name, loss in self.losses.items()}
            return {name: self.losses[name].weight * scalar(name, value, batch) for name, value in values.items()}

    def objective(self) -> str:
        """The objective in words: every term with its weight and hyperparameters."""
        return " + ".join(f"{loss.weight:g} * {name}{_arguments(loss)}" for name, loss in self.losses.items())


@torch.no_grad()
def _feature_shapes(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, tuple]:
    """Shapes of the tapped features for one blank image, without the batch axis."""
    was_training = network.training
    device = next(network.parameters()).device
    features = network.eval().outputs(torch.zeros(1, *image_shape, dtype=torch.uint8, device=device)).features
    network.train(was_training)
    return {name: tuple(feature.shape[1:]) for name, feature in features.items()}


def _float(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.float(), {name: feature.float() for name, feature in outputs.features.items()})


def _arguments(loss: Loss) -> str:
    names = [name for name in inspect.signature(type(loss)).parameters if name != "weight"]
    shown = {name: value for name in names if (value := getattr(loss, name, False)) is not False}
    return f"({', '.join(f'{k}={v}' for k, v in shown.items())})" if shown else ""
