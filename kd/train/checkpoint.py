"""Checkpoints that a run resumes from exactly: written aside, checked, renamed; the newest two are kept.

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
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor

from kd.util.errors import is_main_process, say
from kd.util.files import built_aside, delete, sync, write_synced
from kd.util.gathers import share_out
from kd.util.tensors import savable

KEEP = 2
_WHOLE = re.compile(r"step_\d{8}")
_HALF = re.compile(r"step_\d{8}\.tmp-\d+|\.tmp-step_\d{8}")  # the second as an earlier version named them


@dataclass
class Progress:
    """Where a run is. All of it is in `state.json`.

    step: optimizer steps done.
    sums: running sums of the open log interval and epoch, by name.
    standing: what `kd.train.standing` has seen of each network's validation.
    best: {"epoch", "val_accuracy"} of the best validation so far, by network.
    metrics_bytes: length of metrics.jsonl; what was written after it is cut off on resume.
    seconds: training time so far, over all starts.
    scaler: the state of fp16's loss scale.
    """

    step: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    standing: dict[str, dict] = field(default_factory=dict)
    metrics_bytes: int = 0
    seconds: float = 0.0
    scaler: dict | None = None


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write `folder/step_N`, of named tensors by file stem, whole or not at all, then drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    for left in folder.iterdir():  # by a kill, of this step or another
        if _HALF.fullmatch(left.name):
            delete(left, folder)
    with built_aside(final) as aside:
        digests = {}
        for stem, named in tensors.items():
            content = safetensors.torch.save(savable(named))
            digests[f"{stem}.safetensors"] = hashlib.sha256(content).hexdigest()
            write_synced(aside / f"{stem}.safetensors", content)
        state = {"progress": asdict(progress), "sha256": digests}
        content = json.dumps({**state, "sha256_of_this": _digest(state)}, indent=1).encode()
        write_synced(aside / "state.json", content)
        sync(aside)
    sync(folder)
    for old in [path for path in checkpoints(folder) if path != final][KEEP - 1 :]:  # never the one just written
        delete(old, folder)
    return final


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Whole or damaged checkpoints, the newest first; what has another name is half-written or not ours."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _WHOLE.fullmatch(path.name)), reverse=True)


def load_newest(folder: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint whose checksums hold; None if there is none.

    A damaged one is named and, by the main process, moved aside to `damaged_step_N` where the disk allows that.
    """
    for path in checkpoints(folder):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            say(f"checkpoint {path} is damaged ({error}); using the one before it")
        if is_main_process():  # so that it no longer counts among the newest
            aside = path.with_name(f"damaged_{path.name}")
            delete(aside, folder)
            with suppress(OSError):
                os.rename(path, aside)
    return None


def _load(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    content = json.loads((path / "state.json").read_text())
    if content.pop("sha256_of_this") != _digest(content):
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
    entries = optimizer.state_dict()["state"].items()
    flat = {f"{number}.{key}": value for number, entry in entries for key, value in entry.items()}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def load_optimizer_tensors(optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; groups and learning rate stay those of the config."""
    content = {**optimizer.state_dict(), "state": {}}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        like = parameters[int(number)]
        content["state"].setdefault(int(number), {})[key] = share_out(tensor, like) if tensor.dim() else tensor
    optimizer.load_state_dict(content)
