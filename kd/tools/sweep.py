"""Search a W&B sweep's file on this machine with Optuna; any number of these commands may share one sweep.

python -m kd.sweep sweeps/digits_kl.yaml --trials 20
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kd.tools.sweep_file import SweepFile, optuna
from kd.util.errors import CommandParser, UserError, say
from kd.util.files import write_atomic
from kd.util.machine import end_with_parent

MAX_FAILURES = 3  # one after another: then it is the sweep that is wrong, not the values of one trial
SECONDS = 0.5  # between two looks at a trial


def main(argv: list[str] | None = None) -> int:
    """Run trials until there are as many as wanted, and show the best; the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog="python -m kd.sweep", description=__doc__, formatter_class=form)
    parser.add_argument("file", help="a sweep in W&B's format, such as those of sweeps/")
    trials = "how many there are at the end, of all workers; default the file's run_cap"
    parser.add_argument("--trials", type=whole_number, metavar="N", help=trials)
    parser.add_argument("--seed", type=whole_number, default=0, help="of what is drawn (default 0)")
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


def whole_number(text: str) -> int:
    """A flag's value, 0 or more; a ValueError for another."""
    return range(2**31).index(int(text))


class Search:
    """A sweep's trials in an Optuna study beside their run folders, which several workers may hold at once.

    Args:
        seed: what is drawn depends on it and on the trials before, not on how often the sweep was stopped.

    Raises:
        UserError: the script would refuse the command, or the folder holds another sweep's study.
    """

    def __init__(self, sweep: SweepFile, seed: int):
        self.sweep, self.seed = sweep, seed
        self.folder = Path(sweep.trial("trial", sweep.first())[1].output_dir).parent
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
        sets = {name: each for name, (each, _) in self.sweep.parameters.items()}
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
            # the liar keeps workers that draw at once from drawing the same
            kind, more = optuna.samplers.TPESampler, {"constant_liar": True}
            kind, more = (kind, more) if self.sweep.method == "bayes" else (optuna.samplers.RandomSampler, {})
            self.study.sampler = kind(seed=self.seed + len(drawn), **more)
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
        """Run a trial, or what is left of it, and tell the study; why it failed, if it did.

        Raises:
            UserError: somebody else stopped it; it stays unfinished.
        """
        name, metric = name_of(trial.number), self.sweep.metric
        folder, log = self.folder / name, self.folder / f"{name}.log"
        say(f"{name}: {shown(trial.params)}")
        try:
            command, config = self.sweep.trial(name, trial.params)
        except UserError as error:
            return self._end(trial, "FAIL", f"failed: {error}")
        lagged, status = self._watch(trial, command, log, config.epochs)
        found, accuracies = measured(folder, metric), measured(folder, "val/accuracy")
        *_, words = ["it printed nothing", *filter(str.strip, log.read_text(errors="replace").splitlines())]
        if lagged is not None:
            best = self._best(lambda other: other.intermediate_values.get(lagged))[0]
            lead = f"{best.intermediate_values[lagged]:.4g} of {name_of(best.number)}"
            lead = f"stopped after epoch {lagged}: {metric} {found[lagged]:.4g} lags behind {lead}"
            return self._end(trial, "PRUNED", lead)
        if status in (130, 138, 143):  # 128 and SIGINT, SIGUSR1, SIGTERM
            raise UserError(f"{name} was {words.partition(';')[0]}; the same command resumes it")
        if status and "not finite" in words:
            return self._end(trial, "PRUNED", f"diverged: {words}")
        if status or not found:
            why = words if status else f"no {metric} was measured; set data.val_fraction above 0"
            return self._end(trial, "FAIL", f"failed: {why} (all that it printed is in {log})")
        chosen = max(accuracies) if config.select == "last" else max(accuracies, key=accuracies.get)  # as the run chose
        return self._end(trial, "COMPLETE", f"{metric} {found[chosen]:.4g}", found[chosen])

    def _watch(self, trial: optuna.Trial, command: list[str], log: Path, epochs: int) -> tuple:
        """Run the command until it ends or its trial lags behind: the epoch of that or None, and the exit status."""
        known = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        held = self.folder / log.stem / ".lock"
        if held.exists():  # the run of a worker that was killed saves its state still
            FileLock(held).acquire().lock.release()
        with log.open("ab") as out:  # in a session of its own, where Ctrl-C reaches it through terminate() alone
            own = {"start_new_session": True, "preexec_fn": end_with_parent}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **own)
        try:
            while True:
                ended = process.poll() is not None
                for epoch, value in measured(self.folder / log.stem, self.sweep.metric).items():
                    if epoch not in known and epoch < epochs:
                        known.add(epoch)
                        trial.report(value, epoch)
                        if trial.should_prune() and not ended:
                            return epoch, None
                if ended:
                    return None, process.returncode
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

    def _best(self, value: Callable) -> list:
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


def name_of(number: int) -> str:
    """A trial's name, and its run folder's."""
    return f"trial_{number:04d}"


def shown(params: dict) -> str:
    """A trial's values in a line."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in params.items()}
    return "  ".join(f"{key}={text}" for key, text in texts.items())


def measured(folder: Path, metric: str) -> dict[int, float]:
    """{epoch: value} of a metric in a run's metrics.jsonl, as far as it is written."""
    found = {}
    with suppress(FileNotFoundError, ValueError), (folder / "metrics.jsonl").open() as file:
        for row in map(json.loads, file):
            found |= {row["epoch"]: row[metric]} if metric in row else {}
    return found


def mend(journal: Path) -> None:
    """Take out lines that a killed worker or a full disk left torn: for one of them Optuna refuses the file."""
    whole, rows = [], journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    for row in rows:
        with suppress(ValueError):
            whole += [row] if json.loads(row) and row.endswith(b"\n") else []
    if whole != rows:
        write_atomic(journal, b"".join(whole))
