"""What a run's config.yaml names: its data, as another command takes them on this machine, and others' networks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jsonargparse import ArgumentParser

from kd.run.config import FREE_FIELDS, DataConfig
from kd.run.messages import explain
from kd.util.contents import read_network
from kd.util.errors import UserError
from kd.util.files import file_sha256

_FIELDS = [f.name for f in dataclasses.fields(DataConfig)]
_NEVER_NULL = [f.name for f in dataclasses.fields(DataConfig) if f.default is not None]
# Folders, processes and memory: where and how whoever trained the run had its images is not followed.
_OF_A_MACHINE = {name.removeprefix("data.") for name in FREE_FIELDS}


def recorded_data(settings: Mapping, run: str, **ours) -> DataConfig:
    """The data that a run was trained with.

    Args:
        settings: `data` of its config.yaml.
        run: its name, for errors.
        ours: fields that are given here instead.

    Raises:
        UserError: a field has a value that it cannot have.
    """
    given = {name: value for name, value in settings.items() if name in _FIELDS and name not in _OF_A_MACHINE}
    if absent := [name for name in _NEVER_NULL if given.get(name, 0) is None]:  # the parser lets it through
        raise UserError(f"run {run!r} is damaged: config.yaml: data.{absent[0]} is null")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataConfig, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": {**given, **ours}})).data
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(f"run {run!r} is damaged: config.yaml: {explain(str(error))}") from None


def teachers_of(config: Mapping) -> list[str]:
    """The teachers that a resolved config names."""
    named = config.get("teacher") or []
    return [named] if isinstance(named, str) else list(named)


def weights_of(config: Mapping) -> dict[str, str]:
    """The sha256 of the weights of each run folder, and of the file of weights, that a resolved config begins with, by
    their names there."""
    first = [config["init_from"]] if config.get("init_from") else []
    named = [name for name in [*teachers_of(config), *first] if (Path(name) / "config.json").is_file()]
    found = {name: read_network(Path(name))["sha256"] for name in named}
    file = config.get("weights")
    return found | ({file: file_sha256(Path(file))} if file and Path(file).is_file() else {})
