"""What every loss is."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows

Suit = Callable[[tuple, tuple], bool]  # whether a loss can compare two features, by their shapes without the batch axis


@dataclass
class Setting:
    """What a loss is given before the first step.

    student_shapes, teacher_shapes: shapes of the tapped features by tap name, without the batch axis.
    num_classes: K.
    labels: int64 (N,), the label at each place that `Batch.index` may name; -1 where no training image is.
    epochs, steps: how long the run is; None outside a run.
    """

    student_shapes: dict[str, tuple] = field(default_factory=dict)
    teacher_shapes: dict[str, tuple] = field(default_factory=dict)
    num_classes: int | None = None
    labels: Tensor | None = None
    epochs: int | None = None
    steps: int | None = None


class Loss(nn.Module):
    """One weighted term of the objective.

    A subclass takes its hyperparameters as keyword arguments with the paper's defaults, and as `*taps, **kwargs` its
    parent's, which it hands on and which are explained there. It computes its unweighted scalar in `forward`; the
    distiller multiplies it by `weight`.

    A loss on features names the modules it needs in `student_taps` and `teacher_taps` and finds their outputs in
    `Outputs.features`. What it must learn (a regressor) it builds in `setup` as submodules, from the features' shapes.

    Under several processes `forward` sees this process's images, and the loop averages the processes' values by their
    images. A loss that compares images with each other takes `global_rows`, so that it sees the whole global batch,
    with `sees_batch` true, so that it is not computed on micro-batches of it. A buffer that the loss itself keeps
    equal on all processes is named in `replicated`; any other is rank 0's.

    A loss that reads `batch.labels` has `reads_labels` true, and is then given only the images whose label is known;
    one that takes each image to be of one class (labels int64) has `hard_labels` true, which implies it.

    Args:
        weight: factor of this term in the objective.
    """

    needs_teacher = True
    sees_batch = False
    reads_labels = False
    hard_labels = False
    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    replicated: Sequence[str] = ()

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.keep_nonnegative(weight=weight)

    def __init_subclass__(cls, **kwargs):
        """Let the signature name the parent's arguments in place of `*taps, **kwargs`: flags and recipes read it."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        _, *own = signature.parameters.values()
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            named = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            others = [p for p in inspect.signature(cls.__base__).parameters.values() if p.name not in named]
            own = sorted([*named.values(), *others], key=lambda p: (p.default is not p.empty, p.name not in named))
            own = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        cls.__signature__ = signature.replace(parameters=own)

    @property
    def name(self) -> str:
        """The name of the loss in an objective."""
        return type(self).__name__

    def require(self, condition: bool, message: str) -> None:
        """Raise a ValueError that names this loss unless the condition holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def keep_nonnegative(self, **arguments: float) -> None:
        """Keep arguments as attributes of their names; each must be a finite number, 0 or more."""
        for name, value in arguments.items():
            self.require(0 <= value < float("inf"), f"{name} {value} must be a finite number, 0 or more")
            setattr(self, name, value)

    def keep_positive(self, **arguments: float) -> None:
        """Keep arguments as attributes of their names; each must be a finite number above 0."""
        for name, value in arguments.items():
            self.require(0 < value < float("inf"), f"{name} {value} must be a finite number above 0")
            setattr(self, name, value)

    def setup(self, setting: Setting) -> None:
        """Build what is learned, and check what can be; called once, before the first step.

        Raises:
            ValueError: the shapes do not suit this loss.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """A scalar, the mean over this process's images or a function of the global batch that is equal on all
        processes; or values (B,), whose mean is taken."""
        raise NotImplementedError


