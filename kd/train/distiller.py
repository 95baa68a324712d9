"""The learner and the terms of its objective as one module: all that is trained, prepared and checkpointed as one."""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd import keyed
from kd.losses import Loss, Setting, Term
from kd.outputs import Batch, Outputs
from kd.students import Learner
from kd.train.meter import count_right
from kd.train.trial import scalar
from kd.util.errors import UserError, unknown


class Distiller(nn.Module):
    """Learner and losses behind one `forward`, so that what a loss learns is in the optimizer, in DDP and in the
    checkpoint by construction.

    Args:
        learner: set up already.
        losses: the terms; a loss alone is one for `student` from `teacher`. Two of one name are told apart by a number.
        teachers: a `kd.teachers.Teachers`, which is tapped for the features that the losses need; not kept.
        image_shape: (C, H, W) of the stored images, from which the features' shapes are found.
        setting: what the losses are told, without the shapes.
        seed: of the first weights of what the losses learn.

    Attributes:
        losses: every pair's loss by the name under which it is logged.
        right: of the last forward, by kept network how many images it gives the class of their label: a scalar.

    Raises:
        UserError: there is no loss, a name or a tap does not exist, or the features' shapes do not suit a loss.
    """

    def __init__(
        self,
        learner: Learner,
        losses: Sequence[Loss],
        teachers: nn.Module | None = None,
        image_shape: tuple[int, int, int] | None = None,
        setting: Setting | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not losses:
            raise UserError("no loss is given; add one to losses, for example CrossEntropy")
        self.learner = learner
        self.losses = nn.ModuleDict()
        self.right: dict[str, Tensor] = {}
        self._joins: dict[str, tuple[str, str | None]] = {}
        self._weights: dict[str, float] = {}
        self._turns: dict[str, str | None] = {}
        self._words = []
        for term in map(Term.of, losses):
            self._add(term, teachers)
        joined = {student for student, _ in self._joins.values()}
        if idle := [name for name in learner.names if name not in joined and name not in learner.untrained]:
            raise UserError(f"no term of losses trains {', '.join(idle)}; add one, for example a Term of CrossEntropy")
        self._connect(teachers, image_shape, setting or Setting(), seed)
        # DistributedDataParallel need not send what the losses keep equal themselves, a memory bank for example.
        self._ddp_params_and_buffers_to_ignore = [
            f"losses.{name}.{buffer}" for name, loss in self.losses.items() for buffer in loss.replicated
        ]

    def _add(self, term: Term, teachers: nn.Module | None) -> None:
        """Give each pair of names that a term joins a loss of its own."""
        names = self.learner.names
        known = [*(teachers.names if teachers is not None else ()), *names]
        trained = [name for name in names if name not in self.learner.untrained]
        students = fnmatch.filter(trained, term.student)
        if not students:
            raise unknown(f"student of {term.name}", term.student, trained, "set it with a Term around the loss")
        pairs = [(student, None) for student in students]
        if term.needs_teacher:
            found = fnmatch.filter(known, term.teacher)
            pairs = [(student, source) for student in students for source in found if source != student]
        if term.turn is not None and term.turn not in self.learner.turns:
            raise unknown(f"turn of {term.name}", term.turn, self.learner.turns, "these are the learner's")
        if not pairs and teachers is None and term.teacher == "teacher":
            raise UserError(f"losses: {term.name} needs a teacher; give one with distill.py --teacher RUN")
        if not pairs:
            raise unknown(f"teacher of {term.name}", term.teacher, known, "of the learner's outputs and the teachers")
        labels: list[str] = []
        for student, source in pairs:
            name = term.name if len(pairs) == 1 and not term.words() else f"{term.name}[{student}"
            if name != term.name:
                name += f"<{source}]" if source else "]"
            count = sum(other == name or other.startswith(name + "_") for other in self.losses)
            name = f"{name}_{count + 1}" if count else name
            labels.append(name)
            self.losses[name] = term.loss if len(pairs) == 1 else copy.deepcopy(term.loss)
            self._joins[name] = student, source
            self._turns[name] = term.turn
            self._weights[name] = term.weight / sum(one == student for one, _ in pairs)
        label = labels[0] if len(labels) == 1 else f"{term.name}{term.words()}"
        self._words.append(f"{term.weight:g} * {label}{_arguments(term.loss)}")

    def _connect(self, teachers: nn.Module | None, image_shape, setting: Setting, seed: int) -> None:
        """Tap the networks for the losses, and let the losses build what they learn."""
        names = self.learner.names
        taps: dict[str, set[str]] = {}
        for name, loss in self.losses.items():
            student, source = self._joins[name]
            taps.setdefault(student, set()).update(loss.student_taps)
            if source is not None:
                taps.setdefault(source, set()).update(loss.teacher_taps)
        for name, wanted in taps.items():
            (self.learner if name in names else teachers).tap(name, sorted(wanted))
        self.learner.used = frozenset(taps)
        shapes: dict[str, dict[str, tuple]] = {name: {} for name in taps}
        if any(taps[name] for name in taps if name in names):
            shapes |= _feature_shapes(self.learner, image_shape)
        if teachers is not None and any(taps[name] for name in taps if name not in names):
            shapes |= teachers.feature_shapes(image_shape)
        network = next(iter(self.learner.networks.values()))
        setting = replace(setting, num_classes=len(network.classes))
        torch.manual_seed(keyed.key(seed, keyed.Purpose.FIRST_WEIGHTS) & (2**63 - 1))
        for name, loss in self.losses.items():
            student, source = self._joins[name]
            try:
                loss.setup(replace(setting, student_shapes=shapes[student], teacher_shapes=shapes.get(source, {})))
            except ValueError as error:
                raise UserError(str(error)) from None

    @property
    def needs_teacher(self) -> bool:
        """Whether a term joins a teacher outside the learner."""
        return any(source not in (None, *self.learner.names) for _, source in self._joins.values())

    def forward(self, batch: Batch, teachers: dict[str, Outputs]) -> dict[str, Tensor]:
        """The weighted terms, each a float32 scalar, the mean over this process's images.

        Args:
            teachers: outputs by name of those that are not part of the learner, float32.
        """
        outputs = {name: part.float() for name, part in self.learner(batch).items()}
        self.right = count_right({name: outputs.get(name) for name in self.learner.networks}, batch.labels)
        # Half precision has too few bits for a logarithm of a small probability: losses always run in float32.
        with torch.autocast(batch.labels.device.type, enabled=False):
            names = [name for name in self.losses if self._turns[name] in (None, batch.turn)]
            return {name: self._weights[name] * self._value(name, outputs, teachers, batch) for name in names}

    def _value(self, name: str, outputs: dict[str, Outputs], teachers: dict[str, Outputs], batch: Batch) -> Tensor:
        loss, (student_name, source) = self.losses[name], self._joins[name]
        student, teacher = outputs[student_name], None
        if source is not None:
            teacher = teachers[source] if source in teachers else outputs[source].detach()
            student = student.of_classes(teacher.classes)
        share = 1.0
        if batch.labelled is not None and (loss.reads_labels or loss.hard_labels):
            if not len(batch.labelled):  # in the graph, so that every parameter has a gradient on every process
                return 0.0 * student.logits.sum()
            where, share = batch.labelled, batch.labelled_share
            student, teacher, batch = student.rows(where), teacher and teacher.rows(where), batch.rows(where)
        value = scalar(name, loss(student, teacher, batch), batch)
        return value if share == 1.0 else share * value

    def objective(self) -> str:
        """The objective in words: every term with its weight and hyperparameters."""
        return " + ".join(self._words)


@torch.no_grad()
def _feature_shapes(learner: Learner, image_shape: tuple[int, int, int]) -> dict[str, dict[str, tuple]]:
    """Shapes of the outputs' features for one blank image, by output and tap, without the batch axis."""
    modes = {module: module.training for module in learner.modules()}
    device = next(learner.parameters()).device
    image = torch.zeros(1, *image_shape, dtype=torch.uint8, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    outputs = learner.eval()(Batch({"image": image}, index, index))
    for module, training in modes.items():
        module.training = training
    return {
        name: {tap: tuple(feature.shape[1:]) for tap, feature in part.features.items()}
        for name, part in outputs.items()
    }


def _arguments(loss: Loss) -> str:
    names = [name for name in inspect.signature(type(loss)).parameters if name != "weight"]
    shown = {name: value for name in names if (value := getattr(loss, name, False)) is not False}
    return f"({', '.join(f'{k}={v}' for k, v in shown.items())})" if shown else ""
