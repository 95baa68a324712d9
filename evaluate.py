#!/usr/bin/env python
"""Measure and compare finished runs.

python evaluate.py runs/digits/teacher runs/digits/student runs/digits/kd --report runs/digits/report
"""

import contextlib
import sys
from pathlib import Path

from kd.util.errors import run_script, say


def main(argv: list[str] | None = None) -> int:
    """Measure each run, print a table, write the files that are named; returns the exit status."""
    from kd.run.config import EvaluateConfig  # all imports that take time are in here, where Ctrl-C is one line
    from kd.run.parse import parse

    config = parse(EvaluateConfig, argv, positional="runs")

    from accelerate import Accelerator  # --help needs none of these

    from kd.measure.compare import compare, find_baseline
    from kd.measure.evaluation import Evaluator
    from kd.report import write_report
    from kd.report.tables import all_notes, content, render, to_json, verdicts
    from kd.run.folder import is_run, refuse_runs_file
    from kd.train import zero
    from kd.train.setup import keep_freed_memory, on_cpu, set_threads
    from kd.util.escape import in_terminal
    from kd.util.files import write_atomic

    if config.json:
        refuse_runs_file(Path(config.json), "--json")
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
    if config.report:
        Path(config.report).mkdir(parents=True, exist_ok=True)
    runs = list(dict.fromkeys(config.runs))
    others = [run for run in runs if Path(run).is_dir() and not is_run(run)]
    runs = [run for run in runs if run not in others] or runs  # what is wrong with the only ones is an error
    find_baseline(runs, config.baseline)
    set_threads()
    keep_freed_memory()
    with zero.hidden():  # a forward pass needs no engine
        accelerator = Accelerator(cpu=on_cpu())
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
        for folder in sorted({*others} - {*runs}):
            say(f"note: {folder} is passed over: it holds no run")
        evaluator = Evaluator(config, accelerator)
        for run in runs:  # a mistake is known before the first is measured
            evaluator.open(run)
        results = []
        for i, run in enumerate(runs, 1):
            say(f"measure: {run} ({i} of {len(runs)})")
            results.append(evaluator.measure(run))
    if accelerator.is_main_process:
        groups = compare([result.row for result in results], config.baseline)
        print(in_terminal(render(results, groups, config.format)), flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            for note in all_notes(results, groups):
                say(f"note: {note}")
            if config.json:
                write_atomic(Path(config.json), to_json(content(results, groups)))
                say(f"wrote {config.json}")
            if config.report:
                files = write_report(Path(config.report), results, groups)
                say(f"wrote {config.report}/: {', '.join(file.name for file in files)}")
        if config.format in ("table", "markdown") and verdicts(groups):
            print("", in_terminal("\n".join(verdicts(groups))), sep="\n", flush=True)
    accelerator.end_training()
    return 0


def command() -> None:
    """The console command: `main` on the command line's arguments, an error of the user's in one line."""
    run_script(main, "the runs are as they were, the same command measures them again")


if __name__ == "__main__":
    command()
