"""What a run logs: its lines of metrics.jsonl, its progress bar, a line at each epoch's end."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from kd.track import Tracker
from kd.train.checkpoint import Progress
from kd.train.distiller import Distiller
from kd.train.meter import Meter
from kd.util.errors import say


class Recorder:
    """Logs a run's steps and epochs.

    Args:
        total: steps of the whole run.
        images_seen: images shown by the end of a number of steps.
        progress: from where the run starts.

    Attributes:
        meter: the sums of the terms.
        saved_step: the step of the newest checkpoint, None where there is none.
    """

    def __init__(
        self,
        distiller: Distiller,
        config,
        accelerator,
        run,
        total: int,
        images_seen: Callable[[int], int],
        progress: Progress,
    ):
        self._config, self._accelerator, self._images_seen = config, accelerator, images_seen
        self.tracker = Tracker(accelerator, run, config, distiller.objective(), progress.metrics_bytes)
        networks, is_main = list(distiller.learner.networks), accelerator.is_main_process
        self.meter = Meter(list(distiller.losses), accelerator.device, progress.sums, is_main, networks)
        self.saved_step = progress.step if progress.step else None
        self._started = time.perf_counter() - progress.seconds
        hidden = None if accelerator.is_main_process else True
        self._bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, disable=hidden)
        self._place: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Training time, over all starts."""
        return time.perf_counter() - self._started

    def step(self, step: int, epoch: int) -> None:
        """Move to the place after `step` steps, in an epoch counted from 1."""
        self._bar.update()
        self._place = {"step": step, "epoch": epoch}

    def interval(self, lr: float, norm) -> None:
        """Log the means of the interval's terms; raises a UserError where one was not finite."""
        row = self.meter.flush(self._accelerator, self._config.optimizer.lr, self.saved_step, norm)
        place = {**self._place, "images_seen": self._images_seen(self._place["step"])}
        self.tracker.log({**place, **row, "lr": lr})
        self._bar.set_description(f"epoch {place['epoch']}/{self._config.epochs}", refresh=False)
        terms = [f"{k.removeprefix('train/')} {v:.4g}" for k, v in row.items() if k.startswith("train/")]
        self._bar.set_postfix_str("  ".join([*terms, f"{row['images_per_second']:,.0f} images/s"]))

    def epoch(self, validation: dict[str, float]) -> None:
        """Log the means of the epoch's terms, its accuracy in training and its validation, and print all."""
        row = self.meter.end_epoch() | validation
        place = {**self._place, "images_seen": self._images_seen(self._place["step"])}
        self.tracker.log({**place, **row})
        skipped = ("loss", "images_per_second", "accuracy")
        terms = [(key, value) for key, value in row.items() if key.startswith("epoch/") and not key.endswith(skipped)]
        terms = ", ".join(f"{key.removeprefix('epoch/')} {value:.4f}" for key, value in terms)
        accuracies = [(key, value) for key, value in row.items() if key.endswith("accuracy")]
        words = [(key.removesuffix("accuracy").replace("epoch/", "train/"), value) for key, value in accuracies]
        val = "".join(f"  {word.replace('/', ' ')}{value:.2f} %" for word, value in words)
        speed = f"{row['epoch/images_per_second']:,.0f} images/s"
        line = f"epoch {place['epoch']}/{self._config.epochs}  loss {row['epoch/loss']:.4f} ({terms}){val}  {speed}"
        say(line) if self._bar.disable else self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
