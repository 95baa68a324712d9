"""Make a W&B workspace that compares the runs of a group: curves, loss terms, calibration, cost, what differs.

python -m kd.workspace runs/digits --entity TEAM
python -m kd.workspace runs/digits --entity TEAM --print     shows it, and sends nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from kd.measure.records import find_runs
from kd.track import has_key
from kd.util.errors import CommandParser, UserError, say

NOT_TERMS = ("epoch/loss", "epoch/images_per_second")


@dataclass
class Group:
    """What is compared.

    names: the groups, as the tracker calls them.
    terms: the loss terms of their runs, `epoch/NAME`; empty where they are not known.
    """

    names: list[str]
    project: str
    terms: list[str]


def find_group(group: str, project: str | None) -> Group:
    """A group by its name, or that of the runs in a folder and below it.

    Raises:
        UserError: the folder holds no runs, or runs of several projects.
    """
    if not Path(group).is_dir():
        if os.sep in group:
            raise UserError(f"no such folder: {group!r}; name a folder of runs, or a group as W&B shows it")
        return Group([group], project or "kd", [])
    runs = find_runs(group)
    if not runs:
        raise UserError(f"{group!r} holds no runs")
    projects = sorted({run.config["project"] for run in runs})
    if project is None and len(projects) > 1:
        raise UserError(f"the runs of {group!r} are of several projects: {', '.join(projects)}; choose by --project")
    names = {run.config.get("group") or run.folder.resolve().parent.name for run in runs}
    keys = {key for run in runs for row in run.epochs for key in row if key.startswith("epoch/")}
    return Group(sorted(names), project or projects[0], sorted(keys - set(NOT_TERMS)))


def _sections(panels, names: list[str]) -> dict[str, list]:
    """The panels of each section; `panels` is the package's module, `names` are those of the loss terms."""
    summary = panels.SummaryMetric
    over = {"x": "epoch", "max_runs_to_show": 100}
    terms = [panels.LinePlot(title=term, y=[term], log_y=True, **over) for term in names]
    terms = terms or [panels.LinePlot(title="loss terms", metric_regex="epoch/[A-Z].*", log_y=True, **over)]

    def against_cost(cost: str, title: str):
        return panels.ScatterPlot(title=title, x=summary(cost), y=summary("test_accuracy"), log_x=True)

    return {
        "Accuracy": [
            panels.LinePlot(title="validation accuracy, %", y=["val/accuracy"], **over),
            panels.LinePlot(title="validation accuracy, %, by images seen", x="images_seen", y=["val/accuracy"]),
            panels.BarPlot(title="test accuracy, %", metrics=["test_accuracy"], max_runs_to_show=100),
        ],
        "Loss terms": [
            panels.LinePlot(title="objective", y=["epoch/loss"], log_y=True, **over),
            *terms,
            panels.LinePlot(title="learning rate", y=["lr"]),
            panels.LinePlot(title="gradient norm", y=["gradient_norm"], log_y=True),
        ],
        "Calibration": [
            panels.LinePlot(title="validation NLL", y=["val/nll"], **over),
            panels.BarPlot(title="test NLL", metrics=["test_nll"], max_runs_to_show=100),
            panels.ScatterPlot(
                title="test ECE against accuracy, both %", x=summary("test_accuracy"), y=summary("test_ece")
            ),
        ],
        "Cost against accuracy": [
            against_cost("multiply_adds", "test accuracy, %, against multiply-adds"),
            against_cost("num_params", "test accuracy, %, against parameters"),
            against_cost("seconds", "test accuracy, %, against seconds of training"),
            panels.LinePlot(title="images per second", y=["images_per_second"]),
            panels.LinePlot(title="peak memory, MB", y=["peak_memory_mb"]),
        ],
        "What differs": [panels.RunComparer(diff_only="split")],
    }


def build(group: Group, entity: str, name: str):
    """The `wandb_workspaces` workspace, not sent: its runs are the group's, by job type, the best on validation first.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
    except ModuleNotFoundError:
        raise UserError("kd.workspace needs the package wandb-workspaces; pip install wandb-workspaces") from None
    metric, sections = expr.Metric, _sections(panels, group.terms)
    columns = ("test_accuracy", "val_accuracy", "test_nll", "test_ece", "num_params", "multiply_adds", "seconds")
    return workspaces.Workspace(
        entity=entity,
        project=group.project,
        name=name,
        sections=[workspaces.Section(name=key, panels=each, is_open=True) for key, each in sections.items()],
        runset_settings=workspaces.RunsetSettings(
            filters=[metric("Group").isin(group.names)],
            groupby=[metric("JobType"), metric("Name")],  # by job type alone a teacher and a student would be one line
            order=[expr.Ordering(expr.Summary("val_accuracy"), ascending=False)],
            pinned_columns=[f"summary:{column}" for column in columns],
        ),
        settings=workspaces.WorkspaceSettings(max_runs=100),
    )


def described(workspace) -> dict:
    """A workspace as plain values, without what is left to W&B."""

    def given(items):
        return {key: value for key, value in items if value is not None and key[0] != "_"}

    return dataclasses.asdict(workspace, dict_factory=given)


def main(argv: list[str] | None = None) -> int:
    """Send the workspace, or print what would be sent."""
    parser = CommandParser(
        prog="python -m kd.workspace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", help="a folder of runs, or the name of a group as W&B shows it")
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; default $WANDB_ENTITY")
    parser.add_argument("--project", help="default: the runs' own, or kd")
    parser.add_argument("--name", help="what the workspace is called; default: the group's name")
    parser.add_argument("--print", action="store_true", help="print it as JSON, and send nothing")
    arguments = parser.parse_args(argv)
    group = find_group(arguments.group, arguments.project)
    if not arguments.entity:
        raise UserError("whose project? pass --entity NAME, or set WANDB_ENTITY")
    workspace = build(group, arguments.entity, arguments.name or f"kd: {', '.join(group.names)}")
    if arguments.print:
        print(json.dumps(described(workspace), indent=2, default=str))
        return 0
    if not has_key():
        raise UserError("no W&B key is found; run wandb login, or set WANDB_API_KEY; --print shows it without one")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    try:
        workspace.save()
    except Exception as error:  # the client raises many types for a refused key and for a server it cannot reach
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"W&B did not take the workspace ({type(error).__name__}: {reason}); --print shows it"
        ) from None
    say(f"made {workspace.url}")
    return 0
