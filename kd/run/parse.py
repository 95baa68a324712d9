"""The command line and the recipes: from flags and YAML to a config (jsonargparse: default < recipe < flag)."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from kd.losses import LOSSES, Loss
from kd.run.config import DEFAULT_LOSSES, FREE_FIELDS, DataConfig, DistillConfig, OptimizerConfig, TeacherConfig
from kd.util.errors import UserError, unknown


class _Parser(ArgumentParser):
    """jsonargparse's parser whose errors are one line that names what is known."""

    def error(self, message, ex=None):
        raise UserError(_explain(self, str(message)))


def parse(config_class, argv: list[str] | None, positional: str | None = None):
    """A config from a recipe (`--config`) and flags, and its resolved form.

    Args:
        config_class: TeacherConfig, DistillConfig or EvaluateConfig.
        argv: the arguments; None for the command line's.
        positional: name of a list of positional arguments to take too.

    Returns:
        The config; its attribute `resolved` is the same as plain nested values, losses as class_path and init_args.

    Raises:
        UserError: unknown field, wrong type, impossible value.
    """
    if os.getcwd() not in sys.path:  # so that my_losses.MyLoss is found beside the recipe's command
        sys.path.append(os.getcwd())
    argv = sys.argv[1:] if argv is None else list(argv)
    # Only the help shows the strings below the fields; to read them takes as long as all else here.
    set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv))
    parser = _Parser(description=config_class.__doc__, allow_abbrev=False)
    if positional:
        parser.add_argument(positional, nargs="+", type=str, help="run folders")
    else:
        parser.add_argument("--config", action="config", help="YAML recipe; flags win over it")
    parser.add_class_arguments(config_class, nested_key=None)
    argv = _replace_losses(_recipes_first(argv))
    argv, changes = _take_changes(argv)
    if config_class in DEFAULT_LOSSES and not _gives_losses(argv):
        parser.set_defaults({"losses": DEFAULT_LOSSES[config_class]})
    try:
        namespace = parser.parse_args(argv)
        if "output_dir" in namespace:
            namespace.output_dir = _expand("output_dir", namespace.output_dir)
        if changes:
            _change_losses(namespace.losses, changes)
            parser.validate(namespace)
        values = parser.instantiate(namespace)
        chosen = {key: values[key] for key in [f.name for f in dataclasses.fields(config_class)]}
        config = config_class(**chosen)
    except (ValueError, TypeError, argparse.ArgumentError) as error:
        raise UserError(_explain(parser, str(error))) from None
    if positional:
        setattr(config, positional, values[positional])
    resolved = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    config.resolved = {name: value for name, value in resolved.items() if name in chosen}
    if "overwrite" in chosen:
        config.resolved["overwrite"] = False  # or a run started again from its own config.yaml would delete itself
    config.resolved.pop("trust_code")  # what a run may do is said by who starts it, each time
    return config


def _recipes_first(argv: list[str]) -> list[str]:
    """The arguments with `--config FILE` in front, since jsonargparse lets the last one win, whichever it is."""
    recipes, flags, rest = [], [], iter(argv)
    for word in rest:
        if word == "--config":
            recipes += [word, *itertools.islice(rest, 1)]
        else:
            (recipes if word.startswith("--config=") else flags).append(word)
    return recipes + flags


def _replace_losses(argv: list[str]) -> list[str]:
    """Put `--losses=[]` before a whole list of losses.

    jsonargparse keeps the arguments of a list's items where the new list has the same length and classes: a recipe's
    weight would stay in a list that does not mention it.
    """
    return [part for word in argv for part in (["--losses=[]", word] if word.split("=")[0] == "--losses" else [word])]


