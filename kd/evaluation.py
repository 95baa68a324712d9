"""Measure finished runs on the same images: accuracy, calibration, agreement with the teacher, cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kd import cost, metrics
from kd.conclude import device_name, versions
from kd.config import DataConfig, EvaluateConfig
from kd.data import Data, Split, load_data
from kd.errors import UserError, say
from kd.models import Classifier, load_classifier
from kd.parse import read_yaml
from kd.predict import predict
from kd.runs import read_summary
from kd.teachers import load_teacher


@dataclass
class Measured:
    """A run's numbers, all plain JSON values in `row`, and its confusion matrix (K, K)."""

    name: str
    row: dict
    confusion: Tensor
    notes: list[str] = field(default_factory=list)


class Evaluator:
    """Measures runs one after another; data and predictions that several share are made once.

    Args:
        config: which split, which images, and so on.
        accelerator: predictions are shared by its processes.
    """

    def __init__(self, config: EvaluateConfig, accelerator):
        self.config, self.accelerator = config, accelerator
        self._data: dict[str, Data] = {}
        self._logits: dict[tuple, tuple[Tensor, Tensor]] = {}

    def measure(self, run: str) -> Measured:
        """All numbers of one run.

        Raises:
            UserError: it is missing, unfinished or damaged, or does not fit the data.
        """
        folder = Path(run)
        classifier = load_classifier(folder, self.accelerator.device)
        summary, resolved = read_summary(folder), read_yaml(folder / "config.yaml")
        if not isinstance(resolved.get("data"), dict) or not {"seed", "seconds"} <= summary.keys():
            raise UserError(f"run {run!r} is damaged: config.yaml or summary.json lacks fields; train it again")
        key, data = self._open(resolved["data"])
        _match(classifier, data, run)
        split = getattr(data, self.config.split)
        if split is None:
            raise UserError(f"run {run!r} was trained without a validation split; use --split test")
        logits, labels = self._predict((str(folder.resolve()), key), classifier, data, split)
        row = {
            "run": run,
            "model": classifier.recipe["model"],
            "source": self.config.source or resolved["data"]["source"],
            "split": self.config.split,
            "num_images": len(labels),
            "top1": metrics.accuracy(logits, labels),
            "top5": metrics.accuracy(logits, labels, top=5),
            "nll": metrics.negative_log_likelihood(logits, labels),
            "calibration_error": metrics.calibration_error(logits, labels),
            "per_class": dict(zip(data.classes, metrics.per_class_accuracy(logits, labels), strict=True)),
            "num_params": cost.num_params(classifier.network),
            "multiply_adds": cost.multiply_adds(classifier, data.image_shape),
            "bytes": (folder / "model.safetensors").stat().st_size,
            "latency_ms": None,
            "teacher": resolved.get("teacher"),
            "agreement": None,
            "seed": summary["seed"],
            "train_seconds": summary["seconds"],
            "device": device_name(self.accelerator.device),
            "versions": versions(),
        }
        if self.config.latency and self.accelerator.is_main_process:
            row["latency_ms"] = cost.latency(classifier, data.image_shape)
        measured = Measured(run, row, metrics.confusion_matrix(logits, labels))
        if row["teacher"]:
            self._compare(measured, logits, resolved, key, data, split)
        return measured

    def _open(self, settings: dict) -> tuple[str, Data]:
        settings = {name: value for name, value in settings.items() if name in _DATA_FIELDS}
        if self.config.source:  # the run's subset and validation are not those of other images
            settings.update(source=self.config.source, num_train=None)
            if self.config.split == "test":
                settings.update(val_fraction=0.0)
        if self.config.cache_dir:
            settings["cache_dir"] = self.config.cache_dir
        key = json.dumps(settings, sort_keys=True)
        if key not in self._data:
            self._data[key] = load_data(DataConfig(**settings))
        return key, self._data[key]

    def _predict(self, key: tuple, network, data: Data, split: Split) -> tuple[Tensor, Tensor]:
        """Logits (N, K) in the order of the data's classes, and labels (N,)."""
        if key not in self._logits:
            logits, labels = predict(network, split, self.config.batch_size, self.accelerator)
            if isinstance(network, Classifier):
                logits = logits[:, [network.classes.index(name) for name in data.classes]]
            self._logits[key] = logits, labels
        return self._logits[key]

    def _compare(self, measured: Measured, logits: Tensor, resolved: dict, key: str, data: Data, split: Split) -> None:
        """Add agreement with the run's teacher, and say where the student saves nothing."""
        names, row = resolved["teacher"], measured.row
        names = [names] if isinstance(names, str) else names
        label = f"{measured.name}: its teacher {' + '.join(names)}"
        try:
            teacher = load_teacher(names, data.classes, resolved["teacher_mean"], self.accelerator.device)
        except UserError as error:
            measured.notes.append(f"{label} cannot be compared with: {error}")
            return
        name = (str(Path(names[0]).resolve()), key) if len(names) == 1 else ("+".join(names), key)
        theirs, _ = self._predict(name, teacher, data, split)
        row["agreement"] = metrics.agreement(logits, theirs)
        params = cost.num_params(teacher)
        adds = sum(cost.multiply_adds(member, data.image_shape) for member in teacher.members)
        if row["num_params"] >= params:
            measured.notes.append(f"{label} is not larger: {row['num_params']:,} against {params:,} parameters")
        if row["multiply_adds"] >= adds:
            mine = f"{row['multiply_adds'] / 1e9:.3g} against {adds / 1e9:.3g} billion multiply-adds"
            measured.notes.append(f"{label} is not more expensive: {mine}")


_DATA_FIELDS = {f.name for f in dataclasses.fields(DataConfig)}


def _match(classifier: Classifier, data: Data, run: str) -> None:
    if set(classifier.classes) != set(data.classes):
        other = sorted(set(classifier.classes) ^ set(data.classes))[:5]
        raise UserError(f"run {run!r} and the data have different classes ({', '.join(other)}, ...)")
    with torch.no_grad():
        try:
            classifier(torch.zeros(1, *data.image_shape, dtype=torch.uint8, device=classifier.preprocess.scale.device))
        except (RuntimeError, ValueError) as error:
            shape = "x".join(str(n) for n in data.image_shape)
            raise UserError(f"run {run!r} does not take the data's images ({shape}): {str(error)[:150]}") from None


def say_notes(results: list[Measured]) -> None:
    """Print what a reader of the table should know besides."""
    for result in results:
        for note in result.notes:
            say(f"note: {note}")
