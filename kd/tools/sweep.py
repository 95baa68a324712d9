"""Search a W&B sweep's file on this machine with Optuna; any number of these commands may share one sweep.

python -m kd.sweep sweeps/digits_kl.yaml --trials 20
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from operator import index
from pathlib import Path

from filelock import FileLock, Timeout
from jsonargparse.typing import NonNegativeInt

from kd.run.config import DistillConfig, Seed, TeacherConfig
from kd.run.parse import parse, read_yaml
from kd.util.contents import read_rows
from kd.util.errors import CommandParser, UserError, say, unknown
from kd.util.files import write_atomic
from kd.util.machine import end_with_parent

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
except ModuleNotFoundError:
    raise UserError("kd.sweep needs the package optuna; pip install optuna") from None

MAX_FAILURES = 3  # one after another: then it is the sweep that is wrong, not the values of one trial
SECONDS = 0.5  # between two looks at a trial
PROGRAMS = {"distill.py": DistillConfig, "train_teacher.py": TeacherConfig}
LOG = functools.partial(FloatDistribution, log=True)
RANGES = {
    "int_uniform": lambda low, high: IntDistribution(index(low), index(high)),
    "uniform": FloatDistribution,
    "q_uniform": FloatDistribution,
    "log_uniform": lambda low, high: LOG(math.exp(low), math.exp(high)),  # its bounds are exponents of e
    "log_uniform_values": LOG,
    "q_log_uniform_values": LOG,
}
METHODS = ["bayes", "grid", "random"]
METRICS = [{"name": "val/accuracy", "goal": "maximize"}, {"name": "val/nll", "goal": "minimize"}]
THEIRS = ("apiVersion", "description", "entity", "kind", "name", "project")  # of a sweep on W&B's server
name_of = "trial_{:04d}".format  # a trial's name, and its run folder's


def main(argv: list[str] | None = None) -> int:
    """Run trials until there are as many as wanted, and show the best; the exit status."""
    parser = CommandParser("sweep", __doc__)
    parser.add_argument("file", help="a sweep in W&B's format, such as those of sweeps/")
    trials = "how many there are at the end, of all workers; default the file's run_cap"
    parser.add_argument("--trials", type=NonNegativeInt, metavar="N", help=trials)
    parser.add_argument("--seed", type=Seed, default=0, help="of what is drawn (default 0)")
    arguments = parser.parse_args(argv)
    sweep = SweepFile(arguments.file)
    limit = sweep.run_cap if arguments.trials is None else arguments.trials
    if limit is None and sweep.method != "grid":
        raise UserError(f"how many trials? pass --trials N, or put run_cap into {arguments.file}")
    search, failed = Search(sweep, arguments.seed), 0
    while limit != 0 and (trial := search.next(limit)) is not None:  # 0 only shows the best
        failure = search.run(trial)
        failed = failed + 1 if failure else 0
        if failed == MAX_FAILURES:
            raise UserError(f"{failed} trials failed one after another; the last: {failure}")
    search.show()
    return 0


def read_parameter(distribution=None, q=None, **given) -> tuple:
    """Optuna's distribution of a parameter, and what is drawn is rounded to multiples of, None for not."""
    if given.keys() in ({"value"}, {"values"}) and distribution in (None, "constant", "categorical") and q is None:
        values = [given["value"]] if "value" in given else list.copy(given["values"])
        # a list or mapping becomes the text that a flag takes
        plain = [v if isinstance(v, str | int | float) else json.dumps(v, default=str) for v in values]
        return CategoricalDistribution(plain), None
    low, high = given.pop("min"), given.pop("max")
    kind = distribution or ("int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform")
    q = 1 if q is None and kind.startswith("q_") else q
    sound = math.isfinite(low + high) and (q is None or 0 < q < math.inf)
    if given or not sound or kind.startswith("q_") is (q is None):
        raise ValueError
    return RANGES[kind](low, high), q


