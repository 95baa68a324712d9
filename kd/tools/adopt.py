"""A network that was trained elsewhere becomes a finished run, measured on a data source.

python -m kd.adopt --model resnet18 --weights teacher.pth --data.source path/to/folder --output_dir runs/mine/teacher
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from kd.data import Data, load_data
from kd.models import Classifier, View, bare, build_network, fill, read_weights, torchvision_nets
from kd.run.config import AdoptConfig, TeacherConfig
from kd.run.parse import parse
from kd.students import Plain
from kd.track import Tracker
from kd.train.checkpoint import Progress
from kd.train.conclude import conclude
from kd.train.fit import Fitted
from kd.train.inputs import remember
from kd.train.kept import Kept
from kd.train.setup import build_learner, check_images, make_accelerator, open_run
from kd.util.errors import UserError, say


def main(argv: list[str] | None = None) -> int:
    """Write the run folder; returns the exit status."""
    config = parse(AdoptConfig, argv)
    training = _untrained(config)
    accelerator = make_accelerator(training)
    if accelerator.is_fsdp2:  # the network would be copied from its parts, and nothing is in parts here
        raise UserError(
            "kd.adopt trains nothing that FSDP2 could share out; use one process, or DistributedDataParallel"
        )
    with open_run(training, accelerator) as run:
        if run.finished:
            return 0
        data = load_data(config.data)
        names = read_classes(config.classes, data.classes) if config.classes else data.classes
        remember(run, training, data)
        data = relabelled(data, names)
        network = trained(config, data)
        if data.val is not None:
            say("note: if it was trained on the images that are validation here, its validation accuracy is too good")
        learner = build_learner(network.to(accelerator.device), None, data, training)
        if run.is_main and Path(config.weights).is_file():
            run.inputs["weights"] = {config.weights: hashlib.sha256(Path(config.weights).read_bytes()).hexdigest()}
        run.begin()
        fitted = Fitted(Kept(learner, accelerator, {}), Tracker(accelerator, run, training, "", 0), Progress(), 0)
        return conclude(fitted, data, training, accelerator, run)


def _untrained(config: AdoptConfig) -> TeacherConfig:
    """The config of a training run without a step."""
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "classes"}
    training = TeacherConfig(**shared, learner=Plain(), epochs=0, report_to="none", mixed_precision="no")
    training.resolved = config.resolved
    return training


def trained(config: AdoptConfig, data: Data) -> Classifier:
    """The network with the weights of the file, all of them; weights that do not fit are a UserError."""
    name, settings = bare(config.model), config.data
    state = read_weights(name, config.weights)
    network = build_network(name, len(data.classes), config.model_args, trust=True)
    head = state.get(f"{torchvision_nets.head_name(network)}.weight")
    if head is not None and len(head) != len(data.classes):
        raise UserError(
            f"weights {config.weights!r} have a head of {len(head)} classes, and {settings.source} has "
            f"{len(data.classes)}; a new head would be random: name the data that it was trained on, or train one with "
            f"train_teacher.py --model {name} --weights {config.weights} --freeze_backbone true"
        )
    fill(network, state, name, config.weights)
    view = View(settings.resize, settings.crop, settings.channels, settings.mean, settings.std, data.image_shape[1:])
    classifier = Classifier(network, view, data.classes, {"model": name, "model_args": dict(config.model_args)})
    check_images(classifier, data, name)
    return classifier.eval()


def read_classes(file: str, known: list[str]) -> list[str]:
    """The network's class names in its order, from a file with one per line that names each class of the data once."""
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"classes {file!r} cannot be read: {error}; give a text file, one name per line") from None
    faults = {
        "twice": sorted({name for name in names if names.count(name) > 1}),
        "not of the data": [name for name in names if name not in known],
        "missing": [name for name in known if name not in names],
    }
    if any(faults.values()):
        words = "; ".join(f"{fault}: {', '.join(found[:5])}" for fault, found in faults.items() if found)
        raise UserError(f"classes {file!r} must name each of the {len(known)} classes of the data once ({words})")
    return names


def relabelled(data: Data, names: list[str]) -> Data:
    """The data with its classes in the network's order."""
    if names == data.classes:
        return data
    order = np.array([names.index(name) for name in data.classes])
    splits = {key: getattr(data, key) for key in ("train", "val", "test")}
    moved = {
        key: split and replace(split, store=replace(split.store, labels=order[split.store.labels]))
        for key, split in splits.items()
    }
    return replace(data, classes=names, **moved)
