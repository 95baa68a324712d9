"""The model card of a run for the Hub, written from its own records: https://huggingface.co/docs/hub/model-cards"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import statistics
import sys
from pathlib import Path

import yaml

from kd.data.views import Views
from kd.losses import LOSSES
from kd.measure.records import objective
from kd.run.config import DataConfig
from kd.run.folder import read_summary
from kd.run.parse import differing_fields, read_yaml
from kd.util.errors import UserError

_SEEDED = ("seed", "teacher", "init_from")  # what may differ between runs whose spread is told


def model_card(runs: list[Path], license: str | None = None) -> str:
    """README.md with the Hub's metadata in front; says nothing of where files lie on this machine.

    Args:
        runs: the exported run, and others that differ from it by the seed only.
        license: of the weights, as the Hub calls it.

    Raises:
        UserError: a run is not finished, damaged, or not of the same config.
    """
    try:
        return _Card(runs, license).text()
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"run {str(runs[0])!r} lacks what a model card is written from ({reason})") from None


class _Card:
    def __init__(self, runs: list[Path], license: str | None):
        run, self.license = runs[0], license
        self.config, self.summaries = read_yaml(run / "config.yaml"), [read_summary(path) for path in runs]
        self.network, self.summary = json.loads((run / "config.json").read_text()), self.summaries[0]
        for other in runs[1:]:
            fields = differing_fields(self.config, read_yaml(other / "config.yaml"))
            names = [name for name in (field.partition(" ")[0] for field in fields) if name not in _SEEDED]
            if names:
                raise UserError(f"run {str(other)!r} is not {str(run)!r} with another seed: {', '.join(names)} differ")
        self.seeds = [summary["seed"] for summary in self.summaries]
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"the runs' seeds are {', '.join(map(str, self.seeds))}; a spread needs each once")
        source = self.config["data"]["source"]
        self.hub_data = source.removeprefix("hub:") if source.startswith("hub:") else None
        self.source = source if self.hub_data else Path(source).name
        self.name = "-".join(run.resolve().parts[-2:])
        self.classes, self.view, self.counts = (
            self.network["classes"],
            self.network["preprocess"],
            self.summary["images"],
        )
        names = self.config.get("teacher") or []
        self.teachers = [_teacher(name) for name in ([names] if isinstance(names, str) else names)]

    def text(self) -> str:
        parts = [
            f"---\n{yaml.safe_dump(self.metadata(), sort_keys=False)}---",
            f"# {self.name}",
            *self.what(),
            "## Use",
            *self.use(),
            "## Results",
            *self.results(),
            "## Training",
            "\n".join(self.training()),
            "## Limits",
            "\n".join(self.limits()),
            "## Licence",
            self.licence(),
        ]
        return "\n\n".join(parts) + "\n"

    def metadata(self) -> dict:
        accuracy = round(self.summary["test_accuracy"] / 100, 4)
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": self.source, "type": self.hub_data or self.source, "split": "test"},
            "metrics": [{"type": "accuracy", "value": accuracy, "name": "test accuracy"}],
        }
        return {
            "license": self.license or "unknown",
            "library_name": "kd",
            "pipeline_tag": "image-classification",
            "tags": ["image-classification", *(["knowledge-distillation"] if self.teachers else [])],
            **({"datasets": [self.hub_data]} if self.hub_data else {}),
            "model-index": [{"name": self.name, "results": [result]}],
        }

    def what(self) -> list[str]:
        shown = self.classes[:20]
        more = f" and {len(self.classes) - len(shown)} more" if len(self.classes) > len(shown) else ""
        kind, arguments, end = self.network["model"], self.network["model_args"], ""
        if kind == "reused_head":
            kind, arguments, end = arguments["student"], arguments["student_args"], " and its teacher's head"
        given = f" ({', '.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else ""
        return [
            f"An image classifier, {'distilled from a teacher' if self.teachers else 'trained on labels'}: "
            f"`{kind}`{given}{end} with {self.summary['num_params']:,} parameters, "
            f"{self.summary['multiply_adds']:,} multiply-adds an image and {self.summary['bytes'] / 1e6:.2f} MB of "
            f"weights.",
            f"Its {len(self.classes)} classes: {', '.join(shown)}{more}.",
        ]

    def use(self) -> list[str]:
        model = self.network["model_args"].get("student", self.network["model"])
        module = model.rpartition(".")[0]
        needs = f" and `{module}`, the module that defines the network," if module else ""
        return [
            f"With the `kd` library{needs} on the Python path:",
            "```python\n"
            "import kd\n"
            "from huggingface_hub import snapshot_download\n\n"
            'network = kd.load(snapshot_download("OWNER/NAME"))  # or the path of this folder\n'
            'network.predict(["photo.jpg"])  # class names and probabilities; images of any size\n'
            "```",
            "The weights are safetensors; nothing is unpickled. Resizing and normalising are inside the network.",
        ]

    def results(self) -> list[str]:
        """A table of this run and, with several seeds, of the mean and the standard deviation."""
        several = len(self.seeds) > 1
        rows = [["", f"this run (seed {self.seeds[0]})", f"mean ± standard deviation of {len(self.seeds)} seeds"]]
        rows.append(["---", "---:", "---:"])
        keys = {"test_accuracy": "test accuracy, %", "test_nll": "test NLL", "val_accuracy": "validation accuracy, %"}
        for key, title in keys.items():
            values, form = [summary[key] for summary in self.summaries], ".4f" if key == "test_nll" else ".2f"
            if None not in values:
                spread = f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}" if several else ""
                rows.append([title, f"{values[0]:{form}}", spread])
        for teacher in self.teachers:
            if "accuracy" in teacher:
                title = f"test accuracy of the teacher {teacher['name']}, %"
                rows.append([title, f"{teacher['accuracy']:.2f}", ""])
        chosen = "of the last epoch" if self.config["select"] == "last" else "that were best on validation images"
        return [
            "\n".join(f"| {' | '.join(row if several else row[:2])} |" for row in rows),
            f"Measured on {self.counts['test']:,} test images with the weights {chosen}; nothing was selected on the "
            f"test images.{' Seeds: ' + ', '.join(map(str, self.seeds)) + '.' if several else ''}",
        ]

    def training(self) -> list[str]:
        config, data, optimizer, view = self.config, self.config["data"], self.config["optimizer"], self.view
        steps = ["stored as {1}x{0}".format(*view["source_size"])] if view["source_size"] else []
        steps += [f"shorter side resized to {view['resize']}"] if view["resize"] else []
        steps += [f"the middle {view['crop']}x{view['crop']}"] if view["crop"] else []
        steps += ["3 channels" if view["channels"] == 3 else "luminance", f"mean {view['mean']}", f"std {view['std']}"]
        known = {field.name for field in dataclasses.fields(DataConfig)}
        views = Views.of(DataConfig(**{name: value for name, value in data.items() if name in known}))
        lines = [
            f"- data: {self.source}; {self.counts['train']:,} training images"
            f"{' (a class-balanced subset)' if data['num_train'] else ''}, {self.counts['val']:,} for validation, "
            f"{self.counts['test']:,} for the test (split seed {data['split_seed']})",
            f"- images: {', '.join(steps)}; views of the training images: {views.words()}",
        ]
        for teacher in self.teachers:
            known = f" (`{teacher['model']}`, {teacher['num_params']:,} parameters)" if "model" in teacher else ""
            lines.append(f"- teacher: {teacher['name']}{known}")
        if first := config["weights"] or config["init_from"]:
            lines.append(
                f"- first weights: {_public(first)}{'; only the head was trained' * config['freeze_backbone']}"
            )
        lines.append(f"- objective: {objective(config['losses'])}")
        lines += [f"  - {words}" for words in dict.fromkeys(map(_in_words, config["losses"])) if words]
        precision = self.summary["mixed_precision"]
        return [
            *lines,
            f"- optimizer: {optimizer['name']}, learning rate {optimizer['lr']:g} ({optimizer['schedule']}), weight "
            f"decay {optimizer['weight_decay']:g}; batches of {data['batch_size']}, {config['epochs']} epochs, "
            f"{self.summary['steps']:,} steps, {self.summary['seconds']:,.0f} seconds",
            f"- hardware: {self.summary['num_processes']} x {self.summary['device']}, precision "
            f"{'float32' if precision == 'no' else precision}",
            f"- versions: {', '.join(f'{name} {number}' for name, number in self.summary['versions'].items())}; "
            f"commit {self.summary['git_commit'] or 'unknown'}",
        ]

    def limits(self) -> list[str]:
        share, count = self.summary["test_accuracy"] / 100, self.counts["test"]
        lines = [
            f"- It names one of its {len(self.classes)} classes for every image, even one that shows none of them.",
            f"- It was tested on images of {self.source} alone; on others expect less.",
            f"- One standard error of the test accuracy, from {count:,} images, is "
            f"{100 * math.sqrt(share * (1 - share) / count):.1f} points.",
        ]
        if len(self.seeds) == 1:
            lines.append("- One run: how much the results vary with the seed was not measured.")
        if self.view["source_size"]:
            height, width = self.view["source_size"]
            lines.append(f"- It learned from images of {width}x{height} pixels; others are brought to that size first.")
        return [*lines, "- Its probabilities were not calibrated; fairness and misuse were not examined."]

    def licence(self) -> str:
        said = f"These weights: {self.license}." if self.license else "No licence was named for these weights."
        teacher = ", the teacher" if self.teachers else ""
        return f"{said} The data ({self.source}){teacher} and pretrained weights may have terms of their own."


def _public(path: str) -> str:
    """A run's name without where it lies on this machine."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


def _teacher(name: str) -> dict:
    """A teacher's name, and what its run folder says where that is still there."""
    try:
        summary = read_summary(Path(name))
        model = json.loads((Path(name) / "config.json").read_text())["model"]
        known = {"model": model, "num_params": summary["num_params"], "accuracy": summary["test_accuracy"]}
    except (UserError, OSError, KeyError, ValueError):
        known = {}
    return {"name": _public(name), **known}


def _name(loss: dict) -> str:
    return loss["class_path"].rpartition(".")[2]


def _in_words(loss: dict) -> str | None:
    """What a built-in loss is in one line, with its paper."""
    kind = LOSSES.get(_name(loss))
    if kind is None or not loss["class_path"].startswith("kd."):
        return None
    paper = " ".join(inspect.getdoc(sys.modules[kind.__module__]).split("\n\n")[0].split())
    return f"{_name(loss)}: {inspect.getdoc(kind).splitlines()[0]}{' ' + paper if 'http' in paper else ''}"
