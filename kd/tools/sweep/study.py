"""The trials of a sweep in an Optuna study beside their runs: drawn, shared by several workers, gone on with.

https://optuna.readthedocs.io
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from kd.tools.sweep.space import Sweep
from kd.util.errors import UserError

try:
    import optuna
except ModuleNotFoundError:
    raise UserError("kd.sweep needs the package optuna; pip install optuna") from None


class Study:
    """An Optuna study of a sweep in a folder, which any number of workers may hold at once.

    Args:
        seed: of what is drawn; the same trials come out again, however often the sweep was stopped, where one worker
            runs them and their results are the same.

    Raises:
        UserError: the folder holds another sweep's study.
    """

    def __init__(self, sweep: Sweep, folder: Path, seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder, self._seed = sweep, folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
        self._lock = FileLock(folder / ".study.lock")
        self._held: dict[int, FileLock] = {}
        with self._lock:
            self.optuna = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name="sweep",
                direction=sweep.goal,
                load_if_exists=True,
                pruner=_pruner(sweep),
            )
            known = self.optuna.user_attrs.get("sweep")
            if known is None:
                self.optuna.set_user_attr("sweep", sweep.identity)
                for chosen in sweep.grid() if sweep.method == "grid" else []:
                    self.optuna.enqueue_trial(chosen)
            elif differing := [key for key in sweep.identity if known[key] != sweep.identity[key]]:
                raise UserError(
                    f"{folder} holds a sweep with other {' and '.join(differing)} than {sweep.file}; name another "
                    "output_dir in its command, or delete the folder"
                )

    def next_trial(self, limit: int | None):
        """A trial whose worker has died, else a new one, None where there are `limit`; the caller then holds it.

        Failed trials do not count.
        """
        with self._lock:
            trials = self.optuna.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == optuna.trial.TrialState.RUNNING and self._take(trial.number):
                    return optuna.trial.Trial(self.optuna, trial._trial_id)  # no public name hands it back
            waiting = [t for t in trials if t.state == optuna.trial.TrialState.WAITING]
            begun = [t for t in trials if t not in waiting and t.state != optuna.trial.TrialState.FAIL]
            if (limit is not None and len(begun) >= limit) or (self.sweep.method == "grid" and not waiting):
                return None
            self.optuna.sampler = _sampler(self.sweep, self._seed + len(trials) - len(waiting))
            trial = self.optuna.ask()
            for parameter in self.sweep.parameters:
                parameter.suggest(trial)
            self._take(trial.number)
            return trial

    def _take(self, number: int) -> bool:
        """Hold a trial until release(), or this process's end; False where another worker does."""
        lock = FileLock(self.folder / f".{name_of(number)}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Let go of a trial."""
        self._held.pop(number).release()

    def report(self, trial, values: dict[int, float]) -> int | None:
        """Tell a trial's values by epoch; the epoch at which it is to be stopped, None if it is not."""
        known = self.optuna.get_trials(deepcopy=False)[trial.number].intermediate_values
        for epoch in sorted(set(values) - set(known)):
            trial.report(values[epoch], epoch)
            if trial.should_prune():
                return epoch
        return None

    def others_at(self, epoch: int, number: int) -> list[float]:
        """What the other trials had after an epoch, the best first."""
        trials = self.optuna.get_trials(deepcopy=False)
        found = [t.intermediate_values[epoch] for t in trials if t.number != number and epoch in t.intermediate_values]
        return sorted(found, reverse=self.sweep.goal == "maximize")

    def finish(self, trial, value: float | None = None, pruned: bool = False) -> None:
        """End a trial: with its value, stopped early (`pruned`), or else failed."""
        state = optuna.trial.TrialState
        outcome = state.COMPLETE if value is not None else state.PRUNED if pruned else state.FAIL
        self.optuna.tell(trial.number, value, outcome)
        self.release(trial.number)

    def finished(self) -> list:
        """The finished trials, the best first."""
        done = self.optuna.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
        return sorted(done, key=lambda trial: trial.value, reverse=self.sweep.goal == "maximize")

    def counts(self) -> str:
        """How many trials there are of each kind, in words."""
        states = [trial.state.name for trial in self.optuna.get_trials(deepcopy=False)]
        words = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "not finished"}
        return ", ".join(f"{states.count(name)} {word}" for name, word in words.items() if name in states) or "none yet"


def name_of(number: int) -> str:
    """A trial's name, and its run folder's."""
    return f"trial_{number:04d}"


def _sampler(sweep: Sweep, seed: int):
    """A sampler for one trial: what it draws depends on the seed and on the trials before, not on who draws."""
    if sweep.method == "bayes":  # the liar keeps workers that draw at the same time from drawing the same
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep):
    """W&B's `hyperband`, which is asynchronous successive halving (https://arxiv.org/abs/1810.05934)."""
    if sweep.rungs is None:
        return optuna.pruners.NopPruner()
    first, eta = sweep.rungs
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)
