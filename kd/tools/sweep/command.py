"""Run a sweep's file on this machine with Optuna; any number of these commands may share one sweep.

python -m kd.sweep sweeps/digits_kl.yaml --trials 20
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kd.tools.sweep.space import Sweep
from kd.util.errors import CommandParser, UserError, say

NUM_BEST = 10
MAX_FAILURES = 3  # one after another: then it is the sweep that is wrong, not the values of one trial


def main(argv: list[str] | None = None) -> int:
    """Run trials until there are as many as asked for, and show the best; the exit status."""
    arguments = _arguments(argv)
    sweep = Sweep(arguments.file)
    limit = sweep.run_cap if arguments.trials is None else arguments.trials
    if limit is None and sweep.method != "grid":
        raise UserError(f"how many trials? pass --trials N, or put run_cap into {sweep.file}")
    probe = sweep.config("trial", {parameter.name: parameter.first for parameter in sweep.parameters})

    from kd.tools.sweep.study import Study

    study = Study(sweep, Path(probe.output_dir).parent, arguments.seed)
    failures = []
    while limit != 0 and (trial := study.next_trial(limit)) is not None:  # 0 only shows the table
        failure = _run(sweep, study, trial)
        failures = [*failures, failure] if failure else []
        if len(failures) == MAX_FAILURES:
            raise UserError(f"{MAX_FAILURES} trials failed one after another; the last: {failures[-1]}")
    _conclude(sweep, study)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m kd.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a sweep in W&B's format, such as those of sweeps/")
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="how many there are at the end, of all workers; default the file's run_cap",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    return parser.parse_args(argv)


def _run(sweep: Sweep, study, trial) -> str | None:
    """Run a trial, or what is left of it, and tell the study; why it failed, if it did.

    Raises:
        UserError: somebody else stopped it; it stays unfinished.
    """
    from kd.tools.sweep.study import name_of
    from kd.tools.sweep.trial import TrialProcess, measured

    name, values = name_of(trial.number), {each.name: each.suggest(trial) for each in sweep.parameters}
    say(f"{name}: {_varied(trial.params)}")
    try:
        config = sweep.config(name, values)
    except UserError as error:
        return _fail(study, trial, name, str(error))
    folder, early = Path(config.output_dir), []

    def look(now: dict[int, float]) -> bool:
        epoch = study.report(trial, {each: value for each, value in now.items() if each < config.epochs})
        early.extend([epoch] if epoch is not None else [])
        return bool(early)

    process = TrialProcess(sweep.words(values), folder, name)
    status = process.watch(sweep.metric, look)
    found = measured(folder, sweep.metric)
    if early:
        others = study.others_at(early[0], trial.number)
        say(
            f"{name}: stopped after epoch {early[0]}: {sweep.metric} {found[early[0]]:.4g} is not among the best "
            f"1/{sweep.rungs[1]} of {len(others) + 1} trials there; the best had {others[0]:.4g}"
        )
        study.finish(trial, pruned=True)
        return None
    if status:
        why = process.last_words()
        if why.startswith("stopped by"):
            raise UserError(f"{name} was {why.partition(';')[0]}; the same command goes on with it")
        if "not finite" not in why:
            return _fail(study, trial, name, f"{why} (all it said is in {process.log})")
        say(f"{name}: diverged: {why.removeprefix('error: ')}")
        study.finish(trial, pruned=True)
        return None
    if not found:
        return _fail(study, trial, name, f"no {sweep.metric} in {folder}/metrics.jsonl; set data.val_fraction above 0")
    value = found[_chosen_epoch(config.select, measured(folder, "val/accuracy"))]
    study.finish(trial, value)
    best = study.finished()[0]
    say(f"{name}: {sweep.metric} {value:.4g}; the best so far is {name_of(best.number)} with {best.value:.4g}")
    return None


def _fail(study, trial, name: str, why: str) -> str:
    say(f"{name}: failed: {why}")
    study.finish(trial)
    return f"{name}: {why}"


def _chosen_epoch(select: str, accuracies: dict[int, float]) -> int:
    """The epoch whose weights the run keeps: its last, or the first that was best on validation."""
    return max(accuracies) if select == "last" else max(accuracies, key=accuracies.get)


def _varied(params: dict) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in params.items())


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _conclude(sweep: Sweep, study) -> None:
    """The best trials as a table, and what they are good for."""
    from kd.tools.sweep.study import name_of

    best = study.finished()
    say(f"\n{sweep.file}: {study.counts()}")
    if not best:
        return
    names = list(best[0].params)
    rows = [["trial", sweep.metric, *names]]
    for trial in best[:NUM_BEST]:
        rows.append([name_of(trial.number), f"{trial.value:.4f}", *(_short(trial.params[name]) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    folder, count = study.folder / name_of(best[0].number), len(best)
    say(
        f"The best is {folder}. Chosen as the best of {count} on the validation images it is flattered by them: run "
        f"{sweep.program} --config {folder}/config.yaml with other seeds, and measure those on the test split."
    )
