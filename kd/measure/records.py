"""What run folders hold, for a notebook: `kd.runs("runs/")`."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from kd.measure.compare import experiment
from kd.util.contents import read_config, read_rows, read_summary
from kd.util.errors import UserError, say

_CONFIG = ("seed", "teacher", "epochs", "max_steps", "select", "freeze_backbone", "init_from", "mixed_precision")
_DATA = ("source", "num_train", "batch_size", "resize")
_SUMMARY = ("val_accuracy", "test_accuracy", "test_nll", "num_params", "multiply_adds", "bytes", "steps", "seconds")


class Record:
    """One run folder, finished or not.

    Attributes:
        name: the folder as it was named.
        config: the resolved config.
        summary: the results, None while the run is not finished.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.name, self.folder = str(folder), Path(folder)
        self.config = read_config(self.folder)
        self.summary = read_summary(self.folder) if (self.folder / "summary.json").is_file() else None

    @functools.cached_property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; one that a running job has not written whole is left out."""
        file = self.folder / "metrics.jsonl"
        content = file.read_bytes() if file.is_file() else b""
        rows, bad = read_rows(content)
        if bad and bad != [len(content.splitlines())]:
            raise UserError(f"run {self.name!r} is damaged: line {bad[0]} of metrics.jsonl")
        return rows

    @property
    def epochs(self) -> list[dict]:
        """The lines that end an epoch: `epoch`, `epoch/loss` and its terms, `val/accuracy` where there is one."""
        return [row for row in self.metrics if "epoch/loss" in row]

    @property
    def network(self) -> str:
        """The name of the network that learned."""
        return self.config.get("student") or self.config.get("model")

    @property
    def objective(self) -> str:
        """The losses in words."""
        return objective(self.config.get("losses") or [])

    @functools.cached_property
    def experiment(self) -> str:
        """The same for runs that differ only in their seed, see `kd.measure.compare.experiment`."""
        return experiment(self.config, config_of)

    @property
    def row(self) -> dict | None:
        """Accuracy and cost as `evaluate.py` gives them, of the run's own test split; None while it is not finished."""
        if self.summary is None:
            return None
        names = {"run": self.name, "source": self.config["data"]["source"], "split": "test", "images": None}
        known = {key: self.summary[key] for key in ("num_params", "multiply_adds", "seed")}
        counts = {"num_images": self.summary["images"]["test"], "top1": self.summary["test_accuracy"]}
        return {**names, **known, **counts, "teacher": self.config.get("teacher"), "experiment": self.experiment}

    def __repr__(self) -> str:
        done = f"test accuracy {self.summary['test_accuracy']:.2f} %" if self.summary else "not finished"
        return f"<run {self.name}: {self.network}, {done}>"


class Runs(list):
    """Records, in the order of their names."""

    def frame(self):
        """A pandas DataFrame, one row a run: what it was, its last and best validation, its results.

        Accuracies are in percent. What an unfinished run does not have yet is missing.
        """
        import pandas

        return pandas.DataFrame([_highlights(record) for record in self])

    def curves(self):
        """A long pandas DataFrame: `run`, `seed`, `step`, `epoch`, `metric`, `value`, one row a logged number."""
        import pandas

        place = ("step", "epoch")
        rows = [
            {"run": r.name, "seed": r.config.get("seed"), **{k: row.get(k) for k in place}, "metric": key, "value": v}
            for r in self
            for row in r.metrics
            for key, v in row.items()
            if key not in place
        ]
        return pandas.DataFrame(rows, columns=["run", "seed", *place, "metric", "value"])


def find_runs(folder: str | os.PathLike) -> Runs:
    """All runs in a folder and below it; a damaged one is named and left out.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no such folder: {str(folder)!r}; name one that holds run folders, such as runs/")
    found = Runs()
    for place, folders, files in os.walk(folder):
        folders.sort()
        if "config.yaml" in files:
            # a tracker keeps a config.yaml of its own inside a run; another network of the run has a config.json too
            folders[:] = [name for name in folders if (Path(place) / name / "config.json").is_file()]
            try:
                found.append(Record(os.path.normpath(place)))
            except UserError as error:
                say(f"left out: {error}")
    return found


def read_results(path: str | os.PathLike) -> dict:
    """What `evaluate.py` wrote: `runs` and `groups`, as `kd.plots` takes them.

    Args:
        path: the folder of `--report`, or the file of `--json`.

    Raises:
        UserError: it is not there, or holds something else.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}; evaluate.py --report FOLDER writes it") from None
    if not isinstance(content, dict) or not {"runs", "groups"} <= content.keys():
        raise UserError(f"{str(file)!r} holds no results; evaluate.py --report FOLDER or --json FILE writes them")
    return content


def objective(losses: list[dict]) -> str:
    """A config's losses in words."""
    terms = []
    for loss in losses:
        arguments = dict(loss.get("init_args") or {})
        weight, name = arguments.pop("weight", 1), loss["class_path"].rpartition(".")[2]
        terms.append(f"{weight:g} * {name}({', '.join(f'{key}={value}' for key, value in arguments.items())})")
    return " + ".join(terms)


def config_of(run: str) -> dict | None:
    """A run folder's resolved config, None where there is none."""
    try:
        return read_config(Path(run))
    except UserError:
        return None


def _highlights(record: Record) -> dict:
    config, summary = record.config, record.summary or {}
    optimizer = config.get("optimizer") or {}
    row = {"run": record.name, "finished": record.summary is not None, "network": record.network}
    row |= {key: config.get(key) for key in _CONFIG} | {key: config["data"].get(key) for key in _DATA}
    row |= {"optimizer": optimizer.get("name"), "lr": optimizer.get("lr"), "objective": record.objective}
    measured = [epoch for epoch in record.epochs if epoch.get("val/accuracy") is not None]
    best = max(measured, key=lambda epoch: epoch["val/accuracy"], default={})
    row["epochs_done"] = record.epochs[-1]["epoch"] if record.epochs else 0
    row["last_val_accuracy"] = measured[-1]["val/accuracy"] if measured else None
    row |= {"best_val_accuracy": best.get("val/accuracy"), "best_epoch": best.get("epoch")}
    return row | {key: summary.get(key) for key in _SUMMARY} | {"device": summary.get("device")}
