"""Teachers from run folders or torchvision's ImageNet weights, and images of a size that suits them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from kd.models import Classifier, View, bare, build_classifier, load_classifier, torchvision_nets, view_of
from kd.teachers import Teachers
from kd.util.errors import UserError, say


def named(teacher: str | list[str] | None) -> dict[str, str]:
    """Names of a config's teachers and where each comes from: `teacher`, or `teacher1`, `teacher2`, ... of a list."""
    each = [teacher] if teacher and isinstance(teacher, str) else teacher or []
    each = [one if Path(one).is_dir() else bare(one) for one in each]
    return {f"teacher{number if len(each) > 1 else ''}": one for number, one in enumerate(each, 1)}


def load_teachers(
    teacher: str | list[str] | None, classes: Sequence[str], mean: str, device: torch.device, trust: bool = False
) -> Teachers | None:
    """Teachers from run folders, or torchvision classifiers with their ImageNet weights, by name.

    A run's classes must be the student's, in any order. A torchvision classifier may know more (ImageNet's 1000): its
    logits of the student's classes are used. `trust` is that of `kd.load`.

    Returns:
        None where none is named.

    Raises:
        UserError: a folder is missing, unfinished, damaged or names code that is not trusted, or classes do not match.
    """
    members = {name: _load_member(one, classes, trust) for name, one in named(teacher).items()}
    return Teachers(members, classes, mean).to(device) if members else None


def _of_torchvision(name: str) -> bool:
    return name in torchvision_nets.names() and not Path(name).is_dir()


def _load_member(name: str, classes: Sequence[str], trust: bool) -> Classifier:
    if _of_torchvision(name):
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


def settle_stored(config) -> None:
    """Set `data.store_size` and `data.store_channels` where the teachers take larger or coloured images, and say so.

    Args:
        config: a `kd.run.config.DistillConfig`. Its resolved form is changed too: a run is resumed and measured on
            images of the size that it was trained on.

    Raises:
        UserError: a teacher's folder is missing or damaged.
    """
    data, names = config.data, named(config.teacher).values()
    views = [torchvision_nets.view(name) if _of_torchvision(name) else view_of(name) for name in names]
    size = max((side for side in map(_side, views) if side), default=0)
    chosen = {}
    if data.store_size is None and data.resize is not None and size > data.resize:
        chosen["store_size"] = size
        say(f"data: images are stored for the teacher at up to {size} pixels; the student sees {data.resize} of them")
    if data.store_channels is None and data.channels == 1 and any(view.channels == 3 for view in views):
        chosen["store_channels"] = 3
        say("data: images are stored in colour for the teacher; the student sees their luminance")
    for name, value in chosen.items():
        setattr(data, name, value)
        config.resolved["data"][name] = value


def _side(view: View) -> int | None:
    """The shorter side of the images that a network was trained on."""
    return view.resize or (min(view.source_size) if view.source_size else None)


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
