"""Teachers: frozen classifiers by name, which give logits in the student's class order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kd.models import Classifier, bare, build_classifier, freeze, load_classifier, torchvision_nets
from kd.outputs import Batch, Outputs
from kd.util.errors import UserError, say


class Teachers(nn.Module):
    """One or several frozen classifiers. Each prepares the images in its own way; all see the same augmented images.

    Args:
        members: the classifiers by name; frozen here. Of several, `teacher` is their mean.
        classes: the student's class names, which the logits are ordered by. A member may know fewer of them: its
            outputs then say which.
        mean: of several members, the mean of their logits (a geometric mean of probabilities) or of `probabilities`
            (arithmetic; the result is the logarithm of the mean, so a temperature softens the mean).

    Attributes:
        names: of the outputs.
    """

    def __init__(self, members: Mapping[str, Classifier], classes: Sequence[str], mean: str = "logits"):
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.mean, self.classes = mean, list(classes)
        self.names = (*self.members, "teacher") if len(self.members) > 1 else tuple(self.members)
        for name, member in self.members.items():
            known = [i for i, one in enumerate(classes) if one in member.classes]
            order = torch.tensor([member.classes.index(classes[i]) for i in known])
            self.register_buffer(f"order_{name}", order, persistent=False)
            fewer = torch.tensor(known) if len(known) < len(classes) else None
            self.register_buffer(f"known_{name}", fewer, persistent=False)
        freeze(self)
        self._taps: dict[str, set[str]] = {}
        self._folded: dict[str, Classifier] = {}  # with batch norm folded, from the first batch on

    def tap(self, name: str, taps: Iterable[str]) -> None:
        """Let `outputs` have this name, with the features of these modules, by dotted name.

        Raises:
            UserError: features of the mean of several members, or no such module.
        """
        self._taps.setdefault(name, set()).update(taps)
        if name in self.members:
            self.members[name].tap(taps)
        elif taps:
            some = ", ".join(self.members)
            raise UserError(
                f"losses on features ({', '.join(taps)}) need one teacher, not the mean; name one of {some}"
            )
        self._folded = {}

    @property
    def used(self) -> list[str]:
        """The names that have been tapped; where none has, the first of all or their mean."""
        return [name for name in self.names if name in self._taps] or [self.names[-1]]

    @property
    def taps(self) -> dict[str, list[str]]:
        """The modules whose features `outputs` gives, by each used name."""
        return {name: sorted(self._taps.get(name, ())) for name in self.used}

    def _apply(self, *arguments, **named):
        self._folded = {}  # the weights move to another place
        return super()._apply(*arguments, **named)

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Outputs]:
        """Logits (B, K), float32, and tapped features for the columns of a `Batch`, by name."""
        if not self._folded:
            self._folded = {name: member.folded() for name, member in self.members.items()}
        used = self.used
        wanted = [name for name in self.members if name in used or "teacher" in used]
        outputs = {name: self._of(name, inputs) for name in wanted}
        if "teacher" not in self.members and "teacher" in used:
            outputs["teacher"] = self._mean([outputs[name].logits for name in self.members])
        return {name: outputs[name] for name in used}

    def _of(self, name: str, inputs: dict[str, Tensor]) -> Outputs:
        with torch.inference_mode():
            given = self._folded[name].outputs(inputs)
        # what is made in inference mode cannot be kept for a backward pass; indexing copies it
        logits = given.logits[:, getattr(self, f"order_{name}")].float()
        features = {tap: _float(feature) for tap, feature in given.features.items()}
        return Outputs(logits, features, getattr(self, f"known_{name}"))

    def _mean(self, logits: list[Tensor]) -> Outputs:
        if self.mean == "logits":
            return Outputs(torch.stack(logits).mean(0))
        log_probabilities = torch.stack(logits).log_softmax(-1)
        return Outputs(log_probabilities.logsumexp(0) - math.log(len(logits)))

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        """What `outputs` gives for a batch; looked up where the batch has the columns `NAME.logits` already."""
        if f"{self.used[0]}.logits" not in batch.inputs:
            return self.outputs(batch.inputs)
        outputs = {}
        for name in self.used:
            prefix = f"{name}.features."
            features = {key[len(prefix) :]: column for key, column in batch.inputs.items() if key.startswith(prefix)}
            outputs[name] = Outputs(batch.inputs[f"{name}.logits"], features, getattr(self, f"known_{name}", None))
        return outputs

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, K) of the only member, or of the mean of all."""
        return self.outputs(inputs)[self.names[-1]].logits


