"""The command line and the recipes: from flags and YAML to a config (jsonargparse: default < recipe < flag)."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections import deque
from pathlib import Path
from string import Template
from typing import get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from kd.run.config import (
    DEFAULT_LOSSES,
    FREE_FIELDS,
    AdoptConfig,
    DataConfig,
    DistillConfig,
    OptimizerConfig,
    TeacherConfig,
)
from kd.run.messages import explain, unknown_field
from kd.run.objective import CHANGE, can_be_true, change_losses, explain_loss, with_defaults
from kd.util.errors import UserError
from kd.util.own_code import blamed
from kd.util.yaml_files import read_yaml

_INNER = ("losses.", "losses+", "learner.", "model_args.", "optimizer.args.")  # of fields whose own are not known here
_SCRIPTS = {TeacherConfig: "train_teacher.py", DistillConfig: "distill.py", AdoptConfig: "python -m kd.adopt"}


def parse(config_class, argv: list[str] | None, positional: str | None = None):
    """A config from a recipe (`--config`) and flags, and its resolved form.

    Args:
        config_class: TeacherConfig, DistillConfig, EvaluateConfig or AdoptConfig.
        argv: the arguments; None for the command line's.
        positional: name of a list of positional arguments to take too.

    Returns:
        The config; its attribute `resolved` is the same as plain nested values, losses as class_path and init_args.

    Raises:
        UserError: unknown field, wrong type, impossible value.
        SystemExit: `--help`, `--losses.help NAME` or `--print_config` was given, and is answered.
    """
    if os.getcwd() not in sys.path:  # so that my_losses.MyLoss is found beside the recipe's command
        sys.path.append(os.getcwd())
    argv, fields = sys.argv[1:] if argv is None else list(argv), _fields(config_class)
    parser = _make_parser(config_class, positional, wants_help=not {"-h", "--help"}.isdisjoint(argv))
    flags, words = _read_flags(argv, {**fields, "config": str, "print_config": bool}, positional)
    if "losses.help" in (given := dict(flags)):
        explain_loss(given["losses.help"])
        sys.exit(0)
    recipes = {value: read_yaml(Path(value)) for name, value in flags if name == "config"}
    for file, recipe in recipes.items():
        _check_recipe(file, recipe, config_class)
    whole = any(name == "losses" for name, _ in flags) or any("losses" in recipe for recipe in recipes.values())
    if config_class in DEFAULT_LOSSES and not whole:
        parser.set_defaults({"losses": DEFAULT_LOSSES[config_class]})
    try:
        with blamed("losses or learner"):
            namespace = parser.parse_args(_for_jsonargparse(flags) + words)
            if "losses" in fields:
                change_losses(namespace.losses, flags)
            if "output_dir" in fields:
                namespace.output_dir = _expand(namespace.output_dir)
                parser.validate(namespace)
            values = parser.instantiate(namespace)
        config = config_class(**{name: values[name] for name in fields if "." not in name})
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(explain(str(error))) from None
    except RecursionError:
        raise UserError("a value is nested too deeply, or holds itself") from None
    if positional:
        setattr(config, positional, values[positional])
    if "losses" in fields and not config.losses:
        raise UserError("no loss is given; add one to losses, for example --losses+=CrossEntropy")
    resolved = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    config.resolved = {name: value for name, value in resolved.items() if name in fields}
    if "overwrite" in fields:
        config.resolved["overwrite"] = False  # or a run started again from its own config.yaml would delete itself
        config.resolved["output_dir"] = config.output_dir.replace("$", "$$")
    config.resolved.pop("trust_code", None)  # what a run may do is said by who starts it, each time
    if "print_config" in given:
        print(yaml.safe_dump(config.resolved, sort_keys=False), end="")
        sys.exit(0)
    return config


def _make_parser(config_class, positional: str | None, wants_help: bool) -> ArgumentParser:
    # Only the help shows the strings below the fields; to read them takes as long as all else here.
    set_parsing_settings(docstring_parse_attribute_docstrings=wants_help)
    parser = ArgumentParser(
        description=config_class.__doc__,
        usage=f"%(prog)s {'RUN ...' if positional else '[--config RECIPE]'} [--FIELD VALUE ...]",
        allow_abbrev=False,
        print_config=None,
        exit_on_error=False,
    )
    if positional:
        parser.add_argument(positional, nargs="+", type=str, help="run folders")
    else:
        parser.add_argument("--config", action="config", help="YAML recipe; flags win over it")
        parser.add_argument("--print_config", action="store_true", help="show what results, and end")
    parser.add_class_arguments(config_class, nested_key=None)
    if wants_help:
        parser.print_help()
        sys.exit(0)
    return parser


def _fields(config_class, prefix: str = "") -> dict[str, type]:
    """All fields by their dotted names, groups of fields among them, with their types."""
    found = {}
    for name, kind in get_type_hints(config_class).items():
        found[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            found |= _fields(kind, f"{prefix}{name}.")
    return found


def _read_flags(argv: list[str], fields: dict[str, type], positional: str | None) -> tuple[list, list[str]]:
    """The arguments as pairs (field, value) and, where the script takes them, positional words.

    A field that can be true may stand alone: `--overwrite`.
    """
    flags, words, rest = [], [], deque(argv)
    while rest:
        word = rest.popleft()
        name, given, value = word[2:].partition("=")
        if not word.startswith("--"):
            if not (word and positional):
                raise UserError(f"unexpected argument {word!r}; flags are written --name value")
            words.append(word)
            continue
        if name not in fields and not name.startswith(_INNER):
            raise unknown_field(name, fields)
        if not given:
            boolean = fields.get(name) is bool or bool in get_args(fields.get(name)) or can_be_true(name)
            follows = bool(rest) and not rest[0].startswith("--")
            if follows and not (boolean and positional and rest[0].lower() not in ("true", "false")):
                value = rest.popleft()
            elif boolean:
                value = "true"
            else:
                raise UserError(f"--{name} has no value")
        flags.append((name, value))
    return flags, words


def _check_recipe(file: str, recipe: dict, config_class) -> None:
    """Refuse what jsonargparse would take, or refuse in words that help nobody."""
    fields, flat = _fields(config_class), {str(name): value for name, value in recipe.items()}
    for group in ("data", "optimizer"):
        inner = recipe.get(group)
        flat |= {f"{group}.{name}": value for name, value in inner.items()} if isinstance(inner, dict) else {}
    for name, value in flat.items():
        if name not in fields:
            others = [script for kind, script in _SCRIPTS.items() if name in _fields(kind)]
            if others:
                raise UserError(f"{file} is a recipe of {others[0]}, which alone has the field {name!r}")
            raise UserError(f"{file}: {unknown_field(name, fields)}")
        if value is None and (name == "losses" or dataclasses.is_dataclass(fields[name])):
            raise UserError(f"{file}: {name} is empty; leave it out for the defaults")
    if not isinstance(losses := recipe.get("losses", []), list):
        raise UserError(f"{file}: losses: {losses!r} is no list")
    for loss in losses:
        if not isinstance(loss, str) and not (isinstance(loss, dict) and "class_path" in loss):
            raise UserError(f"{file}: losses: {loss!r} is neither a name nor class_path and init_args")
        if isinstance(loss, dict) and loss.get("init_args", {}) is None:
            raise UserError(f"{file}: losses: {loss['class_path']}: init_args is empty; leave it out for the defaults")


def _for_jsonargparse(flags: list[tuple[str, str]]) -> list[str]:
    """The arguments for jsonargparse: it lets the last one win, so that recipes come first, and it keeps the arguments
    of a list's items where the new list has the same length and classes, so that a list is emptied first."""
    words = [f"--config={value}" for name, value in flags if name == "config"]
    for name, value in flags:
        if name not in ("config", "print_config") and not CHANGE.fullmatch(name):
            words += ["--losses=[]"] * (name == "losses") + [f"--{name}={value}"]
    return words


