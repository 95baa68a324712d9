"""The end of a run: choose the weights, measure them on the test split, write the networks and the summaries."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from torch import Tensor, nn

from kd.data import Data
from kd.measure import cost, metrics
from kd.measure.predict import predict
from kd.run.folder import Run
from kd.teachers import Teachers, load_teachers
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
    networks, best = fitted.kept.networks, fitted.kept.best
    measured, files, summaries = {}, {}, {}
    standing = Standing(config, fitted.progress.standing)
    shared = _about(fitted, data, config, accelerator)
    for name, network in networks.items():
        epoch = fitted.progress.best.get(name, {}).get("epoch")
        measured[name] = _measure(network, best.get(name), epoch, data, config, accelerator)
        standing.conclude(name, measured[name].logits, measured[name].labels, fitted.progress.step)
        files[name] = network.files()
        summaries[name] = {
            **measured[name].summary,
            "num_params": cost.num_params(network.network),
            "multiply_adds": cost.multiply_adds(network, data.image_shape),
            "bytes": len(files[name]["model.safetensors"]),
            **shared,
        }
    first, *others = networks
    for name in others:
        run.keep(name, files[name], summaries[name])
    run.finish(files[first], summaries[first])
    shown = None
    if fitted.tracker.wants_outcome:
        logits, labels = measured[first].logits, measured[first].labels
        teachers = _teachers(config, data, accelerator)
        rows = hardest(data.test, logits, labels, data.classes, teachers, accelerator.device)
        shown = Outcome(data.classes, logits, labels, rows)
    fitted.tracker.finish(summaries, shown)
    for name in networks:
        label = "test accuracy" if name == first and not others else f"test accuracy of {name}"
        say(f"{label} {summaries[name]['test_accuracy']:.2f} %")
    return 0


def _stopped(fitted: Fitted, accelerator) -> int:
    fitted.tracker.finish(signal=fitted.signal)
    accelerator.wait_for_everyone()  # the launcher ends all when one ends, and the first one may still write
    name = signal.Signals(fitted.signal).name
    say(f"stopped by {name} after step {fitted.progress.step}; the same command resumes from there")
    return 128 + fitted.signal


@dataclass
class _Measured:
    """What a network's chosen weights, which it has now, give on test: logits (N, K), labels (N,), and the results."""

    logits: Tensor
    labels: Tensor
    summary: dict


def _measure(network: nn.Module, best, epoch: int | None, data: Data, config, accelerator) -> _Measured:
    """Measure a network's last weights and its best, where there are such; leaves it with those of `config.select`."""
    last = {name: tensor.detach().clone() for name, tensor in network.network.state_dict().items()}
    size, results, logits_of = data.batch_size, {}, {}
    for name, weights in (("best", best), ("last", last)):
        if not weights:
            continue
        network.network.load_state_dict(weights)
        logits_of[name], labels = predict(network, data.test, size, accelerator)
        results[name] = {
            "test_accuracy": metrics.accuracy(logits_of[name], labels),
            "test_nll": metrics.negative_log_likelihood(logits_of[name], labels),
            "test_ece": metrics.calibration_error(logits_of[name], labels),
        }
        if data.val is not None:
            results[name]["val_accuracy"] = metrics.accuracy(*predict(network, data.val, size, accelerator))
    if "best" in results:
        results["best"]["epoch"] = epoch
    if config.select == "best":
        network.network.load_state_dict(best)
    chosen = results[config.select]
    summary = {
        "test_accuracy": chosen["test_accuracy"],
        "val_accuracy": chosen.get("val_accuracy"),
        "test_nll": chosen["test_nll"],
        "test_ece": chosen["test_ece"],
        "select": config.select,
        **results,
    }
    return _Measured(logits_of[config.select], labels, summary)


def _about(fitted: Fitted, data: Data, config, accelerator) -> dict:
    """What the summaries of all networks of a run have in common."""
    left = fitted.kept.left_over
    return {
        **({"batch_norm_left_over": left} if left else {}),  # of the first statistics; those written are re-estimated
        "seconds": fitted.progress.seconds,
        "steps": fitted.progress.step,
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
