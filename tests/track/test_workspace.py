"""The W&B workspace of a group: what would be sent names what runs really write, and nothing is sent without a key."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import SMALL, assert_one_line
from records import truth

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")

from wandb_workspaces.workspaces import Workspace

SECTIONS = ["Accuracy", "Loss terms", "Calibration", "Cost against accuracy", "What differs"]


def printed(call, *arguments) -> dict:
    result = call("kd.track.workspace", *arguments, "--print")
    assert result.status == 0, result.err
    return json.loads(result.out)


def test_every_panel_shows_what_a_run_writes(call, tmp_path):
    run = tmp_path / "digits/student"
    assert call("train_teacher", *SMALL, "--output_dir", run, "--project", "mine").status == 0
    sent = printed(call, tmp_path / "digits", "--entity", "team")
    assert (sent["entity"], sent["project"], sent["name"]) == ("team", "mine", "kd: digits")
    assert [each["name"] for each in sent["sections"]] == SECTIONS
    history = {name for _, name in truth(run)} | {"Step"}
    summary = json.loads((run / "summary.json").read_text()).keys()
    kinds, shown = [], set()
    for panel in (panel for each in sent["sections"] for panel in each["panels"]):
        if isinstance(panel.get("y"), list):
            kinds.append("curves")
            shown |= set(panel["y"])
            assert {*panel["y"], panel["x"]} <= history
        elif "metrics" in panel:
            kinds.append("bars")
            assert set(panel["metrics"]) <= summary
        elif "y" in panel:
            kinds.append("points")
            assert {panel["x"]["name"], panel["y"]["name"]} <= summary
        else:
            kinds.append("differences")
            assert panel["diff_only"] == "split"
    assert set(kinds) == {"curves", "bars", "points", "differences"}
    assert shown >= {"val/accuracy", "val/nll", "epoch/loss", "epoch/CrossEntropy", "lr", "gradient_norm"}

    runs = sent["runset_settings"]
    assert set(runs["pinned_columns"]) <= {f"summary:{key}" for key in summary} | {"run:displayName"}
    assert [each["name"] for each in runs["groupby"]] == ["JobType", "Name"]
    assert runs["filters"] == "Metric(\"Group\") in ['digits']"
    assert runs["order"] == [{"item": {"name": "val_accuracy"}, "ascending": False}]


def test_a_group_by_name_shows_whatever_terms_there_are(call):
    sent = printed(call, "somewhere", "--entity", "team", "--name", "mine")
    assert (sent["project"], sent["name"]) == ("kd", "mine")
    assert "somewhere" in sent["runset_settings"]["filters"]
    (pattern,) = (panel["metric_regex"] for panel in sent["sections"][1]["panels"] if "metric_regex" in panel)
    names = ("epoch/KL", "epoch/CrossEntropy", "epoch/loss", "epoch/images_per_second", "train/KL")
    assert [name for name in names if re.fullmatch(pattern, name)] == ["epoch/KL", "epoch/CrossEntropy"]


def test_without_a_key_a_name_a_package_or_a_server_it_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    assert_one_line(call("kd.track.workspace", "x"), "--entity", "WANDB_ENTITY")
    assert_one_line(call("kd.track.workspace", "x", "--entity", "team"), "no W&B key", "wandb login", "--print")
    assert_one_line(call("kd.track.workspace", "no/such", "--entity", "team"), "no such folder", "'no/such'")
    assert_one_line(call("kd.track.workspace", tmp_path, "--entity", "team"), "holds no runs")

    def refuse(*_):
        raise ConnectionError("the network\nis unreachable")

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(Workspace, "save", refuse)
    result = call("kd.track.workspace", "x", "--entity", "team")
    assert_one_line(result, "did not take", "ConnectionError: the network is unreachable", "--print")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    result = call("kd.track.workspace", "x", "--entity", "team", "--print")
    assert_one_line(result, "needs the package wandb-workspaces", "pip install wandb-workspaces")