def read_hyperband(type, min_iter=None, max_iter=None, s=None, eta=3) -> optuna.pruners.BasePruner:
    """Asynchronous successive halving (https://arxiv.org/abs/1810.05934)."""
    if type != "hyperband":
        raise ValueError
    first = max_iter // eta**s if min_iter is None else min_iter  # W&B: max_iter / eta^s, ..., max_iter / eta
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=index(first), reduction_factor=index(eta))


# For each key of https://docs.wandb.ai/models/sweeps/sweep-config-keys what reads its value (an error: it is wrong) and
# what it takes.
TAKES = {
    "program": (list(PROGRAMS).index, " or ".join(PROGRAMS)),
    "method": (METHODS.index, ", ".join(METHODS)),
    "metric": (METRICS.index, f"one of {METRICS}; nothing is selected on the test split"),
    "parameters": (
        dict.items,
        "fields of the program, dotted as optimizer.lr, each with value, values (a list), or min and max (in order; "
        "above 0 for log_uniform_values), with q (above 0) for q_...; distribution: " + ", ".join(RANGES),
    ),
    "command": (
        lambda words: list.index(words, "${args}", words.index("${program}")),
        "a list of words with ${program} and, after it, ${args}",
    ),
    "early_terminate": (
        lambda given: optuna.pruners.NopPruner() if given is None else read_hyperband(**given),
        "type: hyperband, min_iter (an epoch) or max_iter and s, and eta (2 or more)",
    ),
    "run_cap": (lambda cap: cap is None or 1 // max(0, index(cap)), "a number of trials"),
}


def take(key: str, value, read=None, name: str = ""):
    """What a key's value is read as; whatever that raises becomes one line that says what would be right."""
    try:
        return (read or TAKES[key][0])(value)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"{key}{name} is {str(value)[:200]}; it takes {TAKES[key][1]}") from None


class SweepFile:
    """A sweep's file, read; another sweep is one whose `identity` differs."""

    def __init__(self, file: str):
        content = dict.fromkeys(TAKES) | read_yaml(Path(file))
        for key in content:
            if key not in (*TAKES, *THEIRS):
                raise unknown(f"key of {file}", key, (*TAKES, *THEIRS))
        found = {key: take(key, content[key]) for key in TAKES}
        self.program, self.method, self.run_cap = (content[key] for key in ("program", "method", "run_cap"))
        (self.metric, self.goal), self.pruner = METRICS[found["metric"]].values(), found["early_terminate"]
        self.command = content["command"][content["command"].index("${program}") + 1 :]
        self.parameters = {
            str(name): take("parameters", spec, lambda given: read_parameter(**given), f".{name}")
            for name, spec in found["parameters"]
        }
        self.sets = {name: each for name, (each, _) in self.parameters.items()}
        ranges = [name for name, each in self.sets.items() if hasattr(each, "low")]
        self.first = {name: each.low if name in ranges else each.choices[0] for name, each in self.sets.items()}
        if ranges and self.method == "grid":
            raise UserError(f"method grid takes value or values, and {ranges[0]} has min and max; use random or bayes")
        self.identity = json.loads(json.dumps([content[key] for key in list(TAKES)[:5]], default=str))

    def trial(self, name: str, drawn: dict) -> tuple:
        """The command of a trial, for values that Optuna drew, and the config that it runs."""
        os.environ["WANDB_RUN_ID"] = name  # as W&B's agent does; the command names the folder by it
        given = [f"--{key}={value}" for key, value in self.values(drawn).items()]
        flags = [str(flag) for word in self.command for flag in (given if word == "${args}" else [word])]
        config = parse(PROGRAMS[self.program], flags)
        if Path(config.output_dir).name != name:
            raise UserError("each trial needs a folder of its own: put --output_dir=FOLDER/$WANDB_RUN_ID into command")
        return [sys.executable, self.program, *flags], config

    def values(self, drawn: dict) -> dict:
        """What Optuna drew, rounded."""
        return {key: round(drawn[key] / q) * q if q else drawn[key] for key, (_, q) in self.parameters.items()}


