"""Knowledge Distillation with the Reused Teacher Classifier (SimKD). Chen et al. 2022. https://arxiv.org/abs/2203.14001

The teacher's frozen head stands behind the student's last feature map and a projector; see `kd.models.reused_head`.
"""

from torch import nn

from kd.students.learner import Learner, Making
from kd.util.errors import UserError


class ReusedHead(Learner):
    """The run's own network up to its last map, a projector, and the teacher's head; its output is `student`.

    The paper's objective is the loss `SimKD` between `projector` and the teacher's last map.

    Args:
        tap: the module that gives the student's last feature map; null where it is known, as in ResNets.
    """

    def __init__(self, tap: str | None = None):
        super().__init__()
        self.last_tap = tap

    def setup(self, student: nn.Module, making: Making) -> None:
        from kd.models import reuse_head

        count = 0 if making.teachers is None else len(making.teachers.members)
        if count != 1:
            raise UserError(f"ReusedHead needs one teacher, whose head it keeps, not {count}")
        if student.head is not None:
            words = "ReusedHead freezes the head and freeze_backbone all but the head"
            raise UserError(f"{words}: nothing would be trained")
        (teacher,) = making.teachers.members.values()
        self.student = reuse_head(student, teacher, making.image_shape, self.last_tap)
