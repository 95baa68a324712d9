"""Make a W&B workspace that compares the runs of a group: curves, loss terms, calibration, cost, what differs.

python -m kd.workspace runs/digits --entity TEAM
python -m kd.workspace runs/digits --entity TEAM --print     shows it, and sends nothing
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

from kd.measure.records import find_runs
from kd.track import has_key
from kd.util.errors import CommandParser, UserError, say

NOT_TERMS = ("epoch/loss", "epoch/images_per_second")


PINNED = ("test_accuracy", "val_accuracy", "test_nll", "test_ece", "num_params", "multiply_adds", "seconds")


def find_group(group: str, project: str | None) -> tuple[list[str], str, list[str]]:
    """The names of groups as the tracker has them, their project, and the loss terms of their runs, `epoch/NAME`, none
    where they are not known: of a group by its name, or of the runs in a folder and below it."""
    if not Path(group).is_dir():
        if os.sep in group:
            raise UserError(f"no such folder: {group!r}; name a folder of runs, or a group as W&B shows it")
        return [group], project or "kd", []
    runs = find_runs(group)
    if not runs:
        raise UserError(f"{group!r} holds no runs")
    projects = sorted({run.config["project"] for run in runs})
    if project is None and len(projects) > 1:
        raise UserError(f"the runs of {group!r} are of several projects: {', '.join(projects)}; choose by --project")
    names = {run.config.get("group") or run.folder.resolve().parent.name for run in runs}
    keys = {key for run in runs for row in run.epochs for key in row if key.startswith("epoch/")}
    return sorted(names), project or projects[0], sorted(keys - set(NOT_TERMS))


def _sections(panels, terms: list[str]) -> dict[str, list]:
    """The panels of each section; `panels` is the package's module, `terms` are the loss terms, none if not known."""

    def curve(title: str, key: str = "", **more):
        more = (
            {"x": "epoch", "max_runs_to_show": 100, **more} if key.startswith(("epoch/", "val/")) or not key else more
        )
        return panels.LinePlot(title=title, **({"y": [key]} if key else {}), **more)

    def bars(title: str, key: str):
        return panels.BarPlot(title=title, metrics=[key], max_runs_to_show=100)

    def points(title: str, x: str, y: str, **more):
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(x), y=panels.SummaryMetric(y), **more)

    def against(cost: str, words: str):
        return points(f"test accuracy, %, against {words}", cost, "test_accuracy", log_x=True)

    any_term = curve("loss terms", metric_regex="epoch/[A-Z].*", log_y=True)
    return {
        "Accuracy": [
            curve("validation accuracy, %", "val/accuracy"),
            curve("validation accuracy, %, by images seen", "val/accuracy", x="images_seen", max_runs_to_show=None),
            bars("test accuracy, %", "test_accuracy"),
        ],
        "Loss terms": [
            curve("objective", "epoch/loss", log_y=True),
            *([curve(term, term, log_y=True) for term in terms] or [any_term]),
            curve("learning rate", "lr"),
            curve("gradient norm", "gradient_norm", log_y=True),
        ],
        "Calibration": [
            curve("validation NLL", "val/nll"),
            bars("test NLL", "test_nll"),
            points("test ECE against accuracy, both %", "test_accuracy", "test_ece"),
        ],
        "Cost against accuracy": [
            against("multiply_adds", "multiply-adds"),
            against("num_params", "parameters"),
            against("seconds", "seconds of training"),
            curve("images per second", "images_per_second"),
            curve("peak memory, MB", "peak_memory_mb"),
        ],
        "What differs": [panels.RunComparer(diff_only="split")],
    }


def build(names: list[str], project: str, terms: list[str], entity: str, title: str):
    """The `wandb_workspaces` workspace, not sent: its runs are the group's, by job type, the best on validation
    first."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
    except ModuleNotFoundError:
        raise UserError("kd.workspace needs the package wandb-workspaces; pip install wandb-workspaces") from None
    sections = _sections(panels, terms).items()
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[workspaces.Section(name=key, panels=each, is_open=True) for key, each in sections],
        runset_settings=workspaces.RunsetSettings(
            filters=[expr.Metric("Group").isin(names)],
            groupby=list(map(expr.Metric, ("JobType", "Name"))),  # by job type alone teacher and student would be one
            order=[expr.Ordering(expr.Summary("val_accuracy"), ascending=False)],
            pinned_columns=[f"summary:{column}" for column in PINNED],
        ),
        settings=workspaces.WorkspaceSettings(max_runs=100),
    )


def main(argv: list[str] | None = None) -> int:
    """Send the workspace, or print what would be sent."""
    parser = CommandParser("workspace", __doc__)
    parser.add_argument("group", help="a folder of runs, or the name of a group as W&B shows it")
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team; default $WANDB_ENTITY")
    parser.add_argument("--project", help="default: the runs' own, or kd")
    parser.add_argument("--name", help="what the workspace is called; default: the group's name")
    parser.add_argument("--print", action="store_true", help="print it as JSON, and send nothing")
    arguments = parser.parse_args(argv)
    names, project, terms = find_group(arguments.group, arguments.project)
    if not arguments.entity:
        raise UserError("whose project? pass --entity NAME, or set WANDB_ENTITY")
    title = arguments.name or f"kd: {', '.join(names)}"
    workspace = build(names, project, terms, arguments.entity, title)
    if arguments.print:  # without what is left to W&B
        given = dataclasses.asdict(
            workspace, dict_factory=lambda items: {key: v for key, v in items if v is not None and key[0] != "_"}
        )
        print(json.dumps(given, indent=2, default=str))
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
