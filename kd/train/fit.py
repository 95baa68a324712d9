"""The one training loop. Everything that varies is in its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from kd.data import Data, TrainBatches
from kd.run.folder import Run
from kd.teachers import Teachers
from kd.track import Tracker
from kd.train.checkpoint import Progress
from kd.train.distiller import Distiller
from kd.train.engine import make_engine
from kd.train.kept import Kept
from kd.train.optim import learning_rate, total_steps
from kd.train.recorder import Recorder
from kd.train.saver import Saver
from kd.train.standing import Standing
from kd.train.step import Stepper
from kd.util.processes import StopSignal, answering_roll_calls


@dataclass
class Fitted:
    """What training leaves: the kept networks, progress, the open tracker, and the number of the signal that stopped
    the run before its last step, 0 where none did."""

    kept: Kept
    tracker: Tracker
    progress: Progress
    signal: int


def fit(
    distiller: Distiller, teachers: Teachers | None, data: Data, config, accelerator: Accelerator, run: Run
) -> Fitted:
    """Train until the last step, resuming from the run's newest checkpoint.

    Each step is a function of the weights, the optimizer's state and the step number, so a run that was stopped at any
    moment ends with the same bytes as one that was not (on a CPU; on a GPU with `deterministic`).

    Args:
        distiller: the learner and its losses; moved to the accelerator's device.
        teachers: already on that device, or None.
        config: a `kd.run.config.TrainConfig`.

    Raises:
        UserError: the loss is not finite.
    """
    run.begin(kept=list(distiller.learner.networks)[1:])
    accelerator.wait_for_everyone()
    saver = Saver(run, distiller, config)
    engine = make_engine(distiller, config, accelerator)
    data = data.on_device(accelerator.device, config.data.device_share)
    batches = _batches(data, config, accelerator)
    per_epoch, received = batches.steps_per_epoch, 0
    total = total_steps(config, data)
    progress, best = saver.resume(engine)
    kept = Kept(distiller.learner, accelerator, best, data.train, config.accumulate)
    standing = Standing(config, progress.standing)
    recorder = Recorder(distiller, config, accelerator, run, total, batches.images_seen, progress)
    take_step = Stepper(engine, teachers, batches, config.seed, recorder.meter)
    distiller.train()
    with StopSignal(config.peer_timeout) as stop, answering_roll_calls():
        while progress.step < total and not received:
            step, progress.step = progress.step, progress.step + 1
            epoch_ends = progress.step % per_epoch == 0 or progress.step == total
            logs = progress.step % config.log_every == 0 or epoch_ends
            lr = learning_rate(config.optimizer, step, total, per_epoch)
            norm = take_step(step, lr, wants_norm=logs)
            recorder.step(progress.step, epoch := step // per_epoch + 1)
            if logs:
                recorder.interval(lr, norm)
            if epoch_ends:
                with recorder.meter.aside():
                    kept.refresh()  # what is measured is what is saved
                    validation = kept.validate(data.val, data.batch_size, epoch, progress, standing)
                recorder.epoch(validation)
            received = stop.agreed()
            due = progress.step % config.checkpoint_every == 0 if config.checkpoint_every else epoch_ends
            if received or due or progress.step == total:
                saver.save(engine, progress, recorder, kept.best)
        if progress.step < total:  # stopped by a signal, which may be sent again
            stop.ignore_repeats()
    recorder.close()
    batches.close()
    if progress.step == total:
        kept.refresh()
        kept.settle(total)
    return Fitted(kept, recorder.tracker, progress, 0 if progress.step == total else received)


def _batches(data: Data, config, accelerator: Accelerator) -> TrainBatches:
    return TrainBatches(
        data.train,
        data.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        data.views,
        config.accumulate,
        len(data.classes),
    )
