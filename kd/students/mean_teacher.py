"""Mean teachers are better role models. Tarvainen, Valpola. 2017. https://arxiv.org/abs/1703.01780

Beside the student stands a network whose weights are an exponential moving average of the student's. Without a term
that takes it for a teacher it is that average alone, which is evaluated and kept.
"""

import torch
from torch import nn

from kd.outputs import Batch, Outputs
from kd.students.learner import Learner, Making


class MeanTeacher(Learner):
    """The run's own network `student`, and `mean`, the average of its past, as a teacher.

    After step k, counted from 0, each of the average's weights becomes a * its own + (1 - a) * the student's with
    a = min(decay, 1 - 1 / (k + 1)), so that it is the plain mean at the beginning. Buffers of floating point (batch
    norm's statistics) are averaged too, others are copied. Differs from the paper's code: the average is in eval mode.

    Args:
        decay: a in the long run; the paper has 0.99 first and 0.999 later.
    """

    names, untrained = ("student", "mean"), ("mean",)

    def __init__(self, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"MeanTeacher: decay {decay} must be in [0, 1)")
        self.decay = decay

    def setup(self, student: nn.Module, making: Making) -> None:
        from kd.models import freeze

        self.student, self.mean = student, student.twin()
        self.mean.network.load_state_dict(student.network.state_dict())
        freeze(self.mean)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "mean": self.mean}

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        outputs = super().forward(batch)
        if "mean" in self.used:
            with torch.no_grad():
                outputs["mean"] = self.mean.outputs(batch.inputs)
        return outputs

    def after_step(self, step: int) -> None:
        decay = min(self.decay, 1 - 1 / (step + 1))
        current = self.student.network.state_dict()
        for name, average in self.mean.network.state_dict().items():
            if average.is_floating_point():
                average.lerp_(current[name], 1 - decay)
            else:
                average.copy_(current[name])
