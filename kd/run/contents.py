"""What the files of a run folder say, checked: typed content or one line that names the file and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from kd.run.parse import read_yaml
from kd.util.errors import UserError


def read_json(file: Path) -> dict:
    """A JSON file's fields.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"run {str(file.parent)!r} is damaged: {file.name}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"run {str(file.parent)!r} is damaged: {file.name} holds no fields but {str(content)[:60]!r}")
    return content


def read_config(folder: Path) -> dict:
    """A run's resolved config.

    Raises:
        UserError: its config.yaml cannot be read, or is not one that a run wrote.
    """
    file = folder / "config.yaml"
    content = read_yaml(file)
    if not isinstance(content.get("data"), dict) or not {"output_dir", "losses", "epochs"} <= content.keys():
        raise UserError(f"{file} is no run's config: it lacks data, losses, epochs or output_dir")
    return content


def read_summary(folder: Path) -> dict:
    """A finished run's summary.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"run {str(folder)!r} is not finished (no summary.json); run its command again to resume it")
    return read_json(file)