class Search:
    """A sweep's trials in an Optuna study beside their run folders, which several workers may hold at once.

    What is drawn depends on `seed` and on the trials before, not on how often the sweep was stopped.
    """

    def __init__(self, sweep: SweepFile, seed: int):
        self.sweep, self.seed = sweep, seed
        self.folder = Path(sweep.trial("trial", sweep.first)[1].output_dir).parent
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock, journal = FileLock(self.folder / ".study.lock"), self.folder / "study.journal"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.lock:
            mend(journal)
            self.storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
            named = {"study_name": "sweep", "direction": sweep.goal, "load_if_exists": True}
            self.study = optuna.create_study(storage=self.storage, pruner=sweep.pruner, **named)
            if self.study.user_attrs.get("sweep", sweep.identity) != sweep.identity:
                raise UserError(f"{self.folder} holds another sweep; name another output_dir in command, or delete it")
            self.study.set_user_attr("sweep", sweep.identity)

    def next(self, limit: int | None) -> optuna.Trial | None:
        """A trial whose worker died, else a new one, None where there are `limit` that did not fail."""
        sets = self.sweep.sets
        with self.lock:
            trials = self.study.get_trials(deepcopy=False)
            drawn = [trial for trial in trials if len(trial.params) == len(sets)]  # else its worker died drawing it
            for trial in drawn:
                if trial.state.name == "RUNNING" and self._hold(trial.number):
                    study = self.storage.get_study_id_from_name("sweep")
                    known = self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)
                    return optuna.Trial(self.study, known)
            if limit is not None and sum(trial.state.name != "FAIL" for trial in drawn) >= limit:
                return None
            if self.sweep.method == "grid":  # its combinations are never listed: there may be millions
                combinations = itertools.product(*(each.choices for each in sets.values()))
                chosen = next(itertools.islice(combinations, len(drawn), None), None)
                if chosen is None:
                    return None
                if all(trial.state.name != "WAITING" for trial in trials):
                    self.study.enqueue_trial(dict(zip(sets, chosen, strict=True)))
            seed = (self.seed + len(drawn)) % 2**32
            self.study.sampler = optuna.samplers.RandomSampler(seed)
            if self.sweep.method == "bayes":  # the liar keeps workers that draw at once from drawing the same
                self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = self.study.ask(sets)
            self._hold(trial.number)
            return trial

    def _hold(self, number: int) -> bool:
        """Whether no other worker has this trial; if so this one has it from now on."""
        self.held = FileLock(self.folder / f".{name_of(number)}.lock", timeout=0)
        with suppress(Timeout):
            self.held.acquire()
        return self.held.is_locked

    def run(self, trial: optuna.Trial) -> str | None:
        """Run a trial, or what is left of it, and tell the study; why it failed, if it did."""
        name, metric = name_of(trial.number), self.sweep.metric
        folder, log = self.folder / name, self.folder / f"{name}.log"
        say(f"{name}: {shown(trial.params)}")
        try:
            command, config = self.sweep.trial(name, trial.params)
        except UserError as error:
            return self._end(trial, "FAIL", f"failed: {error}")
        lagged, status = self._watch(trial, command, folder, config.epochs)
        found, accuracies = measured(folder, metric), measured(folder, "val/accuracy")
        *_, words = ["it printed nothing", *filter(str.strip, log.read_text(errors="replace").splitlines())]
        if lagged is not None:
            best = self._best(lambda other: other.intermediate_values.get(lagged))[0]
            lead = f"lags behind {best.intermediate_values[lagged]:.4g} of {name_of(best.number)}"
            return self._end(trial, "PRUNED", f"stopped after epoch {lagged}: {metric} {found[lagged]:.4g} {lead}")
        if status in (130, 138, 143):  # 128 and SIGINT, SIGUSR1, SIGTERM of somebody else: it stays unfinished
            raise UserError(f"{name} was {words.partition(';')[0]}; the same command resumes it")
        if status and "not finite" in words:
            return self._end(trial, "PRUNED", f"diverged: {words}")
        if status or not found:
            why = words if status else f"no {metric} was measured; set data.val_fraction above 0"
            return self._end(trial, "FAIL", f"failed: {why} (all that it printed is in {log})")
        chosen = max(accuracies) if config.select == "last" else max(accuracies, key=accuracies.get)  # as the run chose
        return self._end(trial, "COMPLETE", f"{metric} {found[chosen]:.4g}", found[chosen])

    def _watch(self, trial: optuna.Trial, command: list[str], folder: Path, epochs: int) -> tuple:
        """Run the command until it ends or its trial lags behind: the epoch of that or None, and the exit status."""
        known = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        if (folder / ".lock").exists():  # the run of a worker that was killed saves its state still
            FileLock(folder / ".lock").acquire().lock.release()
        with folder.with_suffix(".log").open("ab") as out:  # in a session of its own: Ctrl-C comes by terminate() alone
            own = {"start_new_session": True, "preexec_fn": end_with_parent}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **own)
        try:
            while True:
                status = process.poll()
                for epoch, value in measured(folder, self.sweep.metric).items():
                    if epoch not in known and epoch < epochs:
                        known.add(epoch)
                        trial.report(value, epoch)
                        if trial.should_prune() and status is None:
                            return epoch, None
                if status is not None:
                    return None, status
                time.sleep(SECONDS)
        finally:  # whatever ends this, also Ctrl-C: the run saves its state first
            process.terminate()
            process.wait()

    def _end(self, trial: optuna.Trial, state: str, words: str, value: float | None = None) -> str | None:
        with self.lock:
            self.study.tell(trial.number, value, optuna.trial.TrialState[state])
            self.held.release()
        say(f"{name_of(trial.number)}: {words}")
        return f"{name_of(trial.number)} {words}" if state == "FAIL" else None

    def _best(self, value) -> list:
        """The trials that have a value, the best first."""
        found = [trial for trial in self.study.get_trials(deepcopy=False) if value(trial) is not None]
        return sorted(found, key=value, reverse=self.sweep.goal == "maximize")

    def show(self) -> None:
        """The best ten, and how to run the best again."""
        states = collections.Counter(trial.state.name.lower() for trial in self.study.get_trials(deepcopy=False))
        say("trials: " + (", ".join(f"{count} {state}" for state, count in states.items()) or "none yet"))
        best = self._best(lambda trial: trial.value if trial.state.name == "COMPLETE" else None)
        for trial in best[:10]:
            say(f"{name_of(trial.number)}  {self.sweep.metric} {trial.value:.4f}  {shown(trial.params)}")
        if best:
            folder = self.folder / name_of(best[0].number)
            say(f"The best of {len(best)} is flattered by the validation images that chose it; run other seeds of it:")
            again = f"--config {folder}/config.yaml --seed 1 --output_dir {folder}_seed1"
            say(f"accelerate launch {self.sweep.program} {again}")


def shown(params: dict) -> str:
    """A trial's values in a line."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in params.items()}
    return "  ".join(f"{key}={text}" for key, text in texts.items())


def measured(folder: Path, metric: str) -> dict[int, float]:
    """{epoch: value} of a metric in a run's metrics.jsonl, as far as it is written."""
    file = folder / "metrics.jsonl"
    rows, _ = read_rows(file.read_bytes() if file.is_file() else b"")
    return {row["epoch"]: row[metric] for row in rows if metric in row}


def mend(journal: Path) -> None:
    """Take out lines that a killed worker or a full disk left torn: for one of them Optuna refuses the file."""
    whole, rows = [], journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    for row in rows:
        with suppress(ValueError):
            whole += [row] if json.loads(row) and row.endswith(b"\n") else []
    if whole != rows:
        write_atomic(journal, b"".join(whole))
