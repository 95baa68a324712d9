"""A sweep's file, in W&B's format: what is varied, how, and the command of a trial.

https://docs.wandb.ai/models/sweeps/sweep-config-keys
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import parse, read_yaml
from kd.util.errors import UserError, unknown

PROGRAMS = {"distill.py": DistillConfig, "train_teacher.py": TeacherConfig}
METRICS = {"val/accuracy": "maximize", "val/nll": "minimize"}
METHODS = ("bayes", "grid", "random")
FIELDS = ("command", "early_terminate", "method", "metric", "parameters", "program", "run_cap")
# W&B's alone: they name a sweep on its server
THEIRS = ("apiVersion", "description", "entity", "kind", "name", "project")
BOUNDED = ("int_uniform", "log_uniform", "log_uniform_values", "q_log_uniform_values", "q_uniform", "uniform")


@dataclass
class Parameter:
    """One field that a sweep varies.

    Raises:
        UserError: unknown or missing keys, bounds in the wrong order.
    """

    name: str
    spec: dict

    def __post_init__(self):
        spec, name = self.spec, f"parameters.{self.name}"
        if not isinstance(spec, dict):
            raise UserError(f"{name} is {spec!r}; it takes value, values, or min and max")
        if "parameters" in spec:
            raise UserError(f"{name} is nested; write its fields with dots, as in optimizer.lr")
        bounds = [spec.get("min"), spec.get("max")]
        whole = all(isinstance(bound, int) for bound in bounds)
        guess = "constant" if "value" in spec else "categorical" if "values" in spec else "uniform"
        self.kind = spec.get("distribution", "int_uniform" if guess == "uniform" and whole else guess)
        if self.kind not in ("constant", "categorical", *BOUNDED):
            raise unknown(f"distribution of {name}", self.kind, ("constant", "categorical", *BOUNDED))
        needs = {"constant": ["value"], "categorical": ["values"]}.get(self.kind, ["min", "max"])
        takes = {*needs, "distribution", *(["q"] if self.kind.startswith("q_") else [])}
        if extra := sorted(set(spec) - takes):
            raise unknown(f"key of {name} ({self.kind})", extra[0], takes)
        if missing := [key for key in needs if key not in spec]:
            raise UserError(f"{name} ({self.kind}) lacks {' and '.join(missing)}")
        if self.kind == "categorical" and not (isinstance(spec["values"], list) and spec["values"]):
            raise UserError(f"{name}.values is {spec['values']!r}; it takes a list")
        if self.kind in BOUNDED:
            if not all(isinstance(n, int | float) for n in [*bounds, self.step]) or bounds[0] > bounds[1]:
                raise UserError(f"{name}: min {bounds[0]!r}, max {bounds[1]!r} must be numbers, min the smaller one")
            if self.kind.endswith("_values") and bounds[0] <= 0:
                raise UserError(f"{name} ({self.kind}): min {bounds[0]} must be above 0")

    @property
    def step(self) -> float:
        """What a `q_` distribution rounds to multiples of."""
        return self.spec.get("q", 1)

    @property
    def choices(self) -> list:
        """The values of one that has few."""
        return [self.spec["value"]] if self.kind == "constant" else [_plain(value) for value in self.spec["values"]]

    @property
    def first(self):
        """A value that it can have."""
        low = self.spec.get("min")
        return (math.exp(low) if self.kind == "log_uniform" else low) if self.kind in BOUNDED else self.choices[0]

    def suggest(self, trial):
        """The value that an Optuna trial gives it, drawn as W&B would."""
        if self.kind == "constant":
            return self.spec["value"]
        if self.kind == "categorical":
            return trial.suggest_categorical(self.name, self.choices)
        low, high = self.spec["min"], self.spec["max"]
        if self.kind == "int_uniform":
            return trial.suggest_int(self.name, low, high)
        if self.kind == "log_uniform":  # W&B's bounds are exponents of e
            low, high = math.exp(low), math.exp(high)
        value = trial.suggest_float(self.name, low, high, log="log" in self.kind)
        return round(value / self.step) * self.step if self.kind.startswith("q_") else value


def _plain(value):
    """A choice as something that compares and prints: a list or mapping becomes the text that a flag takes."""
    return json.dumps(value) if isinstance(value, list | dict) else value


class Sweep:
    """A sweep's file.

    Attributes:
        parameters: a list of `Parameter`.
        metric, goal: the validation metric that is searched by, `maximize` or `minimize`.
        rungs: (first epoch, eta) of `early_terminate`: at the first epoch times 1, eta, eta^2, ... a trial that is not
            among the best 1/eta of those that came so far is stopped; None for none.

    Raises:
        UserError: the file cannot be read, or holds what this sweep could not do.
    """

    def __init__(self, file: str | os.PathLike):
        self.file = Path(file)
        content = read_yaml(self.file)
        if extra := sorted(set(content) - {*FIELDS, *THEIRS}):
            raise unknown(f"key of {file}", extra[0], (*FIELDS, *THEIRS))
        for key in ("program", "method", "parameters", "command", "metric"):
            if not content.get(key):
                raise UserError(f"{file} lacks {key}; sweeps/ has examples")
        self.program, self.method, self.run_cap = content["program"], content["method"], content.get("run_cap")
        if self.program not in PROGRAMS:
            raise unknown("program", self.program, PROGRAMS)
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if not isinstance(content["parameters"], dict):
            raise UserError(f"{file}: parameters must map fields of {self.program} to what they take")
        self.parameters = [Parameter(name, spec) for name, spec in content["parameters"].items()]
        if self.method == "grid" and (ranges := [p.name for p in self.parameters if p.kind in BOUNDED]):
            raise UserError(f"method grid takes value or values, and {', '.join(ranges)} has a range; use random")
        self._read_metric(content["metric"])
        self.rungs = self._read_rungs(content.get("early_terminate"))
        self.command = [str(word) for word in content["command"]]
        if "${program}" not in self.command or "${args}" not in self.command:
            raise UserError(f"{file}: command must hold ${{program}} and, after it, ${{args}}")
        self.identity = {key: content[key] for key in ("program", "method", "metric", "parameters", "command")}

    def _read_metric(self, metric: dict) -> None:
        self.metric = metric.get("name") if isinstance(metric, dict) else metric
        if self.metric not in METRICS:
            raise unknown("metric.name", self.metric, METRICS, "nothing is selected on the test split")
        self.goal = METRICS[self.metric]
        if metric.get("goal") != self.goal:
            raise UserError(f"metric.goal of {self.metric} must be {self.goal}, not {metric.get('goal')!r}")

    def _read_rungs(self, early: dict | None) -> tuple[int, int] | None:
        if early is None:
            return None
        known = ("type", "min_iter", "max_iter", "s", "eta")
        if extra := sorted(set(early) - set(known)):
            raise unknown("key of early_terminate", extra[0], known)
        eta, first = early.get("eta", 3), early.get("min_iter")
        if first is None and {"max_iter", "s"} <= set(early):
            first = early["max_iter"] // eta ** early["s"]  # W&B: brackets at max_iter / eta^s, ..., max_iter / eta
        if early.get("type") != "hyperband" or not isinstance(first, int) or not isinstance(eta, int):
            raise UserError("early_terminate takes type: hyperband, and min_iter or max_iter and s, and eta")
        if first < 1 or eta < 2:
            raise UserError(f"early_terminate: the first epoch {first} must be 1 or more, and eta {eta} 2 or more")
        return first, eta

    def grid(self) -> list[dict]:
        """All combinations of the parameters' values."""
        varied = [parameter for parameter in self.parameters if parameter.kind == "categorical"]
        combinations = itertools.product(*(parameter.choices for parameter in varied))
        return [dict(zip((p.name for p in varied), chosen, strict=True)) for chosen in combinations]

    def words(self, values: dict) -> list[str]:
        """The command of a trial with these values of its parameters, as W&B's agent writes it.

        Raises:
            UserError: a macro that is not known here.
        """
        macros = {
            "env": ["/usr/bin/env"],
            "interpreter": [sys.executable],
            "program": [self.program],
            "args": [f"--{name}={value}" for name, value in values.items()],
        }
        words = []
        for word in self.command:
            word = re.sub(r"\$\{envvar:(\w+)\}", lambda found: os.environ.get(found[1], found[1]), word)
            macro = re.fullmatch(r"\$\{(\w+)\}", word)
            if macro and macro[1] not in macros:
                raise unknown("macro in command", macro[0], [f"${{{name}}}" for name in (*macros, "envvar:NAME")])
            words += macros[macro[1]] if macro else [word]
        return words

    def config(self, name: str, values: dict):
        """The config that a trial of this name would run.

        Raises:
            UserError: the script would refuse it, or trials have no output_dir of their own.
        """
        words = self.words(values)
        before, os.environ["WANDB_RUN_ID"] = os.environ.get("WANDB_RUN_ID"), name
        try:
            config = parse(PROGRAMS[self.program], words[words.index(self.program) + 1 :])
        finally:
            os.environ.pop("WANDB_RUN_ID")
            if before is not None:
                os.environ["WANDB_RUN_ID"] = before
        if Path(config.output_dir).name != name:
            raise UserError(
                f"{self.file}: each trial needs an output_dir of its own; put --output_dir=FOLDER/$WANDB_RUN_ID before "
                "${args} in command"
            )
        return config
