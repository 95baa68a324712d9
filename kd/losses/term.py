"""A loss and whom it joins."""

from kd.losses.base import Loss, Setting


class Term(Loss):
    """A loss between outputs by name: `student` and `teacher` are patterns as of file names, such as `peer*`.

    Each pair of names that match gets an instance of the loss of its own; no output is its own teacher. Of several
    teachers of one student the mean is taken, of several students the sum. A teacher that is trained too gets no
    gradient from the term. In an objective a loss alone is a term for `student` from `teacher`.

    Args:
        loss: the loss.
        student: a pattern for names of the learner's outputs.
        teacher: a pattern for names of teachers, or of the learner's outputs; without meaning for a loss on labels.
        turn: in which of the learner's turns the term counts, for a learner that has some; null for all.
    """

    def __init__(self, loss: Loss, student: str = "student", teacher: str = "teacher", turn: str | None = None):
        super().__init__(getattr(loss, "weight", 1.0))  # without one it is refused with the other losses
        self.require(not isinstance(loss, Term), "loss is a Term itself; give the loss")
        self.loss, self.student, self.teacher, self.turn = loss, student, teacher, turn
        self.needs_teacher, self.sees_batch, self.hard_labels = loss.needs_teacher, loss.sees_batch, loss.hard_labels

    @classmethod
    def of(cls, loss: Loss) -> "Term":
        """A loss as a term; a term as it is."""
        return loss if isinstance(loss, Term) else cls(loss)

    @property
    def name(self) -> str:
        return self.loss.name

    def setup(self, setting: Setting) -> None:
        raise AssertionError("the distiller sets up the loss of each pair")

    def words(self) -> str:
        """The pair of patterns, empty where it is the ordinary one."""
        if not self.needs_teacher:
            return "" if self.student == "student" else f"[{self.student}]"
        return "" if (self.student, self.teacher) == ("student", "teacher") else f"[{self.student}<{self.teacher}]"
