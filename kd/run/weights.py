"""Which weights a run begins with: other runs' networks, known by their checksum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kd.util.contents import read_network


def teachers_of(config: Mapping) -> list[str]:
    """The teachers that a resolved config names."""
    named = config.get("teacher") or []
    return [named] if isinstance(named, str) else list(named)


def weights_of(config: Mapping) -> dict[str, str]:
    """The sha256 of the weights of each run folder that a resolved config learns from; each as it is named there."""
    first = [config["init_from"]] if config.get("init_from") else []
    named = [name for name in [*teachers_of(config), *first] if (Path(name) / "config.json").is_file()]
    return {name: read_network(Path(name))["sha256"] for name in named}