def _expand(output_dir: str) -> str:
    """The path with the environment's `$NAME` in it replaced, such as a sweep's `runs/sweeps/digits/$WANDB_RUN_ID`, and
    `~` at its beginning, which a shell leaves in `--output_dir=~/runs/x`."""
    if (path := os.path.expanduser(output_dir)).startswith("~"):
        raise UserError(f"output_dir {output_dir!r}: there is no user of this name here; a folder is written ./~name")
    try:
        return Template(path).substitute(os.environ)
    except (KeyError, ValueError) as error:
        what = f"${error.args[0]} is not set in the environment" if isinstance(error, KeyError) else str(error)
        raise UserError(f"output_dir {output_dir!r}: {what}; a dollar itself is written $$") from None


def differing_fields(old: dict, new: dict) -> list[str]:
    """The fields, dotted, in which two resolved configs differ, those that do not change the result left out.

    What `old` lacks, because an earlier version wrote it, counts as the default.
    """

    def flat(value, prefix=""):
        if prefix == "learner":
            yield prefix, value and with_defaults([value])[0]
        elif isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, with_defaults(value) if prefix == "losses" else value

    a, b = dict(flat(old)), dict(flat(new))
    a = {**{name: _default(name) for name in b}, **a}
    names = [name for name in sorted(a | b) if name not in FREE_FIELDS and a.get(name) != b.get(name)]
    return [f"{name} ({a.get(name)!r} there, {b.get(name)!r} here)" for name in names]


def _default(name: str):
    """The default of a config's dotted field; None where there is none."""
    group, _, leaf = name.rpartition(".")
    kinds = {"": (DistillConfig, TeacherConfig), "data": (DataConfig,), "optimizer": (OptimizerConfig,)}
    defaults = (getattr(kind(), leaf, None) for kind in kinds.get(group, ()))
    return next((default for default in defaults if default is not None), None)
