"""The one training loop. Everything that varies is in its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kd import keyed
from kd.data import Data, TrainBatches, Views
from kd.measure import metrics
from kd.measure.predict import predict
from kd.outputs import Batch
from kd.run.folder import Run
from kd.teachers import Teacher
from kd.teachers.precompute import TableTeacher, ViewTableTeacher
from kd.track import Tracker
from kd.train.checkpoint import Progress, load_newest, save_checkpoint
from kd.train.distiller import Distiller
from kd.train.engine import Engine, make_engine
from kd.train.meter import Meter, not_finite
from kd.train.optim import learning_rate
from kd.util.errors import UserError, say
from kd.util.gathers import all_finite, copy_whole, share_buffers
from kd.util.processes import StopSignal, answering_roll_calls


def fit(
    distiller: Distiller,
    teacher: Teacher | TableTeacher | ViewTableTeacher | None,
    data: Data,
    config,
    accelerator: Accelerator,
    run: Run,
) -> Fitted:
    """Train until the last step, going on from the run's newest checkpoint.

    Each step is a function of the weights, the optimizer's state and the step number, so a run that was stopped at any
    moment ends with the same bytes as one that was not (on a CPU; on a GPU with `deterministic`).

    Args:
        distiller: the student and its losses; moved to the accelerator's device.
        teacher: already on that device, or None.
        config: a `kd.run.config.TrainConfig`.

    Returns:
        What conclude() needs; its `signal` is not 0 if a signal stopped the run before its last step.

    Raises:
        UserError: the loss is not finite.
    """
    student, device = distiller.student, accelerator.device
    run.begin()
    accelerator.wait_for_everyone()
    in_parts = accelerator.is_fsdp2
    if in_parts:  # what is evaluated is a whole copy, on the device only as long as it is needed there
        student = student.twin()
    engine = make_engine(distiller, config, accelerator)
    data = data.on_device(device, config.data.device_share)
    batches = TrainBatches(
        data.train,
        config.data.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        Views.of(config.data),
        config.accumulate,
        len(data.classes),
    )
    set_seed = _seeder(device)
    per_epoch = batches.steps_per_epoch
    total = config.epochs * per_epoch if config.max_steps is None else min(config.epochs * per_epoch, config.max_steps)
    progress, best = _resume(engine, accelerator, run)
    tracker = Tracker(accelerator, run, config, distiller.objective(), progress.metrics_bytes)
    meter = Meter(list(distiller.losses), device, progress.sums, accelerator.is_main_process)
    folder, saved_step = run.folder / "checkpoints", progress.step if progress.step else None
    started = time.perf_counter() - progress.seconds
    bar = tqdm(
        total=total,
        initial=progress.step,
        unit="step",
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    )

    def save() -> int:
        run.require()
        meter.check(accelerator, config.optimizer.lr, saved_step)  # what is not finite must never be kept
        if not all_finite(list(distiller.state_dict().values()), accelerator):
            raise not_finite("the weights are", progress.step, config.optimizer.lr, saved_step)
        progress.sums, progress.metrics_bytes = meter.state(accelerator), tracker.num_bytes
        progress.seconds = time.perf_counter() - started
        progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        tensors = engine.tensors()
        if accelerator.is_main_process:
            save_checkpoint(folder, progress, {**tensors, **({"best": best} if best else {})})
        return progress.step

    def forward_backward(batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        teacher_outputs = None
        if teacher is not None:
            with accelerator.autocast():
                teacher_outputs = teacher.answer(batch)
        return engine.forward_backward(batch, teacher_outputs, share, last)

    distiller.train()
    with StopSignal(config.peer_timeout) as stop, answering_roll_calls():
        while progress.step < total:
            step = progress.step
            for group in engine.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, total, per_epoch)
            seed = keyed.key(config.seed, keyed.Purpose.DROPOUT, step, accelerator.process_index) & (2**63 - 1)
            set_seed(seed)
            for micro in reversed(range(batches.num_micro(step))):
                batch, share = batches.read(step, device, micro)
                if not engine.settled:
                    engine.settle(partial(forward_backward, batch, share, last=True))
                    set_seed(seed)
                terms = forward_backward(batch, share, last=not micro)
                meter.add(terms, len(batch.labels) if share else 0, step)
            progress.step = step + 1
            epoch_ends = progress.step % per_epoch == 0 or progress.step == total
            logs = progress.step % config.log_every == 0 or epoch_ends
            norm = engine.update(wants_norm=logs)
            bar.update()
            if logs:
                row = meter.flush(accelerator, config.optimizer.lr, saved_step, norm)
                seen = progress.step * config.data.batch_size - (progress.step // per_epoch) * (
                    per_epoch * config.data.batch_size - len(data.train)
                )
                place = {"step": progress.step, "epoch": step // per_epoch + 1, "images_seen": seen}
                tracker.log({**place, **row, "lr": engine.param_groups[0]["lr"]})
                bar.set_description(f"epoch {place['epoch']}/{config.epochs}", refresh=False)
                terms = [f"{k.removeprefix('train/')} {v:.4g}" for k, v in row.items() if k.startswith("train/")]
                bar.set_postfix_str("  ".join([*terms, f"{row['images_per_second']:,.0f} images/s"]))
            if epoch_ends:
                row = meter.end_epoch()
                share_buffers(distiller.student)  # what is measured is what is saved
                if data.val is not None:
                    if in_parts:
                        copy_whole(distiller.student, student.to(device))
                    logits, labels = predict(student, data.val, config.data.batch_size, accelerator)
                    if in_parts:
                        student.to("cpu")
                    distiller.train()
                    row["val/accuracy"] = metrics.accuracy(logits, labels)
                    row["val/nll"] = metrics.negative_log_likelihood(logits, labels)
                    if row["val/accuracy"] > progress.best.get("val_accuracy", -1):
                        progress.best = {"epoch": place["epoch"], "val_accuracy": row["val/accuracy"]}
                        best = {k: v.detach().cpu().clone() for k, v in student.network.state_dict().items()}
                tracker.log({**place, **row})
                _say_epoch(bar, place["epoch"], config.epochs, row)
            every = config.checkpoint_every
            received = stop.agreed()
            if received or (progress.step % every == 0 if every else epoch_ends) or progress.step == total:
                saved_step = save()
            if received and progress.step < total:
                stop.ignore_repeats()
                break
    bar.close()
    batches.close()
    if in_parts:
        copy_whole(distiller.student, student.to(device))
    finished = progress.step == total
    return Fitted(student, tracker, progress, best, 0 if finished else received)


class Fitted:
    """What training leaves: the student, its best weights on validation, progress, and the open tracker."""

    def __init__(
        self, student: nn.Module, tracker: Tracker, progress: Progress, best: dict[str, Tensor], received: int
    ):
        self.student, self.tracker, self.progress, self.best, self.signal = student, tracker, progress, best, received


def _seeder(device: torch.device) -> Callable[[int], None]:
    """What `torch.manual_seed` does to the generators that a run on this device draws from.

    `torch.manual_seed` itself formats the stack for every kind of device that is not there: milliseconds a step.
    """
    if device.type not in ("cpu", "cuda"):
        return torch.manual_seed
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])

    def set_seed(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    return set_seed


def _resume(engine: Engine, accelerator, run: Run) -> tuple[Progress, dict[str, Tensor]]:
    found = load_newest(run.folder / "checkpoints")
    steps = accelerator.gather(torch.tensor([found[0].step if found else 0], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes see different checkpoints in {run.folder} (steps {steps}); "
            f"put output_dir on a disk that all nodes share"
        )
    if found is None:
        return Progress(), {}
    progress, tensors = found
    engine.load(tensors)
    if progress.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(progress.scaler)
    say(f"going on after step {progress.step}")
    return progress, tensors.get("best", {})


def _say_epoch(bar, epoch: int, epochs: int, row: dict) -> None:
    terms = ", ".join(
        f"{key.removeprefix('epoch/')} {value:.4f}"
        for key, value in row.items()
        if key.startswith("epoch/") and key not in ("epoch/loss", "epoch/images_per_second")
    )
    val = f"  val {row['val/accuracy']:.2f} %" if "val/accuracy" in row else ""
    speed = f"{row['epoch/images_per_second']:,.0f} images/s"
    line = f"epoch {epoch}/{epochs}  loss {row['epoch/loss']:.4f} ({terms}){val}  {speed}"
    if not bar.disable:
        bar.write(line)
    else:
        say(line)