class LogitLoss(Loss):
    """A loss between the student's and the teacher's logits.

    Args:
        standardize: compare each image's logits after taking their mean away and dividing by their standard deviation
            (Sun et al. 2024, Logit Standardization in Knowledge Distillation, https://arxiv.org/abs/2403.01427,
            equation 8; the paper combines it with temperature 2 and weight 9). Nothing else of a loss changes: a factor
            T^2 stays, as in the authors' code. 3 classes or more.
    """

    def __init__(self, standardize: bool = False, weight: float = 1.0):
        super().__init__(weight)
        self.standardize = standardize

    def setup(self, setting: Setting) -> None:
        self.require(
            not self.standardize or setting.num_classes is None or setting.num_classes > 2,
            "standardize turns 2 classes' logits into -0.7 and 0.7 whatever they are: nothing is learned; leave it out",
        )

    def logits(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logits (B, K), standardized if the loss is so configured."""
        pair = student.logits, teacher.logits
        return tuple(map(z_score, pair)) if self.standardize else pair


def z_score(rows: Tensor, epsilon: float = 1e-7) -> Tensor:
    """(z - mean) / (standard deviation + epsilon) of each row of (B, K), the deviation with K - 1 in its denominator.

    Epsilon and denominator are those of the authors' code of logit standardization. A row of equal entries becomes 0;
    it is divided by 1, since dividing by epsilon would give it a gradient ten million times that of its neighbours.
    """
    variance = rows.var(1, keepdim=True)
    flat = variance == 0
    scale = torch.where(flat, 1.0, torch.where(flat, 1.0, variance).sqrt() + epsilon)
    return (rows - rows.mean(1, keepdim=True)) / scale


class SoftenedLoss(LogitLoss):
    """A loss on probabilities softened by a temperature: softmax(logits / temperature).

    Args:
        temperature: T, above 0; higher makes small probabilities count more.
    """

    def __init__(self, temperature: float, standardize: bool = False, weight: float = 1.0):
        super().__init__(standardize, weight)
        self.keep_positive(temperature=temperature)


class StagesLoss(Loss):
    """A loss between several features of the student and as many of the teacher, pair by pair.

    Args:
        student_taps, teacher_taps: dotted module names, in the order of the pairs; `python -m kd.models NAME` lists
            them.
    """

    def __init__(self, student_taps: list[str], teacher_taps: list[str], weight: float = 1.0):
        super().__init__(weight)
        self.require(
            len(student_taps) == len(teacher_taps) > 0,
            f"{len(student_taps)} student_taps and {len(teacher_taps)} teacher_taps; name as many, in pairs",
        )
        self.student_taps, self.teacher_taps = list(student_taps), list(teacher_taps)

    def shapes(self, setting: Setting, suit: Suit | None = None, remedy: str = "") -> list[tuple[tuple, tuple]]:
        """For each pair the shapes of the student's and the teacher's feature, without the batch axis.

        Raises:
            ValueError: a pair does not suit; with its shapes and the remedy.
        """
        found = self._pairs(setting.student_shapes, setting.teacher_shapes)
        for pair, shapes in enumerate(found):
            if suit is not None and not suit(*shapes):
                raise StagesLoss.mismatch(self, pair, setting, remedy)
        return found

    def features(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """For each pair the student's and the teacher's feature."""
        return self._pairs(student.features, teacher.features)

    def _pairs(self, student: dict, teacher: dict) -> list[tuple]:
        taps = zip(self.student_taps, self.teacher_taps, strict=True)
        return [(student[mine], teacher[theirs]) for mine, theirs in taps]

    def mismatch(self, pair: int, setting: Setting, remedy: str) -> ValueError:
        """The error for two features that cannot be compared."""
        one, other = self.student_taps[pair], self.teacher_taps[pair]
        mine, theirs = ("x".join(map(str, shape)) for shape in StagesLoss.shapes(self, setting)[pair])
        words = f"the student's {one} is {mine} and the teacher's {other} is {theirs}; {remedy}"
        return ValueError(f"{type(self).__name__}: {words}")


class FeatureLoss(StagesLoss):
    """A loss between one feature of the student and one of the teacher.

    Args:
        student_tap, teacher_tap: dotted module names; `python -m kd.models NAME` lists them.
    """

    def __init__(self, student_tap: str, teacher_tap: str, weight: float = 1.0):
        super().__init__([student_tap], [teacher_tap], weight)
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    def shapes(self, setting: Setting, suit: Suit | None = None, remedy: str = "") -> tuple[tuple, tuple]:
        """The shapes of the student's and the teacher's feature, without the batch axis, if they suit."""
        return super().shapes(setting, suit, remedy)[0]

    def features(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's feature."""
        return super().features(student, teacher)[0]

    def mismatch(self, setting: Setting, remedy: str) -> ValueError:
        """The error for two features that cannot be compared."""
        return super().mismatch(0, setting, remedy)


class RelationLoss(FeatureLoss):
    """A loss on how the images of a batch relate to each other, in one feature of each network.

    It sees the global batch: the features of all processes, with gradients. A batch of one image has no relations, and
    the loss is 0.
    """

    sees_batch = True

    def features(self, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's feature of the global batch, in its order."""
        return tuple(global_rows(feature, batch) for feature in super().features(student, teacher))


def ramp(epoch: int, warmup_epochs: int) -> float:
    """A factor that rises linearly to 1 over the first epochs: (epoch + 1) / warmup_epochs, epochs counted from 0."""
    return min(1.0, (epoch + 1) / warmup_epochs) if warmup_epochs else 1.0
