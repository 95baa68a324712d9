"""Measure finished runs on the same images: accuracy, calibration, agreement with the teacher, cost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kd.data import Data, Split, load_data
from kd.data.corrupt import SEVERITIES, STRENGTHS, CorruptedSplit
from kd.data.identity import changes, identity
from kd.measure import cost, metrics
from kd.measure.compare import experiment
from kd.measure.predict import predict, similarity
from kd.measure.records import config_of
from kd.models import Classifier, load_classifier
from kd.run.config import EvaluateConfig
from kd.run.recorded import recorded_data, weights_of
from kd.teachers.load import load_teachers, named, other_sizes
from kd.util.contents import read_config, read_summary
from kd.util.errors import UserError, say
from kd.util.machine import device_name, versions

BATCH_SIZES = (1, 8, 64)  # whose time is measured


@dataclass
class Measured:
    """A run's numbers, all plain JSON values in `row`, and what they were computed from: logits (N, K), labels (N,),
    the images, and where the run has a teacher its logits (N, K) for the same images."""

    name: str
    row: dict
    logits: Tensor
    labels: Tensor
    view: Split
    settings: dict  # of the data, see `kd.run.config.DataConfig`
    notes: list[str] = field(default_factory=list)
    teacher_logits: Tensor | None = None

    @property
    def confusion(self) -> Tensor:
        """Counts (K, K): row the label, column the prediction."""
        return metrics.confusion_matrix(self.logits, self.labels)


class Evaluator:
    """Measures runs one after another; data and predictions that several share are made once.

    Args:
        config: which split, which images, and so on.
        accelerator: predictions are shared by its processes.
    """

    def __init__(self, config: EvaluateConfig, accelerator):
        self.config, self.accelerator = config, accelerator
        self._data: dict[str, Data] = {}
        self._said: set[str] = set()
        self._identities: dict[str, dict] = {}
        self._logits: dict[tuple, tuple[Tensor, Tensor]] = {}

    def open(self, run: str) -> tuple[Classifier, dict, dict, str, Data, Split]:
        """A run's network, summary, config, and the data it is measured on with its key, and the split.

        Raises:
            UserError: it is missing, unfinished or damaged, or does not fit the data.
        """
        folder = Path(run)
        classifier = load_classifier(folder, self.accelerator.device, self.config.trust_code)
        summary, resolved = read_summary(folder), read_config(folder)
        key, data = self._load(resolved["data"], run, classifier.preprocess.view.source_size)
        _match(classifier, data, run)
        split = getattr(data, self.config.split)
        if split is None:
            raise UserError(f"run {run!r} was trained without a validation split; use --split test")
        other, _ = self._changes(summary, key, data)
        if self.config.split in other:
            raise UserError(
                f"run {run!r}: the {self.config.split} split differs from that of training "
                f"({other[self.config.split]}); put {resolved['data']['source']} back as it was, or give images that "
                f"the run has not seen by --source"
            )
        return classifier, summary, resolved, key, data, split.labelled()

    def measure(self, run: str) -> Measured:
        """All numbers of one run; raises what `open` does."""
        folder, (classifier, summary, resolved, key, data, split) = Path(run), self.open(run)
        view = split
        if self.config.corruption in STRENGTHS:
            view = CorruptedSplit(split.store, split.places, self.config.corruption, self.config.severity)
        name = (str(folder.resolve()), key)
        logits, labels = self._logits_of(classifier, data, view, name)
        row = {
            "run": run,
            "model": classifier.recipe["model"],
            "source": self.config.source or resolved["data"]["source"],
            "split": self.config.split,
            "corruption": getattr(view, "corruption", None),
            "severity": getattr(view, "severity", None),
            **_scores(logits, labels, data.classes),
            **dict.fromkeys(("temperature", "nll_scaled", "calibration_error_scaled")),
            "num_params": cost.num_params(classifier.network),
            "multiply_adds": cost.multiply_adds(classifier, data.image_shape),
            "bytes": (folder / "model.safetensors").stat().st_size,
            **dict.fromkeys(("latency_ms", "speed")),
            "teacher": resolved.get("teacher"),
            **dict.fromkeys(("teacher_top1", "agreement", "agreement_top5", "kl", "cka")),
            **dict.fromkeys(("only_student_right", "only_teacher_right")),
            "seed": summary["seed"],
            "train_seconds": summary["seconds"],
            "device": device_name(self.accelerator.device),
            "versions": versions(),
            "config": resolved,
            "experiment": experiment(resolved, config_of),
        }
        row["images"] = _identity(row, data.classes, view)
        other, words = self._changes(summary, key, data)
        words += [f"the {split} split differs from that of training ({why})" for split, why in other.items()]
        measured = Measured(run, row, logits, labels, view, json.loads(key)[0], [f"{run}: {w}" for w in words])
        if data.val is not None and not self.config.source and "val" not in other:
            _scale(measured, *self._logits_of(classifier, data, data.val))
        if self.config.latency and self.accelerator.is_main_process:
            row["speed"] = [cost.speed(classifier, data.image_shape, size) for size in BATCH_SIZES]
            row["latency_ms"] = row["speed"][0]["p50_ms"]
        if self.config.corruption == "all":
            self._corrupt(row, classifier, data, split)
        if row["teacher"]:
            self._compare(measured, classifier, key, data, view)
        return measured

    def _changes(self, summary: dict, key: str, data: Data) -> tuple[dict[str, str], list[str]]:
        """How the data differ from what the run was trained on, as `kd.data.identity.changes` gives it."""
        if self.config.source:
            return {}, []
        if not (before := (summary.get("inputs") or {}).get("data")):
            return {}, ["it was trained by an earlier version and does not say on which data; it is not compared"]
        if key not in self._identities:
            self._identities[key] = identity(data)
        return changes(before, self._identities[key])

    def _corrupt(self, row: dict, classifier: Classifier, data: Data, split: Split) -> None:
        """Add the accuracy for each corruption and severity, and the mean of all."""
        row["corruptions"] = {corruption: [] for corruption in STRENGTHS}
        for corruption, severity in itertools.product(STRENGTHS, SEVERITIES):
            view = CorruptedSplit(split.store, split.places, corruption, severity)
            row["corruptions"][corruption].append(metrics.accuracy(*self._logits_of(classifier, data, view)))
        row["corruption_mean"] = statistics.fmean(itertools.chain(*row["corruptions"].values()))

    def _load(self, settings: dict, run: str, size: tuple[int, int] | None) -> tuple[str, Data]:
        """A run's data; other images are brought to the size (H, W) of its training images, as `predict` does."""
        ours = {"cache_dir": self.config.cache_dir, "download_dir": self.config.download_dir}
        if self.config.source:  # the run's subset and validation are not those of other images
            ours |= {"source": self.config.source, "num_train": None, "num_labels": None}
            if self.config.split == "test":
                ours["val_fraction"] = 0.0
        config, size = recorded_data(settings, run, **ours), size if self.config.source else None
        key = json.dumps([dataclasses.asdict(config), size], sort_keys=True)
        if key not in self._data:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                self._data[key] = load_data(config, size=size)
            for line in said.getvalue().splitlines():  # runs whose settings differ have the same images
                if line not in self._said:
                    say(line)
                self._said.add(line)
        return key, self._data[key]

    def _logits_of(self, network, data: Data, split: Split, name: tuple | None = None) -> tuple[Tensor, Tensor]:
        """Logits (N, K) in the order of the data's classes, and labels (N,); computed once for each name."""
        if name in self._logits:
            return self._logits[name]
        logits, labels = predict(network, split, self.config.batch_size, self.accelerator, "measure")
        if isinstance(network, Classifier):
            logits = logits[:, [network.classes.index(label) for label in data.classes]]
        if name is not None:
            self._logits[name] = logits, labels
        return logits, labels

    def _compare(self, measured: Measured, classifier: Classifier, key: str, data: Data, view: Split) -> None:
        """Add how like its teacher a run is, and say where it saves nothing."""
        row, logits, labels = measured.row, measured.logits, measured.labels
        names, mean = list(named(row["teacher"]).values()), row["config"]["teacher_mean"]
        label = f"{measured.name}: its teacher {' + '.join(names)}"
        try:
            teacher = load_teachers(names, data.classes, mean, self.accelerator.device, self.config.trust_code)
            sizes = other_sizes(teacher, data.image_shape)
        except UserError as error:
            measured.notes.append(f"{label} cannot be compared with: {error}")
            return
        taught = (read_summary(Path(measured.name)).get("inputs") or {}).get("weights", {})
        known = weights_of({"teacher": row["teacher"]})
        if replaced := [name for name, digest in known.items() if taught.get(name, digest) != digest]:
            measured.notes.append(f"{label} cannot be compared with: {', '.join(replaced)} has other weights by now")
            return
        measured.notes += [f"{measured.name}: its teacher {line}" for line in sizes]
        name = (str(Path(names[0]).resolve()), key) if len(names) == 1 else (f"{'+'.join(names)} {mean}", key)
        theirs, _ = self._logits_of(teacher, data, view, name)
        measured.teacher_logits = theirs
        row["teacher_top1"] = metrics.accuracy(theirs, labels)
        row["agreement"] = metrics.agreement(logits, theirs)
        row["agreement_top5"] = metrics.agreement(logits, theirs, top=5)
        row["kl"] = metrics.kl_divergence(theirs, logits)
        row["only_student_right"], row["only_teacher_right"] = metrics.only_one_right(logits, theirs, labels)
        member, *others = teacher.members.values()
        pairs = _tap_pairs(row["config"].get("losses") or [], self.config.taps)
        if pairs and others:
            measured.notes.append(f"{label} is several: features are compared with one teacher only")
        elif pairs:
            try:
                values = similarity(classifier, member, pairs, view, self.config.batch_size, self.accelerator)
            except TypeError as error:  # the module gives no tensor
                raise UserError(f"run {measured.name!r}: {error}; choose other taps") from None
            taps = zip(pairs, values, strict=True)
            row["cka"] = [{"student": mine, "teacher": other, "cka": value} for (mine, other), value in taps]
        params = cost.num_params(teacher)
        adds = sum(cost.multiply_adds(member, data.image_shape) for member in teacher.members.values())
        if row["num_params"] >= params:
            measured.notes.append(f"{label} is not larger: {row['num_params']:,} against {params:,} parameters")
        if row["multiply_adds"] >= adds:
            mine = f"{row['multiply_adds'] / 1e9:.3g} against {adds / 1e9:.3g} billion multiply-adds"
            measured.notes.append(f"{label} is not more expensive: {mine}")


