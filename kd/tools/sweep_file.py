"""A sweep's file in W&B's format, as far as it is read here: https://docs.wandb.ai/models/sweeps/sweep-config-keys."""

from __future__ import annotations

import json
import math
import os
import sys
from operator import index
from pathlib import Path

from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import parse, read_yaml
from kd.util.errors import UserError, unknown

try:
    import optuna
except ModuleNotFoundError:
    raise UserError("kd.sweep needs the package optuna; pip install optuna") from None

PROGRAMS = {"distill.py": DistillConfig, "train_teacher.py": TeacherConfig}
METHODS = ["bayes", "grid", "random"]
METRICS = [{"name": "val/accuracy", "goal": "maximize"}, {"name": "val/nll", "goal": "minimize"}]
RANGES = ("int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values", "q_log_uniform_values")
TAKES = {
    "program": " or ".join(PROGRAMS),
    "method": ", ".join(METHODS),
    "metric": f"one of {METRICS}; nothing is selected on the test split",
    "parameters": "fields of the program, dotted as optimizer.lr, each with value, values (a list), or min and max (in "
    "order; above 0 for log_uniform_values), with q (above 0) for q_...; distribution: " + ", ".join(RANGES),
    "command": "a list of words with ${program} and, after it, ${args}",
    "early_terminate": "type: hyperband, min_iter (an epoch) or max_iter and s, and eta (2 or more)",
    "run_cap": "a number of trials",
}
THEIRS = ("apiVersion", "description", "entity", "kind", "name", "project")  # of a sweep on W&B's server


def read_parameter(distribution=None, q=None, **given) -> tuple:
    """Optuna's distribution of a parameter, and what is drawn is rounded to multiples of, None for not."""
    if given.keys() in ({"value"}, {"values"}) and distribution in (None, "constant", "categorical") and q is None:
        values = [given["value"]] if "value" in given else list.copy(given["values"])
        # a list or mapping becomes the text that a flag takes
        plain = [v if isinstance(v, str | int | float) else json.dumps(v, default=str) for v in values]
        return optuna.distributions.CategoricalDistribution(plain), None
    low, high = given.pop("min"), given.pop("max")
    kind = distribution or ("int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform")
    if q is None and kind.startswith("q_"):
        q = 1
    if given or kind not in RANGES or kind.startswith("q_") is (q is None) or not math.isfinite(low + high):
        raise ValueError
    if q is not None and not 0 < q < math.inf:
        raise ValueError
    if kind == "int_uniform":
        return optuna.distributions.IntDistribution(index(low), index(high)), None
    if kind == "log_uniform":  # its bounds are exponents of e
        low, high = math.exp(low), math.exp(high)
    return optuna.distributions.FloatDistribution(low, high, log="log" in kind), q


def read_hyperband(type, min_iter=None, max_iter=None, s=None, eta=3) -> optuna.pruners.BasePruner:
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934)."""
    if type is min_iter is max_iter is None:
        return optuna.pruners.NopPruner()
    if type != "hyperband":
        raise ValueError
    first = max_iter // eta**s if min_iter is None else min_iter  # W&B: max_iter / eta^s, ..., max_iter / eta
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=index(first), reduction_factor=index(eta))


class SweepFile:
    """A sweep's file.

    Attributes:
        metric, goal: what is searched by, `val/accuracy` or `val/nll`; `maximize` or `minimize`.
        parameters: for each field what `read_parameter` gives.
        identity: what makes another sweep if it differs.

    Raises:
        UserError: it cannot be read, or holds what cannot be done.
    """

    def __init__(self, file: str):
        content = dict.fromkeys(TAKES) | read_yaml(Path(file))
        for key in content:
            if key not in (*TAKES, *THEIRS):
                raise unknown(f"key of {file}", key, (*TAKES, *THEIRS))
        self.program, self.method, self.command = content["program"], content["method"], content["command"]
        self.run_cap, early = content["run_cap"], content["early_terminate"]
        self._take("program", self.program, list(PROGRAMS).index)
        self._take("method", self.method, METHODS.index)
        self._take("run_cap", self.run_cap, lambda cap: cap is None or 1 // max(0, index(cap)))
        self._take("command", self.command, lambda words: list.index(words, "${args}", words.index("${program}")))
        self.metric, self.goal = METRICS[self._take("metric", content["metric"], METRICS.index)].values()
        early = {"type": None} if early is None else early
        self.pruner = self._take("early_terminate", early, lambda given: read_hyperband(**given))
        self.parameters = {
            str(name): self._take("parameters", spec, lambda given: read_parameter(**given), f".{name}")
            for name, spec in self._take("parameters", content["parameters"], dict.items)
        }
        ranges = [name for name, (each, _) in self.parameters.items() if hasattr(each, "low")]
        if ranges and self.method == "grid":
            raise UserError(f"method grid takes value or values, and {ranges[0]} has min and max; use random or bayes")
        self.identity = json.loads(json.dumps([content[key] for key in list(TAKES)[:5]], default=str))

    def _take(self, key: str, value, read, name: str = ""):
        """What `read` makes of a value; whatever it raises becomes one line that says what would be right."""
        try:
            return read(value)
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
            raise UserError(f"{key}{name} is {str(value)[:200]}; it takes {TAKES[key]}") from None

    def trial(self, name: str, drawn: dict) -> tuple:
        """A trial's command and the config that it runs.

        Raises:
            UserError: the script would refuse it, or it has no folder of its own.
        """
        os.environ["WANDB_RUN_ID"] = name  # as W&B's agent does; the command names the folder by it
        given = [f"--{key}={value}" for key, value in self.values(drawn).items()]
        words = self.command[self.command.index("${program}") + 1 :]
        flags = [str(flag) for word in words for flag in (given if word == "${args}" else [word])]
        config = parse(PROGRAMS[self.program], flags)
        if Path(config.output_dir).name != name:
            raise UserError("each trial needs a folder of its own: put --output_dir=FOLDER/$WANDB_RUN_ID into command")
        return [sys.executable, self.program, *flags], config

    def values(self, drawn: dict) -> dict:
        """What Optuna drew, rounded."""
        return {key: round(drawn[key] / q) * q if q else drawn[key] for key, (_, q) in self.parameters.items()}

    def first(self) -> dict:
        """Values that the parameters can have."""
        found = {name: each for name, (each, _) in self.parameters.items()}
        return {name: each.low if hasattr(each, "low") else each.choices[0] for name, each in found.items()}
