"""What the files of a run folder hold, checked: content of known types, or one line that names the file and the fault.

The tables below say what is read from each file: `name` or, where it may be absent, `name?`, and its type: a type, a
tuple of alternatives, [type] for a list, {str: type} for any names, Any. Other fields are let through. Every reader
raises a UserError where its file is damaged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd.util.errors import UserError
from kd.util.yaml_files import read_yaml

_OPTIONAL_STRING, _OPTIONAL_INT = (str, None), (int, None)
_ARGUMENTS = {
    "weight?": float,
    "temperature?": float,
    **dict.fromkeys(("student_tap?", "teacher_tap?"), str),
    "student_taps?": [str],
    "teacher_taps?": [str],
}
_CONFIG = {
    # the rest of data is checked by `kd.run.recorded`
    "data": {"source": str, **dict.fromkeys(("num_train?", "num_labels?"), _OPTIONAL_INT)},
    "losses?": [{"class_path": str, "init_args?": (_ARGUMENTS, None)}],
    "epochs?": int,  # it and losses are absent where nothing was trained, see `kd.tools.adopt`
    "output_dir": str,
    "seed?": int,
    "model?": _OPTIONAL_STRING,
    "student?": _OPTIONAL_STRING,
    "model_args?": ({str: Any}, None),
    "teacher?": (str, [str], None),
    "teacher_mean?": str,
    "init_from?": _OPTIONAL_STRING,
    "weights?": _OPTIONAL_STRING,
    "max_steps?": _OPTIONAL_INT,
    "max_time?": _OPTIONAL_STRING,
    "patience?": int,
    "optimizer?": {"name?": str, "lr?": float},
}
_SPLIT = {"images": int, **dict.fromkeys(("split", "pixels", "looks"), str), "files": _OPTIONAL_STRING}
_INPUTS = {"overwrote?": bool, "data?": {str: _SPLIT}, "weights?": {str: str}}
_SUMMARY = {
    "test_accuracy": float,
    "val_accuracy": (float, None),
    **dict.fromkeys(("num_params", "multiply_adds", "seed"), int),
    "seconds": float,
    "images": {"test": int},
    **dict.fromkeys(("test_nll?", "test_ece?"), float),
    **dict.fromkeys(("bytes?", "steps?"), int),
    **dict.fromkeys(("device?", "stopped_by?"), str),
    "versions?": {str: _OPTIONAL_STRING},
    "inputs?": (_INPUTS, None),
    "stopped_by?": str,
}
_ROW = {"step": int, "epoch": int}
_PROGRESS = {
    **dict.fromkeys(("step", "metrics_bytes"), int),
    "seconds": float,
    "sums": {str: {str: [float]}},
    "best": {str: {"epoch": int, "val_accuracy": float}},
    "standing": {str: {"first": (float, None), "epochs": int, "one_class": int, "said": bool}},
}
_NETWORK = {"model": str, "model_args": {str: Any}, "classes": [str], "preprocess": {str: Any}, "sha256": str}


def read_config(folder: Path) -> dict:
    """A run's resolved config, from config.yaml."""
    file = folder / "config.yaml"
    content = read_yaml(file)
    if wrong := _wrong(content, _CONFIG):
        raise UserError(f"{file} is no run's config: {wrong}")
    return content


def read_summary(folder: Path) -> dict:
    """A finished run's summary.json; a UserError too where the run is not finished."""
    if not (folder / "summary.json").is_file():
        raise UserError(f"run {str(folder)!r} is not finished (no summary.json); run its command again to resume it")
    return _read(folder / "summary.json", _SUMMARY)


def read_network(folder: Path) -> dict:
    """What is needed to load a run's network, from config.json, which must be there."""
    return _read(folder / "config.json", _NETWORK)


def read_inputs(folder: Path) -> dict | None:
    """What a run learns from, from inputs.json; None where there is none.

    Returns:
        `overwrote`, whether it began in place of another; `data` by split, see `kd.data.identity`; `weights`, a sha256
        by run folder.

    Raises:
        UserError: its inputs.json is damaged.
    """
    return _read(folder / "inputs.json", _INPUTS, absent=None)


def wrong_progress(content: object) -> str:
    """Why the progress in a checkpoint's state.json is none; empty if it is one."""
    return _wrong(content, _PROGRESS)


def read_choices(folder: Path) -> dict[str, str]:
    """What a run chose by itself when it began, from .choices.json, see `kd.run.folder.Run.settle`."""
    return _read(folder / ".choices.json", {str: str}, absent={})


def read_tracker(folder: Path) -> dict[str, str]:
    """The ids that a run has in trackers, by `TRACKER_id`, from tracker.json."""
    remedy = "delete the file, and a new run of the tracker begins"
    return _read(folder / "tracker.json", {str: str}, remedy, absent={})


def read_rows(content: bytes) -> tuple[list[dict], list[int]]:
    """The rows of metrics.jsonl, and the numbers of the lines that hold none."""
    rows, bad = [], []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        bad.append(number) if _wrong(row, _ROW) else rows.append(row)
    return rows, bad


_REQUIRED = object()


def _read(file: Path, kind: dict, remedy: str = "train it again with --overwrite true", absent=_REQUIRED):
    """The checked content of a JSON file; `absent` where it is not there."""
    if absent is not _REQUIRED and not file.is_file():
        return absent
    try:
        content = json.loads(file.read_bytes())
        wrong = _wrong(content, kind)
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"run {str(file.parent)!r} is damaged: {file.name}: {wrong}; {remedy}")
    return content


def _wrong(value: object, kind, name: str = "it") -> str:
    """Why a plain value is not what a table says; empty if it is."""
    if isinstance(kind, tuple):
        reasons = [_wrong(value, each, name) for each in kind]
        return reasons[0] if all(reasons) else ""
    if isinstance(kind, dict):
        return _wrong_mapping(value, kind, name) if isinstance(value, dict) else f"{name} is {value!r:.60}, no mapping"
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{name} is {value!r:.60}, no list"
        return next(filter(None, (_wrong(each, kind[0], f"an entry of {name}") for each in value)), "")
    if kind is Any or (kind is None and value is None):
        return ""
    known = (float, int) if kind is float else kind or ()
    if isinstance(value, known) and isinstance(value, bool) == (kind is bool):
        return ""
    return f"{name} is {value!r:.60}, not of type {kind.__name__ if kind else 'null'}"


def _wrong_mapping(value: dict, kind: dict, name: str) -> str:
    if str in kind:
        names = (_wrong(key, str, f"a name in {name}") for key in value)
        return next(filter(None, (*names, *(_wrong(each, kind[str], key) for key, each in value.items()))), "")
    for key, each in kind.items():
        required, key = not key.endswith("?"), key.removesuffix("?")
        reason = _wrong(value[key], each, key) if key in value else f"{name} lacks {key}" if required else ""
        if reason:
            return reason
    return ""
