"""What every learner is: all that is trained, with outputs by name and the networks that are kept."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kd.outputs import Batch, Outputs


@dataclass
class Making:
    """What a learner is set up with besides the run's own network.

    make: `make(name, model_args, number)` is a further classifier, whose first weights are a function of the run's seed
        and this number, 2 or more; the run's own network has the number 1.
    teachers: the run's `kd.teachers.Teachers`, or None.
    image_shape: (C, H, W) of the stored images.
    """

    make: Callable[[str, dict[str, Any], int], nn.Module]
    teachers: nn.Module | None
    image_shape: tuple[int, int, int]


class Learner(nn.Module):
    """All that is trained but what the losses own. What is registered in it is in the optimizer where it requires
    gradients, in DistributedDataParallel and in the checkpoint.

    A subclass takes its hyperparameters as keyword arguments, builds its networks in `setup`, and gives outputs by name
    in `forward`. A term of the objective joins two of these names, or one of them and a teacher's, see `Term`.

    Attributes:
        names: of the outputs of `forward`, known after `setup`.
        untrained: those of them without gradients, which can only be a term's teacher.
        used: those of them that a term joins, known before the first step.
        turns: names of what alternates, empty where every step is alike. A term that has one counts in its turn only.
    """

    names: tuple[str, ...] = ("student",)
    untrained: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()
    turns: tuple[str, ...] = ()

    def setup(self, student: nn.Module, making: Making) -> None:
        """Take the run's own network, a `kd.models.Classifier`, and build what else there is.

        Raises:
            UserError: the network or an argument does not suit.
        """
        self.student = student

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The classifiers that are kept, by name: measured on validation and test, written, loaded by `kd.load`.

        The first is the run's own; another one called NAME lies in RUN/NAME.
        """
        return {"student": self.student}

    def tap(self, output: str, names: Sequence[str]) -> None:
        """Let an output have the features of these modules, by dotted name.

        Raises:
            UserError: there is no such module.
        """
        if names:
            self.networks[output].tap(names)

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        """The outputs for a batch, by name."""
        return {"student": self.student.outputs(batch.inputs, batch.keys)}

    def turn(self, step: int) -> str | None:
        """Whose turn a step is: by default one after another."""
        return self.turns[step % len(self.turns)] if self.turns else None

    def still(self, turn: str | None) -> Iterable[nn.Parameter]:
        """The parameters that do not move in a turn, though gradients may flow through them."""
        return ()

    def after_step(self, step: int) -> None:
        """Called without gradients after each update of the weights; `step` is counted from 0.

        It must be a function of the weights, the buffers and the step, equal on all processes.
        """


class Plain(Learner):
    """One network, whose output is `student`."""
