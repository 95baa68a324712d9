"""A run that is started again with a later end: whether it may be, and whether it is later than where it ended."""

from __future__ import annotations

import math
from pathlib import Path

from kd.run.config import ENDS, seconds_of
from kd.run.parse import differing_fields
from kd.util.contents import read_config, read_summary
from kd.util.errors import UserError


def check_extension(folder: Path, old: dict, new: dict) -> None:
    """Look whether a run may resume with another resolved config.

    Raises:
        UserError: it differs in more than its end, has fewer epochs, or what was trained depends on their number.
    """
    remedy = "name another output_dir, or pass --overwrite true to delete it"
    others = differing_fields({**old, **{name: new[name] for name in ENDS if name in new}}, new)
    if others or new.get("epochs", 0) < old.get("epochs", 0):
        differing = "; ".join(differing_fields(old, new))
        raise UserError(
            f"output_dir {str(folder)!r} holds a run of another config; it differs in {differing}; {remedy}"
        )
    if new.get("epochs") == old.get("epochs"):
        return
    why = ""
    if new["optimizer"]["schedule"] == "cosine":
        why = "with optimizer.schedule cosine the learning rate of every step depends on the number of epochs"
    elif new["max_steps"] is not None:
        why = f"max_steps {new['max_steps']} ends it earlier"
    if why:
        raise UserError(
            f"output_dir {str(folder)!r} holds a run of {old.get('epochs')} epochs, which cannot be extended to "
            f"{new['epochs']}: {why}; {remedy}"
        )


def ends_later(folder: Path, new: dict) -> bool:
    """Whether a finished run would have ended later with this resolved config.

    Raises:
        UserError: it does not hold how it ended.
    """
    ended_by, old = read_summary(folder).get("stopped_by") or "epochs", read_config(folder)
    if ended_by not in ENDS:
        raise UserError(f"run {str(folder)!r} is damaged: summary.json: stopped_by is {ended_by!r:.60}")
    return ended_by in new and _limit(new, ended_by) > _limit(old, ended_by)


def _limit(config: dict, name: str) -> float:
    """What a field of `ENDS` allows at most."""
    value = config.get(name)
    try:
        return seconds_of(value) if name == "max_time" else value or math.inf
    except ValueError as error:
        raise UserError(f"config.yaml of the run: {error}") from None
