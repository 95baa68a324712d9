"""Where a run ends before its last step: its time is over, or validation has stopped getting better."""

from __future__ import annotations

from kd.data import Data
from kd.train.checkpoint import Progress
from kd.train.kept import Kept
from kd.train.optim import learning_rate
from kd.train.recorder import Recorder
from kd.train.standing import Standing
from kd.util.errors import say
from kd.util.processes import TIME_OVER


class Ending:
    """The end of a run, while it comes nearer. Neither way to end early changes a step or what is in a checkpoint, so
    that a run resumes exactly with a later end.

    Args:
        progress: is looked at only.
        total: steps of the whole run.
        per_epoch: steps per epoch.

    Attributes:
        received: what the processes have agreed on after the last step: a signal's number, `TIME_OVER`, or 0.
    """

    def __init__(self, config, progress: Progress, total: int, per_epoch: int):
        self._config, self._progress, self._total, self._per_epoch = config, progress, total, per_epoch
        self.received = 0

    @property
    def reached(self) -> bool:
        """Whether no step is left to take, signals and time aside."""
        return self._progress.step >= self._total or self._stale

    @property
    def _stale(self) -> bool:
        """Whether an epoch has ended and in the last `patience` of them no kept network has got better on validation.

        A function of progress alone: equal on all processes, and after every resume.
        """
        epoch, more = divmod(self._progress.step, self._per_epoch)
        best = max((each["epoch"] for each in self._progress.best.values()), default=epoch)
        return self._config.patience > 0 and not more and epoch - best >= self._config.patience

    @property
    def signal(self) -> int:
        """The number of the signal that stopped the run before its end; 0 where none did."""
        return 0 if self.reached or self.received == TIME_OVER else self.received

    @property
    def stopped_by(self) -> str:
        """`max_time` or `patience` where that ended the run before its last step, else empty."""
        if self._progress.step >= self._total or self.signal:
            return ""
        return "patience" if self._stale else "max_time"

    def finish(self, kept: Kept, recorder: Recorder, data: Data, standing: Standing) -> None:
        """Validate an epoch that time has cut, and say where a run ended before its last step.

        It comes after the last checkpoint: what is resumed from there must not know of it.
        """
        config, progress, epoch = self._config, self._progress, -(-self._progress.step // self._per_epoch)
        if not self.signal:
            kept.refresh()
            if self.stopped_by == "max_time" and progress.step % self._per_epoch:
                found = kept.validate(data.val, data.batch_size, epoch, progress, standing)
                recorder.validation(progress.step, epoch, found)
            kept.settle(progress.step)
        recorder.close()
        if not self.stopped_by:
            return
        why = f"max_time {config.max_time} is over"
        if self.stopped_by == "patience":
            why = f"validation accuracy has not got better for {config.patience} epochs (patience)"
        line = f"{why}: ended after step {progress.step} of {self._total}, in epoch {epoch} of {config.epochs}"
        if config.optimizer.schedule == "cosine":
            lr = learning_rate(config.optimizer, progress.step - 1, self._total, self._per_epoch)
            line += f"; the cosine had not reached its end, the learning rate is {lr:.3g}"
        say(line)
