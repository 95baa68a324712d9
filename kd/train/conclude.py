"""The end of a run: choose the weights, measure them on the test split, write the network and the summary."""

from __future__ import annotations

import signal

from kd.data import Data
from kd.measure import cost, metrics
from kd.measure.predict import predict
from kd.run.folder import Run
from kd.teachers import Teacher, load_teacher
from kd.track import Outcome, hardest
from kd.train import zero
from kd.train.fit import Fitted
from kd.util.errors import UserError, say
from kd.util.machine import device_name, git_commit, versions


def conclude(fitted: Fitted, data: Data, config, accelerator, run: Run) -> int:
    """Measure the last and the best weights on test, write `config.select`'s as the run's network, and the summary.

    Nothing is selected on test: `best` is the epoch that was best on validation.

    Returns:
        The script's exit status: 0, or 128 + the signal's number when a signal stopped the run before its last step.
    """
    student, progress = fitted.student, fitted.progress
    if fitted.signal:
        fitted.tracker.finish(signal=fitted.signal)
        accelerator.wait_for_everyone()  # the launcher ends all when one ends, and the first one may still write
        name = signal.Signals(fitted.signal).name
        say(f"stopped by {name} after step {progress.step}; the same command goes on from there")
        return 128 + fitted.signal
    last = {name: tensor.detach().clone() for name, tensor in student.network.state_dict().items()}
    results, logits_of = {}, {}
    for name, weights in (("best", fitted.best), ("last", last)):
        if not weights:
            continue
        student.network.load_state_dict(weights)
        logits_of[name], labels = predict(student, data.test, config.data.batch_size, accelerator)
        results[name] = {
            "test_accuracy": metrics.accuracy(logits_of[name], labels),
            "test_nll": metrics.negative_log_likelihood(logits_of[name], labels),
            "test_ece": metrics.calibration_error(logits_of[name], labels),
        }
        if data.val is not None:
            results[name]["val_accuracy"] = metrics.accuracy(
                *predict(student, data.val, config.data.batch_size, accelerator)
            )
    if "best" in results:
        results["best"]["epoch"] = progress.best["epoch"]
    chosen = results[config.select]
    if config.select == "best":
        student.network.load_state_dict(fitted.best)
    files = student.files()
    summary = {
        "test_accuracy": chosen["test_accuracy"],
        "val_accuracy": chosen.get("val_accuracy"),
        "test_nll": chosen["test_nll"],
        "test_ece": chosen["test_ece"],
        "select": config.select,
        **results,
        "num_params": cost.num_params(student.network),
        "multiply_adds": cost.multiply_adds(student, data.image_shape),
        "bytes": len(files["model.safetensors"]),
        "seconds": progress.seconds,
        "steps": progress.step,
        "epochs": config.epochs,
        "images": {"train": len(data.train), "val": len(data.val) if data.val else 0, "test": len(data.test)},
        "seed": config.seed,
        "num_processes": accelerator.num_processes,
        "sharded": accelerator.is_fsdp2 or zero.wanted(accelerator.num_processes),
        "device": device_name(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    run.finish(files, summary)
    shown = None
    if fitted.tracker.wants_outcome:
        teacher = _teacher(config, data, accelerator)
        rows = hardest(data.test, logits_of[config.select], labels, data.classes, teacher, accelerator.device)
        shown = Outcome(data.classes, logits_of[config.select], labels, rows)
    fitted.tracker.finish(summary, shown)
    say(f"test accuracy {summary['test_accuracy']:.2f} %")
    return 0


def _teacher(config, data: Data, accelerator) -> Teacher | None:
    """The teacher once more, to ask it about a few images: in training it may have been a table."""
    if not hasattr(config, "teacher"):
        return None
    try:
        return load_teacher(config.teacher, data.classes, config.teacher_mean, accelerator.device, config.trust_code)
    except UserError as error:
        say(f"the teacher is not shown beside the student: {error}")
        return None
