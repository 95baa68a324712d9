"""Checkpoints that a run goes on from exactly: written aside, checked, renamed; the newest two are kept.

    checkpoints/step_00001200/
        distiller.safetensors    all that learns: the student and what the losses learn
        optimizer.safetensors    the optimizer's tensors, by parameter number
        best.safetensors         the student that was best on validation, if there is one
        state.json               progress, and the checksums of the files above and of itself

There is no generator's state and no data position: order, views, dropout and learning rate are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor

from kd.run.folder import sync_folder
from kd.util.errors import say, writing
from kd.util.parallel import share_out

KEEP = 2


@dataclass
class Progress:
    """Where a run is. All of it is in `state.json`.

    step: optimizer steps done.
    sums: running sums of the open log interval and epoch, by name.
    best: {"epoch", "val_accuracy"} of the best validation so far.
    metrics_bytes: length of metrics.jsonl; what was written after it is cut off on resume.
    seconds: training time so far, over all starts.
    scaler: the state of fp16's loss scale.
    """

    step: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    metrics_bytes: int = 0
    seconds: float = 0.0
    scaler: dict | None = None


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write `folder/step_N` whole or not at all, then drop all but the newest two.

    Args:
        folder: the run's `checkpoints`.
        progress: goes into `state.json`.
        tensors: file stem to named tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    aside = folder / f".tmp-{final.name}"
    for left in folder.glob(".tmp-*"):  # by a kill, of this step or another
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        digests = {}
        for stem, named in tensors.items():
            named = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            content = safetensors.torch.save(named)
            digests[f"{stem}.safetensors"] = hashlib.sha256(content).hexdigest()
            _write(aside / f"{stem}.safetensors", content)
        state = {"progress": asdict(progress), "sha256": digests}
        _write(aside / "state.json", json.dumps({**state, "sha256_of_this": _digest(state)}, indent=1).encode())
        sync_folder(aside)
        if final.exists():  # the same step written before a signal; the newer one has the same content
            shutil.rmtree(final)
        os.rename(aside, final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in checkpoints(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(path: Path, content: bytes) -> None:
    with writing(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Whole or damaged checkpoints, the newest first; half-written ones have another name."""
    return sorted(folder.glob("step_*"), reverse=True)


def load_newest(folder: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint whose checksums hold; a damaged one is passed over, and said. None if there is none."""
    for path in checkpoints(folder):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            say(f"checkpoint {path} is damaged ({error}); using the one before it")
    return None


def _load(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    content = json.loads((path / "state.json").read_text())
    own = content.pop("sha256_of_this")
    if own != _digest(content):
        raise ValueError("state.json does not have its checksum")
    tensors = {}
    for name, digest in content["sha256"].items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} does not have its checksum")
        # sorted: the reader gives each process an order of its own, and FSDP2 shares them out one after the other
        tensors[name.removesuffix(".safetensors")] = dict(sorted(safetensors.torch.load(data).items()))
    return Progress(**content["progress"]), tensors


def optimizer_tensors(optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `3.exp_avg` is that of the fourth parameter."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value
        for number, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; groups and learning rate stay those of the config."""
    content = optimizer.state_dict()
    content["state"] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        like = parameters[int(number)]
        content["state"].setdefault(int(number), {})[key] = share_out(tensor, like) if tensor.dim() else tensor
    optimizer.load_state_dict(content)
