"""The end of a run: choose the weights, measure them on the test split, write the network and the summary."""

from __future__ import annotations

import platform
import signal
import subprocess
from importlib.metadata import version
from pathlib import Path

import accelerate
import torch

import kd
from kd import cost, metrics
from kd.data import Data
from kd.errors import say
from kd.fit import Fitted
from kd.predict import predict
from kd.run_folder import Run


def conclude(fitted: Fitted, data: Data, config, accelerator, run: Run) -> int:
    """Measure the last and the best weights on test, write `config.select`'s as the run's network, and the summary.

    Nothing is selected on test: `best` is the epoch that was best on validation.

    Returns:
        The script's exit status: 0, or 128 + the signal's number when a signal stopped the run before its last step.
    """
    student, progress = fitted.student, fitted.progress
    if fitted.signal:
        fitted.tracker.finish()
        accelerator.wait_for_everyone()  # the launcher ends all when one ends, and the first one may still write
        name = signal.Signals(fitted.signal).name
        say(f"stopped by {name} after step {progress.step}; the same command goes on from there")
        return 128 + fitted.signal
    last = {name: tensor.detach().clone() for name, tensor in student.network.state_dict().items()}
    results = {}
    for name, weights in (("best", fitted.best), ("last", last)):
        if not weights:
            continue
        student.network.load_state_dict(weights)
        logits, labels = predict(student, data.test, config.data.batch_size, accelerator)
        results[name] = {
            "test_accuracy": metrics.accuracy(logits, labels),
            "test_nll": metrics.negative_log_likelihood(logits, labels),
        }
        if data.val is not None:
            logits, labels = predict(student, data.val, config.data.batch_size, accelerator)
            results[name]["val_accuracy"] = metrics.accuracy(logits, labels)
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
        "sharded": accelerator.is_fsdp2,
        "device": device_name(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    run.finish(files, summary)
    fitted.tracker.finish(summary)
    say(f"test accuracy {summary['test_accuracy']:.2f} %")
    return 0


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    return {
        "kd": kd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "accelerate": accelerate.__version__,
    }


def device_name(device: torch.device) -> str:
    """The hardware in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """The commit these scripts are at, with `-dirty` if they were changed since; None outside git."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
