"""How large and how coloured images are stored: so that each network of a run can prepare them in its own way."""

from __future__ import annotations

from pathlib import Path

from kd.models import View, torchvision_nets, view_of
from kd.teachers import named
from kd.util.errors import say


def settle_stored(config) -> None:
    """Set `data.store_size` and `data.store_channels` where the teachers take larger or coloured images, and say so.

    Args:
        config: a `kd.run.config.DistillConfig`. Its resolved form is changed too: a run is resumed and measured on
            images of the size that it was trained on.

    Raises:
        UserError: a teacher's folder is missing or damaged.
    """
    data, views = config.data, [_view(name) for name in named(config.teacher).values()] if config.teacher else []
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


def _view(name: str) -> View:
    known = not Path(name).is_dir() and name in torchvision_nets.names()
    return torchvision_nets.view(name) if known else view_of(name)


def _side(view: View) -> int | None:
    """The shorter side of the images that a network was trained on."""
    return view.resize or (min(view.source_size) if view.source_size else None)
