"""Compare measured runs: seeds as one group, paired tests on the same images, gains, the Pareto front.

Functions of plain rows, those that `evaluate.py --format json` gives as `runs`, so that they take saved ones too. The
differences are in percentage points of top-1 accuracy.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kd import keyed
from kd.run.config import FREE_FIELDS
from kd.run.parse import differing_fields
from kd.util.errors import unknown

AVERAGED = ("top1", "top5", "nll", "brier", "calibration_error", "agreement", "kl", "corruption_mean")
REPLICATES = 2000
_AT_ONCE = 2**22  # draws that are kept at a time


def experiment(config: dict, read: Callable[[str], dict | None], seen: tuple[str, ...] = ()) -> str:
    """A name for what a run does, the same for runs that differ in nothing but their seed and the folders they write.

    Args:
        config: a run's resolved config.
        read: from a run folder to its resolved config, None where there is none: a teacher and first weights count by
            what they are, so that students of teachers that differ only in their seed are one experiment.
    """
    content = {name: value for name, value in config.items() if name not in (*FREE_FIELDS, "seed")}
    if isinstance(content.get("data"), dict):
        content["data"] = {name: v for name, v in content["data"].items() if f"data.{name}" not in FREE_FIELDS}
    for field in ("teacher", "init_from"):
        folders = content.get(field) or []
        folders = [folders] if isinstance(folders, str) else folders
        known = [(folder, None if folder in seen else read(folder)) for folder in folders]
        content[field] = [experiment(c, read, (*seen, folder)) if c else folder for folder, c in known]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def spread(values: Iterable[float | None]) -> dict | None:
    """Mean and standard deviation (n - 1 in its denominator; None for one value); None if a value is missing."""
    values = list(values)
    if not values or None in values:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's test (1947, https://doi.org/10.1007/BF02295996) of two networks on the same images, exact.

    Args:
        only_one, only_other: how many images only the one, and only the other, gets right.

    Returns:
        The two-sided p of as uneven a share of these images if either network were as likely to have each.
    """
    from scipy.stats import binomtest  # a second to import, which a notebook's `kd.runs` need not wait for

    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def bootstrap(correct: Tensor, replicates: int = REPLICATES) -> Tensor:
    """Accuracies in percent (replicates, S) of S runs on images drawn with replacement, the same ones for all runs.

    Args:
        correct: bool (S, N), whether each run gets each image right.

    The draws are a function of (replicate, N): the same call gives the same numbers.
    """
    num_images = correct.shape[1]
    at_once, parts, base = max(1, _AT_ONCE // num_images), [], keyed.key(0, keyed.Purpose.BOOTSTRAP_IMAGES)
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        draws = keyed.keys(base, torch.arange(start * num_images, (start + size) * num_images))
        place = (keyed.uniform(draws).double() * num_images).long().view(size, num_images)
        place += num_images * torch.arange(size)[:, None]
        counts = torch.bincount(place.flatten(), minlength=size * num_images).view(size, num_images)
        parts.append(counts.double() @ correct.double().T)
    return 100 * torch.cat(parts) / num_images


def group_mean(samples: Tensor, salt: int) -> Tensor:
    """Bootstrapped mean (replicates,) of a group's runs (replicates, S): runs are drawn with replacement as well.

    Their distance from the mean is enlarged by sqrt(S / (S - 1)), without which so few draws are too close to it (Rao
    and Wu 1988). `salt` makes one group's draws independent of another's.
    """
    replicates, num_runs = samples.shape
    centre = samples.mean(1)
    if num_runs == 1:
        return centre
    base = keyed.key(0, keyed.Purpose.BOOTSTRAP_RUNS, salt)
    draws = keyed.uniform(keyed.keys(base, torch.arange(replicates * num_runs)))
    chosen = (draws.double() * num_runs).long().view(replicates, num_runs)
    return centre + math.sqrt(num_runs / (num_runs - 1)) * (samples.gather(1, chosen).mean(1) - centre)


def pareto(points: list[tuple[float, float]]) -> list[bool]:
    """Which of the points (accuracy, cost) no other beats in one without losing in the other."""
    return [
        not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
        for accuracy, cost in points
    ]


def find_baseline(runs: list[str], baseline: str | None) -> str | None:
    """The run that is the baseline, however its path is written.

    Raises:
        UserError: it is not among the runs.
    """
    found = [run for run in runs if baseline is not None and os.path.realpath(run) == os.path.realpath(baseline)]
    if baseline is not None and not found:
        raise unknown("baseline", baseline, runs, "it must be one of the runs")
    return found[0] if found else None


def compare(rows: list[dict], baseline: str | None = None) -> list[dict]:
    """Groups of runs that differ only in their seed, and how each compares with a baseline.

    Args:
        rows: as `kd.measure.evaluation` measures them, each run once.
        baseline: one of the runs, whose group the others are compared with; by default a distilled group is compared
            with its student alone: the group of the same network without a teacher, where there is exactly one.

    Returns:
        For each group, in the order of its first run, plain values:
        `name`, `runs`, `n`, `seeds`; `spread` of each metric of `AVERAGED`; `num_params`, `multiply_adds`;
        `baseline` (a group's name), `difference`, `interval` (95 %, paired bootstrap over images and over runs) and
        `mcnemar` (a test for each pair of runs, those of equal seeds where there are such), None without one;
        `alone`, `gain` over it and `gap_closed`, the percent of the teacher's lead over it that the student has, None
        where the gain's interval holds 0;
        `front`: whether it is on the Pareto front of top-1 against `multiply_adds`, and against `num_params`; `notes`.

    Raises:
        UserError: the baseline is not among the runs.
    """
    found = by_experiment(rows)
    members = dict(zip(group_names(found), found, strict=True))
    run = find_baseline([row["run"] for row in rows], baseline)
    chosen = next((name for name, group in members.items() if any(row["run"] == run for row in group)), None)

    @functools.cache
    def samples(name: str) -> Tensor:
        return group_mean(bootstrap(_correct(members[name])), list(members).index(name))

    def interval(name: str, other: str) -> list[float]:
        ends = torch.tensor([0.025, 0.975], dtype=torch.double)
        return torch.quantile(samples(name) - samples(other), ends).tolist()

    groups = {name: _describe(name, group) for name, group in members.items()}
    for name, group in groups.items():
        mine, candidates = members[name], [other for other in members if _is_alone(members[other][0], members[name][0])]
        alone = group["alone"] = candidates[0] if len(candidates) == 1 else None
        other = group["baseline"] = alone if chosen is None else chosen if chosen != name else None
        group.update(dict.fromkeys(("gain", "gap_closed", "difference", "interval", "mcnemar")))
        if alone:
            group.update(_gain(group, groups[alone], interval(name, alone), mine))
        if other:
            theirs = members[other]
            group["notes"] += _unlike(name, mine[0], other, theirs[0])
            group["difference"] = _top1(group) - _top1(groups[other])
            if mine[0]["images"] == theirs[0]["images"]:
                group["interval"] = interval(name, other)
                group["mcnemar"] = _tests(mine, theirs)
        if other is None and chosen is None and "teacher" in mine[0]["config"] and len(groups) > 1:
            which = f"is one of {', '.join(candidates)}" if candidates else "is not among the runs"
            group["notes"].append(f"{name}: its student alone {which}; --baseline names what to compare with")
        rivals = [rival for rival in groups if members[rival][0]["images"] == mine[0]["images"]]
        group["front"] = {
            cost: pareto([(_top1(groups[rival]), groups[rival][cost]) for rival in rivals])[rivals.index(name)]
            for cost in ("multiply_adds", "num_params")
        }
    return list(groups.values())


def _top1(group: dict) -> float:
    return group["spread"]["top1"]["mean"]


def _gain(group: dict, alone: dict, interval: list[float], rows: list[dict]) -> dict:
    """What a group gains over its student alone, and the percent of the teacher's lead that this is."""
    gain, teacher = _top1(group) - _top1(alone), spread(row["teacher_top1"] for row in rows)
    lead = teacher["mean"] - _top1(alone) if teacher else 0
    shown = not interval[0] <= 0 <= interval[1]
    return {"gain": gain, "gap_closed": 100 * gain / lead if lead > 0 and shown else None}


def by_experiment(rows: list[dict]) -> list[list[dict]]:
    """Rows of one experiment on the same images, the groups in the order of their first rows."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["experiment"], row["images"]), []).append(row)
    return list(found.values())


def group_names(groups: list[list[dict]]) -> list[str]:
    """A name for each group: its run's, or what its runs' names share, if that is its alone."""
    names = []
    for group in groups:
        runs = [row["run"] for row in group]
        start = _shared(runs)
        end = _shared([run[len(start) :][::-1] for run in runs])[::-1]
        names.append(runs[0] if len(runs) == 1 else f"{start}*{end}")
    return [
        name if names.count(name) == 1 else f"{group[0]['run']} and {len(group) - 1} more"
        for name, group in zip(names, groups, strict=True)
    ]


def _shared(names: list[str]) -> str:
    """The first letters that all names have."""
    letters = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False))
    return "".join(each[0] for each in letters)


def _describe(name: str, rows: list[dict]) -> dict:
    notes, seeds = [], [json.dumps([row["seed"], row["config"].get("teacher")]) for row in rows]
    if len(set(seeds)) < len(rows):
        notes.append(f"{name}: its runs of equal seed are not independent; their spread means nothing")
    return {
        "name": name,
        "runs": [row["run"] for row in rows],
        "n": len(rows),
        "seeds": [row["seed"] for row in rows],
        "spread": {key: spread(row.get(key) for row in rows) for key in AVERAGED},
        "num_params": rows[0]["num_params"],
        "multiply_adds": rows[0]["multiply_adds"],
        "notes": notes,
    }


def _is_alone(row: dict, student: dict) -> bool:
    """Whether a run is the student alone of a distilled one: the same network without a teacher, on the same images."""
    if "teacher" in row["config"] or "teacher" not in student["config"] or row["images"] != student["images"]:
        return False
    trained, distilled = row["config"], student["config"]
    same = trained.get("model") == distilled.get("student")
    return same and (trained.get("model_args") or {}) == (distilled.get("model_args") or {})


def _unlike(name: str, mine: dict, other: str, theirs: dict) -> list[str]:
    """Notes on what makes a comparison unfair or impossible."""
    notes = []
    if mine["images"] != theirs["images"]:
        notes.append(f"{name} and {other} were measured on different images: no test and no interval")
    fields = ("data", "optimizer", "epochs", "max_steps", "weights", "init_from", "freeze_backbone", "select")
    configs = [{field: row["config"].get(field) for field in fields} for row in (theirs, mine)]
    if differing := differing_fields(*configs):
        notes.append(f"{name} (here) and {other} (there) differ in {'; '.join(differing)}")
    return notes


def _correct(rows: list[dict]) -> Tensor:
    correct = torch.ones(len(rows), rows[0]["num_images"], dtype=torch.bool)
    for i, row in enumerate(rows):
        correct[i, row["wrong"]] = False
    return correct


def _tests(mine: list[dict], theirs: list[dict]) -> list[dict]:
    """A test for each pair of runs, those of equal seeds where there are such."""
    every = [(a, b) for a in mine for b in theirs]
    tests = []
    for run, baseline in [(a, b) for a, b in every if a["seed"] == b["seed"]] or every:
        wrong, other = set(run["wrong"]), set(baseline["wrong"])
        counts = {"only_run_right": len(other - wrong), "only_baseline_right": len(wrong - other)}
        tests.append({"run": run["run"], "baseline": baseline["run"], **counts, "p": mcnemar(*counts.values())})
    return tests
