"""Checkpoints that a run resumes from exactly: written aside, checked, renamed; the newest two are kept.

    checkpoints/step_00001200/
        distiller.safetensors    all that learns: the student and what the losses learn
        optimizer.safetensors    the optimizer's tensors, by parameter number
        best.safetensors         the student that was best on validation, if there is one
        state.json               progress, which frozen weights the two networks have, and the checksums of the files
                                 above and of itself
    checkpoints/frozen.safetensors    what the run began with and does not train, by checksum; written once

There is no generator's state and no data position: order, views, dropout and learning rate are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kd.util.contents import wrong_progress
from kd.util.errors import is_main_process, say
from kd.util.files import built_aside, delete, sync, write_atomic, write_synced
from kd.util.gathers import share_out
from kd.util.tensors import savable

KEEP = 2  # at least, so that a damaged one costs steps and not the run
FROZEN = "frozen.safetensors"
_WHOLE = re.compile(r"step_\d{8}")
_FILE = re.compile(r"(distiller|optimizer|best)\.safetensors")
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


def save_checkpoint(
    folder: Path,
    progress: Progress,
    tensors: dict[str, dict[str, Tensor]],
    frozen: Iterable[str] = (),
    keep: int = KEEP,
) -> Path:
    """Write `folder/step_N` whole or not at all, then drop all but the newest.

    Args:
        folder: the run's `checkpoints`.
        progress: goes into `state.json`.
        tensors: file stem to named tensors.
        frozen: checksums of what the run began with and does not train, see `frozen_tensors`.
        keep: how many checkpoints stay; the newest two in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    for left in folder.iterdir():  # by a kill, of this step or another
        if _HALF.fullmatch(left.name):
            delete(left, folder)
    tensors, references = _without_frozen(folder, tensors, frozen)
    with built_aside(final) as aside:
        digests = {}
        for stem, named in tensors.items():
            content = safetensors.torch.save(savable(named))
            digests[f"{stem}.safetensors"] = hashlib.sha256(content).hexdigest()
            write_synced(aside / f"{stem}.safetensors", content)
        state = {"progress": asdict(progress), "frozen": references, "sha256": digests}
        content = json.dumps({**state, "sha256_of_this": _digest(state)}, indent=1).encode()
        write_synced(aside / "state.json", content)
        sync(aside)
    sync(folder)
    others = [path for path in checkpoints(folder) if path != final]  # never the one just written
    for old in others[max(keep, KEEP) - 1 :]:
        delete(old, folder)
    return final


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds and does not train, by checksum; nothing where all its parameters are trained."""
    trained = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    if len(trained) == sum(1 for _ in module.named_parameters(remove_duplicate=False)):
        return {}
    return {_checksum(tensor): tensor for name, tensor in module.state_dict().items() if name not in trained}


def _checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's kind, shape and content."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_frozen(folder: Path, tensors: dict, frozen: Iterable[str]) -> tuple[dict, dict[str, dict[str, str]]]:
    """The tensors without those that `frozen.safetensors` holds, and these ones' checksums, by file stem and name.

    The file is written the first time. What counts is what a tensor holds now: an average of the past has no gradients,
    and is another one after each step.
    """
    try:
        with safe_open(folder / FROZEN, "pt") as file:
            known, new = set(file.keys()), False
    except (OSError, SafetensorError):
        known, new = set(frozen), True
    rest, references, once = dict(tensors), {}, {}
    for stem in {"distiller", "best"} & tensors.keys() if known else ():
        checksums = {name: _checksum(tensor) for name, tensor in tensors[stem].items()}
        references[stem] = {name: checksum for name, checksum in checksums.items() if checksum in known}
        rest[stem] = {name: tensor for name, tensor in tensors[stem].items() if name not in references[stem]}
        once |= {checksum: tensors[stem][name] for name, checksum in references[stem].items()}
    if new and once:
        write_atomic(folder / FROZEN, safetensors.torch.save(savable(once)))
    return rest, references


def _held(folder: Path) -> dict[str, Tensor]:
    """What `frozen.safetensors` holds, by checksum: of what is damaged the checksum is another one."""
    try:
        return {_checksum(tensor): tensor for tensor in safetensors.torch.load_file(folder / FROZEN).values()}
    except (OSError, SafetensorError):
        return {}


def checkpoints(folder: Path) -> list[Path]:
    """Whole or damaged checkpoints, the newest first; what has another name is half-written or not ours."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _WHOLE.fullmatch(path.name)), reverse=True)


def load_newest(
    folder: Path, frozen: Mapping[str, Tensor] | None = None
) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The newest checkpoint whose checksums hold; None if there is none.

    A damaged one is named and, by the main process, moved aside to `damaged_step_N` where the disk allows that.

    Args:
        folder: the run's `checkpoints`.
        frozen: see `frozen_tensors`, of the run as it begins now: where `frozen.safetensors` is damaged these serve.
    """
    for path in checkpoints(folder):
        try:
            return _load(path, frozen or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            say(f"checkpoint {path} is damaged ({error}); using the one before it")
        if is_main_process():  # so that it no longer counts among the newest
            aside = path.with_name(f"damaged_{path.name}")
            delete(aside, folder)
            with suppress(OSError):
                os.rename(path, aside)
    return None


def _load(path: Path, frozen: Mapping[str, Tensor]) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    content = json.loads((path / "state.json").read_text())
    if content.pop("sha256_of_this") != _digest(content):
        raise ValueError("state.json does not have its checksum")
    wrong = wrong_progress(content["progress"])
    if wrong or path.name != f"step_{content['progress']['step']:08d}":
        raise ValueError(f"state.json: {wrong or 'it is of another step'}")
    tensors = {}
    for name, digest in content["sha256"].items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"{name!r:.60} is no file of a checkpoint")
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} does not have its checksum")
        tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
    if references := content.get("frozen"):
        held = _held(path.parent)
        for stem, named in references.items():
            for name, checksum in named.items():
                if checksum not in held and checksum not in frozen:
                    raise ValueError(f"{FROZEN} does not hold its {name}")
                tensors[stem][name] = held[checksum] if checksum in held else frozen[checksum].clone()
    # sorted: the reader gives each process an order of its own, and FSDP2 shares them out one after the other
    tensors = {stem: dict(sorted(named.items())) for stem, named in tensors.items()}
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
