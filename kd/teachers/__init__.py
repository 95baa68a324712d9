"""The teacher: frozen classifiers that answer with logits in the student's class order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kd.models import Classifier, View, build_classifier, freeze, load_classifier, torchvision_nets
from kd.outputs import Batch, Outputs
from kd.util.errors import UserError, say


class Teacher(nn.Module):
    """One or several frozen classifiers. Each prepares the images in its own way; all see the same augmented images.

    Args:
        members: the classifiers; frozen here.
        classes: the student's class names, which the logits are ordered by.
        mean: of several members, the mean of their logits (a geometric mean of probabilities) or of `probabilities`
            (arithmetic; the result is the logarithm of the mean, so a temperature softens the mean).
    """

    def __init__(self, members: Sequence[Classifier], classes: Sequence[str], mean: str = "logits"):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mean, self.classes = mean, list(classes)
        orders = [torch.tensor([member.classes.index(name) for name in classes]) for member in members]
        for i, order in enumerate(orders):
            self.register_buffer(f"order_{i}", order, persistent=False)
        freeze(self)
        self._asked: list[Classifier] = []  # the members with batch norm folded, from the first question on

    def tap(self, names: Iterable[str]) -> None:
        """Let the outputs have the features of these modules, by dotted name.

        Raises:
            UserError: there are several members, or no such module.
        """
        if len(self.members) > 1:
            raise UserError(f"losses on features ({', '.join(names)}) need one teacher, not {len(self.members)}")
        self.members[0].tap(names)
        self._asked = []

    def _apply(self, *arguments, **named):
        self._asked = []  # the weights go elsewhere
        return super()._apply(*arguments, **named)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """Logits (B, K), float32, and tapped features for uint8 images (B, C, H, W)."""
        if not self._asked:
            self._asked = [member.folded() for member in self.members]
        with torch.inference_mode():
            said = [member.outputs(images) for member in self._asked]
        # what is made in inference mode cannot be kept for a backward pass; indexing makes it anew
        logits = [part.logits[:, getattr(self, f"order_{i}")].float() for i, part in enumerate(said)]
        if len(logits) == 1:
            return Outputs(logits[0], {name: _float(feature) for name, feature in said[0].features.items()})
        if self.mean == "logits":
            return Outputs(torch.stack(logits).mean(0))
        log_probabilities = torch.stack(logits).log_softmax(-1)
        return Outputs(log_probabilities.logsumexp(0) - math.log(len(logits)))

    def answer(self, batch: Batch) -> Outputs:
        """What the teacher says about a batch's images."""
        return self.outputs(batch.images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.outputs(images).logits


def _float(feature: Tensor) -> Tensor:
    """In float32, and made anew."""
    return feature.clone() if feature.dtype == torch.float32 else feature.float()


def load_teacher(
    names: str | list[str], classes: Sequence[str], mean: str, device: torch.device, trust: bool = False
) -> Teacher:
    """A teacher from run folders, or torchvision classifiers with their ImageNet weights, by name.

    A run's classes must be the student's, in any order. A torchvision classifier may know more (ImageNet's 1000): its
    logits of the student's classes are used. `trust` is that of `kd.load`.

    Raises:
        UserError: a folder is missing, unfinished, damaged or names code that is not trusted, or classes do not match.
    """
    names = [names] if isinstance(names, str) else names
    members = [_load_member(name, classes, trust) for name in names]
    return Teacher(members, classes, mean).to(device)


def other_sizes(teacher: Teacher, image_shape: tuple[int, int, int]) -> list[str]:
    """What is to be said where a teacher was made for images of another size than the stored ones, (C, H, W)."""
    lines, (height, width) = [], image_shape[1:]
    for member in teacher.members:
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
        shape = entry.transforms()
        view = View(resize=shape.resize_size[0], crop=shape.crop_size[0], mean=tuple(shape.mean), std=tuple(shape.std))
        say(f"teacher {name}: the logits of the {len(classes)} classes among its {len(known)} are used")
        return build_classifier(name, known, view, weights="imagenet")
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
