"""The learner and the terms of its objective as one module: all that is trained, prepared and checkpointed as one."""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd import keyed
from kd.losses import Loss, Setting, Term
from kd.outputs import Batch, Outputs
from kd.students import Learner
from kd.train.meter import count_right
from kd.train.trial import scalar
from kd.util.errors import UserError, unknown


class _Pair(NamedTuple):
    """What one loss joins: an output of the learner, and its teacher if there is one; its weight, and its turn."""

    student: str
    source: str | None
    weight: float
    turn: str | None


class Distiller(nn.Module):
    """Learner and losses behind one `forward`, so that what a loss learns is in the optimizer, in DDP and in the
    checkpoint by construction.

    Args:
        learner: set up already.
        losses: the terms; a loss alone is one for `student` from `teacher`. Two of one name are told apart by a number.
        teachers: a `kd.teachers.Teachers`, which is tapped for the features that the losses need; not kept.
        image_shape: (C, H, W) of the stored images, from which the features' shapes are found.
        setting: what the losses are set up with, without the shapes.
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
        self.learner, self.losses, self._pairs = learner, nn.ModuleDict(), {}
        self.right: dict[str, Tensor] = {}
        self._words = [self._add(term, teachers) for term in map(Term.of, losses)]
        joined = {*learner.untrained, *(pair.student for pair in self._pairs.values())}
        if idle := [name for name in learner.names if name not in joined]:
            raise UserError(f"no term of losses trains {', '.join(idle)}; add one, for example a Term of CrossEntropy")
        self._connect(teachers, image_shape, setting or Setting(), seed)
        # DistributedDataParallel need not send what the losses keep equal themselves, a memory bank for example.
        kept_equal = ((name, buffer) for name, loss in self.losses.items() for buffer in loss.replicated)
        self._ddp_params_and_buffers_to_ignore = [f"losses.{name}.{buffer}" for name, buffer in kept_equal]

    def _add(self, term: Term, teachers: nn.Module | None) -> str:
        """Give each pair of names that a term joins a loss of its own; returns the term in words."""
        learner = self.learner
        trained = [name for name in learner.names if name not in learner.untrained]
        known = [*(teachers.names if teachers is not None else ()), *learner.names]
        students = fnmatch.filter(trained, term.student)
        sources = fnmatch.filter(known, term.teacher) if term.needs_teacher else [None]
        pairs = [(student, source) for student in students for source in sources if source != student]
        if not students:
            raise unknown(f"student of {term.name}", term.student, trained, "set it with a Term around the loss")
        if term.turn is not None and term.turn not in learner.turns:
            raise unknown(f"turn of {term.name}", term.turn, learner.turns, "these are the learner's")
        if not pairs and teachers is None and term.teacher == "teacher":
            raise UserError(f"losses: {term.name} needs a teacher; give one with distill.py --teacher RUN")
        if not pairs:
            raise unknown(f"teacher of {term.name}", term.teacher, known, "of the learner's outputs and the teachers")
        for student, source in pairs:
            name = term.name
            if len(pairs) > 1 or term.words():
                name += f"[{student}<{source}]" if source else f"[{student}]"
            if count := sum(other == name or other.startswith(name + "_") for other in self.losses):
                name += f"_{count + 1}"
            self.losses[name] = copy.deepcopy(term.loss) if len(pairs) > 1 else term.loss
            weight = term.weight / sum(one == student for one, _ in pairs)
            self._pairs[name] = _Pair(student, source, weight, term.turn)
        label = name if len(pairs) == 1 else f"{term.name}{term.words()}"
        return f"{term.weight:g} * {label}{_arguments(term.loss)}"

    def _connect(self, teachers: nn.Module | None, image_shape, setting: Setting, seed: int) -> None:
        """Tap the networks for the losses, and let the losses build what they learn."""
        taps: dict[str, set[str]] = {}
        for name, pair in self._pairs.items():
            taps.setdefault(pair.student, set()).update(self.losses[name].student_taps)
            if pair.source is not None:
                taps.setdefault(pair.source, set()).update(self.losses[name].teacher_taps)
        self.learner.used = frozenset(taps)
        shapes: dict[str | None, dict[str, tuple]] = {None: {}, **{name: {} for name in taps}}
        mine = {name: wanted for name, wanted in taps.items() if name in self.learner.names}
        theirs = {name: wanted for name, wanted in taps.items() if name not in mine}
        for owner, part in ((self.learner, mine), (teachers, theirs)):
            for name, wanted in part.items():
                owner.tap(name, sorted(wanted))
            if any(part.values()):
                shapes |= _feature_shapes(owner, image_shape)
        setting = replace(setting, num_classes=len(next(iter(self.learner.networks.values())).classes))
        torch.manual_seed(keyed.key(seed, keyed.Purpose.FIRST_WEIGHTS) & (2**63 - 1))
        for name, pair in self._pairs.items():
            own = replace(setting, student_shapes=shapes[pair.student], teacher_shapes=shapes[pair.source])
            try:
                self.losses[name].setup(own)
            except ValueError as error:
                raise UserError(str(error)) from None

    @property
    def needs_teacher(self) -> bool:
        """Whether a term joins a teacher outside the learner."""
        return any(pair.source not in (None, *self.learner.names) for pair in self._pairs.values())

    def forward(self, batch: Batch, teachers: dict[str, Outputs]) -> dict[str, Tensor]:
        """The weighted terms, each a float32 scalar, the mean over this process's images.

        Args:
            teachers: outputs by name of those that are not part of the learner, float32.
        """
        outputs = {name: part.float() for name, part in self.learner(batch).items()}
        self.right = count_right({name: outputs.get(name) for name in self.learner.networks}, batch.labels)
        # Half precision has too few bits for a logarithm of a small probability: losses always run in float32.
        with torch.autocast(batch.labels.device.type, enabled=False):
            pairs = {name: pair for name, pair in self._pairs.items() if pair.turn in (None, batch.turn)}
            return {name: pair.weight * self._value(name, outputs, teachers, batch) for name, pair in pairs.items()}

    def _value(self, name: str, outputs: dict[str, Outputs], teachers: dict[str, Outputs], batch: Batch) -> Tensor:
        loss, pair = self.losses[name], self._pairs[name]
        student, teacher = outputs[pair.student], None
        if pair.source is not None:
            teacher = teachers[pair.source] if pair.source in teachers else outputs[pair.source].detach()
            student = student.of_classes(teacher.classes)
        share = 1.0
        if batch.labelled is not None and (loss.reads_labels or loss.hard_labels):
            if not len(batch.labelled):  # in the graph, so that every parameter has a gradient on every process
                return 0.0 * (student.logits.sum() + sum(parameter.sum() for parameter in loss.parameters()))
            where, share = batch.labelled, batch.labelled_share
            student, teacher, batch = student.rows(where), teacher and teacher.rows(where), batch.rows(where)
        value = scalar(name, loss(student, teacher, batch), batch)
        return value if share == 1.0 else share * value

    def objective(self) -> str:
        """The objective in words: every term with its weight and hyperparameters."""
        return " + ".join(self._words)


@torch.no_grad()
def _feature_shapes(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, dict[str, tuple]]:
    """Shapes of a learner's or teachers' features for one blank image, by output and tap, without the batch axis."""
    modes = {module: module.training for module in network.modules()}
    device = next(network.parameters()).device
    image = torch.zeros(1, *image_shape, dtype=torch.uint8, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    outputs = network.eval()(Batch({"image": image}, index, index))
    for module, training in modes.items():
        module.training = training
    return {name: {tap: tuple(f.shape[1:]) for tap, f in part.features.items()} for name, part in outputs.items()}


def _arguments(loss: Loss) -> str:
    names = [name for name in inspect.signature(type(loss)).parameters if name != "weight"]
    shown = {name: value for name in names if (value := getattr(loss, name, False)) is not False}
    return f"({', '.join(f'{k}={v}' for k, v in shown.items())})" if shown else ""
