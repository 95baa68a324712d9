"""The losses of a recipe: found by name, explained, and changed by flags such as `--losses.KL.temperature 8`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys

import yaml

from kd.losses import LOSSES, Loss
from kd.students import LEARNERS, Learner
from kd.util.errors import UserError, unknown
from kd.util.yaml_files import load_yaml

# --losses.NAME.ARGUMENT; `--losses.ARGUMENT` and these two are jsonargparse's own, of the list's last loss
CHANGE = re.compile(r"losses\.(?!init_args|dict_kwargs)(\w+)\.(\w+)")

ARGUMENTS = re.compile(r"^    (\w+(?:, \w+)*): .*(?:\n {8}.*)*", re.M)  # one entry, or two of one text, below Args:


def change_losses(losses: list, flags: list[tuple[str, str]]) -> None:
    """Set arguments of those losses of a parsed list that a flag names: `--losses.KL.temperature 8`; of several with
    one name, of all; the loss of a `Term` is one of them."""
    inner = [loss.init_args.get("loss") for loss in losses if "init_args" in loss]
    losses = [loss for loss in (*losses, *inner) if hasattr(loss, "class_path")]
    names = [loss.class_path.rpartition(".")[2] for loss in losses]
    for flag, value in flags:
        if not (match := CHANGE.fullmatch(flag)):
            continue
        name, argument = match.groups()
        if name not in names:
            raise unknown(f"loss in --{flag}", name, {*names}, "these are the objective's")
        for loss in (loss for loss, its in zip(losses, names, strict=True) if its == name):
            if argument not in (known := arguments_of(loss.class_path)):
                raise unknown(f"argument of {name}", argument, list(known), "see --losses.help " + name)
            loss.init_args[argument] = _value(flag, value)


def can_be_true(flag: str) -> bool:
    """Whether a flag `losses.NAME.ARGUMENT` sets a boolean of a loss that is known without an import."""
    match = CHANGE.fullmatch(flag)
    parameter = arguments_of(match[1]).get(match[2]) if match else None
    return parameter is not None and parameter.annotation in (bool, "bool")


def _value(flag: str, text: str):
    with contextlib.suppress(ValueError):
        return json.loads(text)  # knows 1e-05, which YAML 1.1 takes for a word
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--{flag}: {text[:200]!r} cannot be read as YAML") from None


def explain_loss(name: str) -> None:
    """Print what a loss is, and the flags by which a recipe that holds it is changed."""
    if name not in LOSSES:
        with contextlib.suppress(ImportError, ValueError):
            importlib.import_module(name.rpartition(".")[0])
    short, found = name.rpartition(".")[2], _imported(name)
    if found is None or not issubclass(found, Loss):
        raise unknown("loss", name, LOSSES, "or the import path of your own, as my_package.MyLoss")
    print(f"{short}: {_explained(found)}\n\nAdd it to a recipe: --losses+={name}\nChange it there:")
    for argument, parameter in arguments_of(name).items():
        default = "VALUE" if parameter.default is parameter.empty else json.dumps(parameter.default)
        print(f"    --losses.{short}.{argument} {default}")


def _explained(loss: type[Loss]) -> str:
    """A loss's docstring, and below its arguments those that only its parents' docstrings explain."""
    text, known = inspect.getdoc(loss), inspect.signature(loss).parameters
    for parent in loss.__mro__[1 : loss.__mro__.index(Loss) + 1]:
        for entry in ARGUMENTS.finditer(inspect.getdoc(parent).partition("\nArgs:\n")[2]):
            if known.keys() >= (names := set(entry[1].split(", "))) and not names & _documented(text):
                text += ("" if "\nArgs:\n" in text else "\n\nArgs:") + f"\n{entry[0]}"
    return text


def _documented(text: str) -> set[str]:
    return {name for entry in ARGUMENTS.finditer(text) for name in entry[1].split(", ")}


def _imported(name: str) -> type | None:
    """A loss or a learner by its name, or by its import path if that is imported by now: nothing is imported here."""
    module, _, leaf = name.rpartition(".")
    found = LOSSES.get(name) or LEARNERS.get(name) or getattr(sys.modules.get(module), leaf, None)
    return found if isinstance(found, type) and issubclass(found, Loss | Learner) else None


def arguments_of(name: str) -> dict[str, inspect.Parameter]:
    """The arguments of a loss or a learner; none where it is not known."""
    found = _imported(name)
    return dict(inspect.signature(found).parameters) if found else {}


def with_defaults(losses: list[dict]) -> list[dict]:
    """Losses or learners as class_path and init_args, all of their arguments among them."""
    whole = []
    for entry in losses if isinstance(losses, list) else []:
        parameters = arguments_of(entry["class_path"])
        given = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        whole.append({**entry, "init_args": {**given, **(entry.get("init_args") or {})}})
    return whole
