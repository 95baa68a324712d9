"""The one training loop. Everything that varies is in its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from kd.data import Data, TrainBatches
from kd.run.folder import Run
from kd.teachers import Teachers
from kd.track import Tracker
from kd.train import zero
from kd.train.checkpoint import Progress
from kd.train.distiller import Distiller
from kd.train.ending import Ending
from kd.train.engine import Engine, ZeroEngine
from kd.train.kept import Kept
from kd.train.optim import learning_rate, total_steps
from kd.train.recorder import Recorder
from kd.train.saver import Saver
from kd.train.standing import Standing
from kd.train.step import take_step
from kd.util.processes import StopSignal, answering_roll_calls


@dataclass
class Fitted:
    """What training leaves: the kept networks, progress, the open tracker; and what ended the run before its last step:
    the number of a signal, 0 where none did, or `max_time` or `patience`, empty where neither did."""

    kept: Kept
    tracker: Tracker
    progress: Progress
    signal: int
    stopped_by: str = ""


def fit(
    distiller: Distiller, teachers: Teachers | None, data: Data, config, accelerator: Accelerator, run: Run
) -> Fitted:
    """Train until the run's end, resuming from its newest checkpoint.

    Each step is a function of the weights, the optimizer's state and the step number, so a run that was stopped at any
    moment ends with the same bytes as one that was not (on a CPU; on a GPU with `deterministic`).

    Args:
        distiller: the learner and its losses; moved to the accelerator's device.
        teachers: already on that device, or None.
        config: a `kd.run.config.TrainConfig`.

    Raises:
        UserError: the loss is not finite.
    """
    saver = Saver(run, distiller, config)
    run.begin(kept=list(distiller.learner.networks)[1:])
    accelerator.wait_for_everyone()
    saver.find()
    rank, world = accelerator.process_index, accelerator.num_processes
    engine = (ZeroEngine if zero.wanted(world) else Engine)(distiller, config, accelerator)
    data = data.on_device(accelerator.device, config.data.device_share)
    batches = TrainBatches(
        data.train, data.batch_size, config.seed, rank, world, data.views, config.accumulate, len(data.classes)
    )
    per_epoch, total = batches.steps_per_epoch, total_steps(config, data)
    progress, best = saver.resume(engine)
    kept = Kept(distiller.learner, accelerator, best, data.train, config.accumulate)
    standing = Standing(config, progress.standing)
    recorder = Recorder(distiller, config, accelerator, run, total, batches.images_seen, progress)
    ending = Ending(config, progress, total, per_epoch)
    distiller.train()
    with StopSignal(config.peer_timeout, recorder.time_left) as stop, answering_roll_calls():
        ending.received = stop.agreed() if progress.step else 0  # a run takes one step at least
        while not (ending.reached or ending.received):
            step, progress.step = progress.step, progress.step + 1
            epoch_ends = progress.step % per_epoch == 0 or progress.step == total
            logs = progress.step % config.log_every == 0 or epoch_ends
            lr = learning_rate(config.optimizer, step, total, per_epoch)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            norm = take_step(engine, teachers, batches, recorder.meter, config.seed, step, logs)
            recorder.step(progress.step, epoch := step // per_epoch + 1)
            if logs:
                recorder.interval(lr, norm)
            if epoch_ends:
                with recorder.meter.aside():
                    kept.refresh()  # what is measured is what is saved
                    validation = kept.validate(data.val, data.batch_size, epoch, progress, standing)
                recorder.epoch(validation)
            ending.received = stop.agreed()
            due = progress.step % config.checkpoint_every == 0 if config.checkpoint_every else epoch_ends
            if ending.received or due or ending.reached:
                saver.save(engine, progress, recorder, kept.best)
        if ending.signal:  # it may be sent again
            stop.ignore_repeats()
    batches.close()
    ending.finish(kept, recorder, data, standing)
    return Fitted(kept, recorder.tracker, progress, ending.signal, ending.stopped_by)