def _scores(logits: Tensor, labels: Tensor, classes: list[str]) -> dict:
    return {
        "num_images": len(labels),
        "top1": metrics.accuracy(logits, labels),
        "top5": metrics.accuracy(logits, labels, top=5),
        "nll": metrics.negative_log_likelihood(logits, labels),
        "brier": metrics.brier_score(logits, labels),
        "calibration_error": metrics.calibration_error(logits, labels),
        "reliability": metrics.reliability(logits, labels),
        "per_class": dict(zip(classes, metrics.per_class_accuracy(logits, labels), strict=True)),
        "wrong": (~metrics.hits(logits, labels)).nonzero()[:, 0].tolist(),
    }


def _scale(measured: Measured, logits: Tensor, labels: Tensor) -> None:
    """Add the temperature that is best for validation's logits, and how calibrated the measured ones are with it."""
    row, temperature = measured.row, metrics.fit_temperature(logits, labels)
    if temperature is None:
        right = metrics.accuracy(logits, labels)
        measured.notes.append(f"{measured.name}: no temperature is best on validation, of which {right:.1f} % is right")
        return
    scaled = measured.logits.double() / temperature
    row["temperature"] = temperature
    row["nll_scaled"] = metrics.negative_log_likelihood(scaled, measured.labels)
    row["calibration_error_scaled"] = metrics.calibration_error(scaled, measured.labels)


