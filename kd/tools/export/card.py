"""The model card of a run for the Hub, written from its own records: https://huggingface.co/docs/hub/model-cards"""

from __future__ import annotations

import hashlib
import inspect
import math
import statistics
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import kd
from kd.data.views import Views
from kd.losses import LOSSES, paper
from kd.measure.records import objective
from kd.run.parse import differing_fields
from kd.run.recorded import recorded_data
from kd.util.contents import read_config, read_network, read_summary
from kd.util.errors import UserError
from kd.util.escape import in_markdown as escaped
from kd.util.machine import install_command

_TEMPLATE = Path(__file__).parent / "templates" / "card.md"
_SEEDED = ("seed", "teacher", "init_from")  # what may differ between runs whose spread is shown
# For each title in the table of results a key of summary.json, and a format.
_MEASURED = {
    "test accuracy, %": ("test_accuracy", ".2f"),
    "test NLL": ("test_nll", ".4f"),
    "validation accuracy, %": ("val_accuracy", ".2f"),
}


def model_card(runs: list[Path], license: str | None = None) -> str:
    """README.md of the first run, with the Hub's metadata in front and the spread over all, which differ by the seed
    only; names no place of this machine."""
    try:
        config, summaries = read_config(runs[0]), [read_summary(run) for run in runs]
        _check_seeds(runs, config, summaries)
        values = _values(runs[0], config, summaries)
        data = _metadata(_name(runs[0]), config, summaries[0], license)
        return str(ModelCard.from_template(data, template_path=str(_TEMPLATE), licence=license, **values))
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"run {str(runs[0])!r} lacks what a model card is written from ({reason})") from None


def _check_seeds(runs: list[Path], config: dict, summaries: list[dict]) -> None:
    for other in runs[1:]:
        fields = differing_fields(config, read_config(other))
        names = [name for name in (field.partition(" ")[0] for field in fields) if name not in _SEEDED]
        if names:
            raise UserError(f"run {str(other)!r} is not {str(runs[0])!r} with another seed: {', '.join(names)} differ")
    seeds = [summary["seed"] for summary in summaries]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs' seeds are {', '.join(map(str, seeds))}; a spread needs each once")


def _metadata(name: str, config: dict, summary: dict, license: str | None) -> ModelCardData:
    source = config["data"]["source"]
    hub, accuracy = source.partition("hub:")[2] or None, round(summary["test_accuracy"] / 100, 4)
    place, task = hub or Path(source).name, "image-classification"
    measured = EvalResult(task, place, place, "accuracy", accuracy, dataset_split="test", metric_name="test accuracy")
    return ModelCardData(
        license=license or "unknown",
        library_name="kd",
        pipeline_tag=task,
        tags=[task, *(["knowledge-distillation"] if config.get("teacher") else [])],
        datasets=[hub] if hub else None,
        model_name=name,
        eval_results=[measured],
    )


def _values(run: Path, config: dict, summaries: list[dict]) -> dict:
    """What the template shows."""
    saved, data, teachers = read_network(run), config["data"], config.get("teacher") or []
    losses = config.get("losses") or []  # none where `kd.tools.adopt` took weights as they were
    kind, arguments = saved["model"], saved["model_args"]
    if reused := kind == "reused_head":
        kind, arguments = arguments["student"], arguments["student_args"]
    given = escaped(", ".join(f"{key}={value}" for key, value in arguments.items()))
    share, count = summaries[0]["test_accuracy"] / 100, summaries[0]["images"]["test"]
    first, results = config["weights"] or config.get("init_from"), []
    for title, (key, form) in _MEASURED.items():
        values = [summary[key] for summary in summaries]
        if None not in values:
            spread = f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}" if values[1:] else ""
            results.append((title, f"{values[0]:{form}}", spread))
    return {
        "title": escaped(_name(run)),
        "network": f"`{kind}`" + (f" ({given})" if given else ""),
        "reused": reused,
        "module": _module(kind),
        "library": f"version {kd.__version__}: {install_command()}",
        "classes": [escaped(name) for name in saved["classes"]],
        "source": escaped(data["source"] if data["source"].startswith("hub:") else Path(data["source"]).name),
        "teachers": [_teacher(name) for name in ([teachers] if isinstance(teachers, str) else teachers)],
        "results": results,
        "seeds": [summary["seed"] for summary in summaries],
        "view": saved["preprocess"],
        "views": Views.of(recorded_data(data, str(run))).words(),
        "first_weights": _public(first) if first else None,
        "adopted": "losses" not in config,
        "objective": escaped(objective(losses)),
        "losses": [words for words in dict.fromkeys(map(_in_words, losses)) if words],
        "standard_error": 100 * math.sqrt(share * (1 - share) / count),
        "versions": escaped(", ".join(f"{name} {number}" for name, number in summaries[0]["versions"].items())),
        "summary": _all_escaped(summaries[0]),
        "config": _all_escaped(config),
    }


def _name(run: Path) -> str:
    return "-".join(run.resolve().parts[-2:])


def _module(kind: str) -> str:
    """A sentence on the module of a network by import path, with the hash of the file that was used; else nothing."""
    name = kind.rpartition(".")[0]
    if not name or ":" in kind:
        return ""
    file = getattr(sys.modules.get(name), "__file__", None)
    which = f" (`{Path(file).name}`, sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()})" if file else ""
    return f" The module `{name}`{which}, which defines the network, is needed too and is not in this folder."


def _public(path: str) -> str:
    """A run's name without where it lies on this machine."""
    return escaped("/".join(part for part in Path(path).parts[-2:] if part != "/"))


def _all_escaped(value):
    """A file's values with all texts among them escaped."""
    if isinstance(value, dict):
        return {key: _all_escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_all_escaped(inner) for inner in value]
    return escaped(value) if isinstance(value, str) else value


def _teacher(name: str) -> dict:
    """A teacher's name, and what its run folder holds where that is still there."""
    try:
        summary = read_summary(Path(name))
        model = escaped(read_network(Path(name))["model"])
        known = {"model": model, "num_params": summary["num_params"], "accuracy": summary["test_accuracy"]}
    except (UserError, OSError, KeyError, ValueError):
        known = {}
    return {"name": _public(name), **known}


def _in_words(loss: dict) -> str | None:
    """What a built-in loss is in one line, with its paper; None for one of the user's own."""
    name = loss["class_path"].rpartition(".")[2]
    if not loss["class_path"].startswith("kd.") or name not in LOSSES:
        return None
    return f"{name}: {inspect.getdoc(LOSSES[name]).splitlines()[0]} {paper(LOSSES[name])}".strip()