def columns(outputs: dict[str, Outputs]) -> dict[str, Tensor]:
    """Outputs by name as the columns of a batch that `Teachers.forward` looks for."""
    found = {}
    for name, part in outputs.items():
        found[f"{name}.logits"] = part.logits
        found |= {f"{name}.features.{tap}": feature for tap, feature in part.features.items()}
    return found


def _float(feature: Tensor) -> Tensor:
    """In float32, and a copy."""
    return feature.clone() if feature.dtype == torch.float32 else feature.float()


def named(teacher: str | list[str]) -> dict[str, str]:
    """Names of a config's teachers and where each comes from: `teacher`, or `teacher1`, `teacher2`, ... of a list."""
    each = [teacher] if isinstance(teacher, str) else teacher
    each = [one if Path(one).is_dir() else bare(one) for one in each]
    return {f"teacher{number if len(each) > 1 else ''}": one for number, one in enumerate(each, 1)}


def load_teachers(
    teacher: str | list[str],
    classes: Sequence[str],
    mean: str,
    device: torch.device,
    trust: bool = False,
) -> Teachers | None:
    """Teachers from run folders, or torchvision classifiers with their ImageNet weights, by name.

    A run's classes must be the student's, in any order. A torchvision classifier may know more (ImageNet's 1000): its
    logits of the student's classes are used. `trust` is that of `kd.load`.

    Returns:
        None where none is named.

    Raises:
        UserError: a folder is missing, unfinished, damaged or names code that is not trusted, or classes do not match.
    """
    if not teacher:
        return None
    members = {name: _load_member(one, classes, trust) for name, one in named(teacher).items()}
    return Teachers(members, classes, mean).to(device)


@torch.no_grad()
def other_sizes(teachers: Teachers | None, image_shape: tuple[int, int, int]) -> list[str]:
    """What is to be said where a teacher was made for images of another size than the stored ones, (C, H, W).

    Raises:
        UserError: a teacher does not take them at all; tried with a blank one.
    """
    lines, (height, width) = [], image_shape[1:]
    for member in teachers.members.values() if teachers is not None else ():
        try:
            member(torch.zeros(1, *image_shape, dtype=torch.uint8, device=member.preprocess.scale.device))
        except (RuntimeError, ValueError) as error:
            shape = "x".join(map(str, image_shape))
            raise UserError(
                f"the teacher {member.recipe['model']} does not take the data's images ({shape}): {str(error)[:150]}; "
                f"see that data.source and data.resize are those it was trained with"
            ) from None
        view = member.preprocess.view
        made_for = view.source_size or (view.resize and (view.resize, view.resize)) or (height, width)
        if (height, width) != made_for and (view.source_size or min(height, width) < view.resize):
            lines.append(
                f"{member.recipe['model']} was made for images of {made_for[1]}x{made_for[0]} and sees these at "
                f"{width}x{height}, which can make it worse; see that data.source and data.resize are those it was "
                f"trained with"
            )
    return lines


def _load_member(name: str, classes: Sequence[str], trust: bool) -> Classifier:
    if name in torchvision_nets.names() and not Path(name).is_dir():
        entry = torchvision_nets.pretrained(name, "imagenet")
        known = entry.meta["categories"]
        missing = [c for c in classes if c not in known]
        if missing:
            raise UserError(
                f"teacher {name!r} with its ImageNet weights does not know {_some(missing)}; "
                f"fit it to your classes first with train_teacher.py --model {name} --weights imagenet"
            )
        say(f"teacher {name}: the logits of the {len(classes)} classes among its {len(known)} are used")
        return build_classifier(name, known, torchvision_nets.view(name), weights="imagenet")
    member = load_classifier(name, trust=trust)
    missing, extra = [c for c in classes if c not in member.classes], [c for c in member.classes if c not in classes]
    if missing or extra:
        raise UserError(
            f"teacher {name!r} has other classes than the data"
            + (f"; it does not know {_some(missing)}" if missing else "")
            + (f"; the data does not have {_some(extra)}" if extra else "")
            + "; use a teacher trained on the same classes"
        )
    return member


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
