"""The end of a run: choose the weights, measure them on the test split, write the networks and the summaries."""

from __future__ import annotations

import signal

from torch import nn

from kd.data import Data
from kd.measure import cost, metrics
from kd.measure.predict import predict
from kd.run.folder import Run
from kd.teachers import Teachers
from kd.teachers.load import load_teachers
from kd.track import Outcome, hardest
from kd.train import zero
from kd.train.fit import Fitted
from kd.train.standing import Standing
from kd.util.errors import UserError, say
from kd.util.machine import device_name, git_commit, versions


def conclude(fitted: Fitted, data: Data, config, accelerator, run: Run) -> int:
    """Measure the last and the best weights on test, write `config.select`'s as the run's networks, and the summaries.

    Nothing is selected on test: `best` is the epoch that was best on validation, for each network its own.

    Returns:
        The script's exit status: 0, or 128 + the signal's number when a signal stopped the run before its last step.
    """
    if fitted.signal:
        return _stopped(fitted, accelerator)
    networks, shared = fitted.kept.networks, _about(fitted, data, config, accelerator)
    standing = Standing(config, fitted.progress.standing)
    measured, files, summaries = {}, {}, {}
    for name, network in networks.items():
        logits, labels, results = _measure(name, network, fitted, data, config, accelerator)
        standing.conclude(name, logits, labels, fitted.progress.step)
        measured[name] = logits, labels
        files[name] = network.files()
        sizes = {
            "num_params": cost.num_params(network.network),
            "multiply_adds": cost.multiply_adds(network, data.image_shape),
            "bytes": len(files[name]["model.safetensors"]),
        }
        summaries[name] = {**results, **sizes, **shared}
    run.finish(files, summaries)
    first, shown = next(iter(networks)), None
    if fitted.tracker.wants_outcome:
        teachers = _teachers(config, data, accelerator)
        rows = hardest(data.test, *measured[first], data.classes, teachers, accelerator.device)
        shown = Outcome(data.classes, *measured[first], rows)
    fitted.tracker.finish(summaries, shown)
    for name in networks:
        whose = f" of {name}" if len(networks) > 1 else ""
        say(f"test accuracy{whose} {summaries[name]['test_accuracy']:.2f} %")
    return 0


def _stopped(fitted: Fitted, accelerator) -> int:
    fitted.tracker.finish(signal=fitted.signal)
    accelerator.wait_for_everyone()  # the launcher ends all when one ends, and the first one may still write
    name = signal.Signals(fitted.signal).name
    say(f"stopped by {name} after step {fitted.progress.step}; the same command resumes from there")
    return 128 + fitted.signal


def _measure(name: str, network: nn.Module, fitted: Fitted, data: Data, config, accelerator):
    """Measure a network's last weights and its best, where there are such; leaves it with those of `config.select`.

    Returns:
        What these give on test, logits (N, K) and labels (N,), and the part of the summary on all of it.
    """
    last = {key: tensor.detach().clone() for key, tensor in network.network.state_dict().items()}
    candidates = {"best": fitted.kept.best.get(name), "last": last}
    results, logits = {}, {}
    for which, weights in candidates.items():
        if not weights:
            continue
        network.network.load_state_dict(weights)
        logits[which], labels = predict(network, data.test, data.batch_size, accelerator)
        results[which] = {
            "test_accuracy": metrics.accuracy(logits[which], labels),
            "test_nll": metrics.negative_log_likelihood(logits[which], labels),
            "test_ece": metrics.calibration_error(logits[which], labels),
        }
        if data.val is not None:
            found = predict(network, data.val, data.batch_size, accelerator)
            results[which]["val_accuracy"] = metrics.accuracy(*found)
    if "best" in results:
        results["best"]["epoch"] = fitted.progress.best[name]["epoch"]
    network.network.load_state_dict(candidates[config.select])
    chosen = results[config.select]
    names = ("test_accuracy", "val_accuracy", "test_nll", "test_ece")
    return logits[config.select], labels, {**{n: chosen.get(n) for n in names}, "select": config.select, **results}


def _about(fitted: Fitted, data: Data, config, accelerator) -> dict:
    """What the summaries of all networks of a run have in common."""
    left = fitted.kept.left_over
    return {
        **({"batch_norm_left_over": left} if left else {}),  # of the first statistics; those written are re-estimated
        "seconds": fitted.progress.seconds,
        "steps": fitted.progress.step,
        **({"stopped_by": fitted.stopped_by} if fitted.stopped_by else {}),
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


def _teachers(config, data: Data, accelerator) -> Teachers | None:
    """The teachers once more, for a few images: in training their outputs may have come from a table."""
    if not getattr(config, "teacher", None):
        return None
    try:
        return load_teachers(config.teacher, data.classes, config.teacher_mean, accelerator.device, config.trust_code)
    except UserError as error:
        say(f"the teacher is not shown beside the student: {error}")
        return None