def _take_changes(argv: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Take `--losses.KL.temperature 8` out of the arguments: what is left, and (loss, argument, value) of each."""
    left, changes, words = [], [], iter(argv)
    for word in words:
        flag, given, value = word.partition("=")
        match = re.fullmatch(r"--losses\.(\w+)\.(\w+)", flag)
        if not match or match[1] in ("help", "init_args", "dict_kwargs"):  # jsonargparse's own, of the list's last loss
            left.append(word)
            continue
        value = value if given else next(words, None)
        if value is None:
            raise UserError(f"{flag} has no value")
        changes.append((match[1], match[2], value))
    return left, changes


def _change_losses(losses: list, changes: list[tuple[str, str, str]]) -> None:
    """Set arguments of those losses of a parsed list that have a name; of several with one name, of all."""
    names = [loss.class_path.rpartition(".")[2] for loss in losses]
    for name, argument, value in changes:
        if name not in names:
            raise unknown("loss in --losses." + name + "." + argument, name, names, "these are the objective's")
        for loss in (loss for loss, its in zip(losses, names, strict=True) if its == name):
            if argument not in (known := _arguments_of(loss.class_path)):
                raise unknown(f"argument of {name}", argument, list(known), "see --losses.help " + name)
            try:
                loss.init_args[argument] = json.loads(value)  # knows 1e-05, which YAML 1.1 takes for a word
            except ValueError:
                loss.init_args[argument] = yaml.safe_load(value)


def _expand(name: str, path: str) -> str:
    """A path with the environment's `$NAME` in it replaced, such as a sweep's `runs/sweeps/digits/$WANDB_RUN_ID`."""
    expanded = os.path.expandvars(path)
    if left := re.search(r"\$(\w+|{\w+})", expanded):
        raise UserError(f"{name} {path!r}: {left[0]} is not set in the environment")
    return expanded


def _gives_losses(argv: list[str]) -> bool:
    """Whether a flag or a recipe gives a whole list of losses."""
    files = [b for a, b in itertools.pairwise(argv) if a == "--config"]
    files += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    recipes = [read_yaml(Path(file)) for file in files if Path(file).is_file()]
    return "--losses=[]" in argv or any("losses" in recipe for recipe in recipes)


def _explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message with the known names and the nearest one, in one line."""
    message = " ".join(message.split())
    flags = sorted({o[2:] for action in parser._actions for o in action.option_strings if o.startswith("--")})
    fields = [flag for flag in flags if "+" not in flag and ".help" not in flag and flag != "help"]
    if message.startswith("unrecognized arguments:"):
        words = message.partition(":")[2].split()
        bad = next((word for word in words if word.startswith("--")), None)
        if bad is None:
            return f"unexpected argument {words[0]!r}; flags are written --name value"
        return str(unknown("field", bad[2:].split("=")[0], fields))
    if "does not accept option" in message or "is not accepted" in message or "not accepted by" in message:
        quoted = message.split("'")[1::2]
        if message.startswith("Group "):
            return str(
                unknown("field", f"{quoted[0]}.{quoted[1]}", [f for f in fields if f.startswith(quoted[0] + ".")])
            )
        if "Problem with given class_path" in message:
            name = quoted[0].rpartition(".")[2]
            return str(
                unknown(f"argument of {name}", quoted[1], list(_arguments_of(quoted[0])), "see --losses.help " + name)
            )
        return str(unknown("field", quoted[-1], fields))
    if message.startswith('Parser key "losses"') and "dot import path" in message:
        bad = message.rpartition(":")[2].strip()
        return str(unknown("loss", bad, LOSSES, "or the import path of your own, as my_package.MyLoss"))
    several = re.fullmatch(r'Parser key "([\w.]+)": Does not .* Subtypes: \[(.*)\] Errors.* Given value: (.*)', message)
    if several:
        name, kinds, value = several.groups()
        found = re.findall(r"<class '(\w+)'>|typing\.Literal(\[.*?\])", kinds)
        kinds = " or ".join(kind.replace("NoneType", "null") or f"one of {names}" for kind, names in found) or kinds
        return f"{name}: {value!r} is of the wrong type; it takes {kinds}"
    wrong = re.fullmatch(r'Parser key "([\w.]+)": Expected a (.+)\. Got value: (.*)', message)
    if wrong:
        name, kind, value = wrong.groups()
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.Literal", "one of ")
        return f"{name}: {value!r} is of the wrong type; it takes {kind}"
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)


def _arguments_of(class_path: str) -> dict[str, inspect.Parameter]:
    for loss in _subclasses(Loss):
        names = (f"{loss.__module__}.{loss.__name__}", f"{Loss.__module__.rpartition('.')[0]}.{loss.__name__}")
        if class_path in (*names, loss.__name__):
            return dict(inspect.signature(loss).parameters)
    return {}


def _subclasses(cls) -> list[type]:
    return [sub for direct in cls.__subclasses__() for sub in (direct, *_subclasses(direct))]


def differing_fields(old: dict, new: dict) -> list[str]:
    """The fields, dotted, in which two resolved configs differ, those that do not change the result left out.

    What `old` lacks, because an earlier version wrote it, counts as the default.
    """

    def flat(value, prefix=""):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, _with_defaults(value) if prefix == "losses" else value

    a, b = dict(flat(old)), dict(flat(new))
    a = {**{name: _default(name) for name in b}, **a}
    names = [name for name in sorted(a | b) if name not in FREE_FIELDS and a.get(name) != b.get(name)]
    return [f"{name} ({a.get(name)!r} there, {b.get(name)!r} here)" for name in names]


def _default(name: str):
    """The default of a config's dotted field; None where there is none."""
    path, _, leaf = name.rpartition(".")
    kinds = {"": (DistillConfig, TeacherConfig), "data": (DataConfig,), "optimizer": (OptimizerConfig,)}
    for field in (field for kind in kinds.get(path, ()) for field in dataclasses.fields(kind)):
        if field.name == leaf and field.default is not dataclasses.MISSING:
            return field.default
        if field.name == leaf and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return None


def _with_defaults(losses: list[dict]) -> list[dict]:
    """Losses as class_path and init_args, all of their arguments among them."""
    whole = []
    for entry in losses if isinstance(losses, list) else []:
        parameters = _arguments_of(entry["class_path"])
        given = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        whole.append({**entry, "init_args": {**given, **(entry.get("init_args") or {})}})
    return whole


def read_yaml(path: Path) -> dict:
    """A YAML file's fields.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged or no config: it holds no fields but {str(content)[:60]!r}")
    return content