def _identity(row: dict, classes: list[str], view: Split) -> str:
    """The same for runs that are measured on the same images in the same order."""
    source = str(Path(row["source"]).resolve()) if Path(row["source"]).exists() else row["source"]
    parts = [source, row["split"], classes, row["corruption"], row["severity"]]
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(view.places.tobytes() + view.labels.tobytes())
    return digest.hexdigest()[:16]


def _tap_pairs(losses: list[dict], more: list[str]) -> list[tuple[str, str]]:
    """The pairs (student's module, teacher's module) that the losses compare, and those of `taps`."""
    pairs = [tuple(pair.split(":")) for pair in more]
    for arguments in (loss.get("init_args") or {} for loss in losses):
        one, other = arguments.get("student_tap"), arguments.get("teacher_tap")
        pairs += [(one, other)] if one and other else []
        pairs += zip(arguments.get("student_taps") or [], arguments.get("teacher_taps") or [], strict=False)
    return list(dict.fromkeys(pairs))


def _match(classifier: Classifier, data: Data, run: str) -> None:
    if other := sorted(set(classifier.classes) ^ set(data.classes))[:5]:
        raise UserError(f"run {run!r} and the data have different classes ({', '.join(other)}, ...)")
    with torch.no_grad():
        try:
            classifier(torch.zeros(1, *data.image_shape, dtype=torch.uint8, device=classifier.preprocess.scale.device))
        except (RuntimeError, ValueError) as error:
            shape = "x".join(str(n) for n in data.image_shape)
            raise UserError(f"run {run!r} does not take the data's images ({shape}): {str(error)[:150]}") from None
