#!/usr/bin/env python
"""Measure and compare finished runs.

python evaluate.py runs/digits/teacher runs/digits/student runs/digits/kd --report runs/digits/report
"""

from pathlib import Path

from kd.errors import run_script, say


def main(argv: list[str] | None = None) -> int:
    """Measure each run, print a table, write what is asked for; returns the exit status."""
    from kd.config import EvaluateConfig  # all imports that take time are in here, where Ctrl-C is one line
    from kd.parse import parse

    config = parse(EvaluateConfig, argv, positional="runs")

    from accelerate import Accelerator  # --help needs none of these

    from kd.evaluation import Evaluator, say_notes
    from kd.report import class_table, table, to_json, write_report
    from kd.runs import write_atomic
    from kd.setup import on_cpu, set_threads

    set_threads()
    accelerator = Accelerator(cpu=on_cpu())
    evaluator = Evaluator(config, accelerator)
    results = [evaluator.measure(run) for run in config.runs]

    say("")
    say(table(results))
    if len(results[0].row["per_class"]) <= 20:
        say("")
        say(class_table(results))
    say_notes(results)
    if config.json and accelerator.is_main_process:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.json), to_json(results))
        say(f"wrote {config.json}")
    if config.report and accelerator.is_main_process:
        files = write_report(Path(config.report), results)
        say(f"wrote {config.report}/: {', '.join(file.name for file in files)}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
