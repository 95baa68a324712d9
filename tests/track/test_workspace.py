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


def strings(value) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for each in inner for text in strings(each)]


def printed(call, *arguments) -> dict:
    result = call("kd.track.workspace", *arguments, "--print")
    assert result.status == 0, result.err
    return json.loads(result.out)


def test_every_panel_shows_what_a_run_writes(call, tmp_path):
    run = tmp_path / "digits/student"
    assert call("train_teacher", *SMALL, "--output_dir", run, "--project", "mine").status == 0
    sent = printed(call, tmp_path / "digits", "--entity", "team")
    assert (sent["entity"], sent["project"], sent["name"]) == ("team", "mine", "kd: digits")
    section = sent["spec"]["section"]
    panels = section["panelBankConfig"]["sections"]
    assert [each["name"] for each in panels] == SECTIONS
    history = {name for _, name in truth(run)} | {"_step"}
    summary = {f"summary:{key}" for key in json.loads((run / "summary.json").read_text())}
    kinds, shown = set(), set()
    for panel in (panel for each in panels for panel in each["panels"]):
        config, kind = panel["config"], panel["viewType"]
        kinds.add(kind)
        if kind == "Run History Line Plot":
            shown |= set(config["metrics"])
            assert {*config["metrics"], config.get("xAxis", "_step")} <= history
        elif kind == "Bar Chart":
            assert {f"summary:{name}" for name in config["metrics"]} <= summary
        elif kind == "Scatter Plot":
            assert {config["xAxis"], config["yAxis"]} <= summary
    assert kinds == {"Run History Line Plot", "Bar Chart", "Scatter Plot", "Run Comparer"}
    assert shown >= {"val/accuracy", "val/nll", "epoch/loss", "epoch/CrossEntropy", "lr", "gradient_norm"}

    (runs,) = section["runSets"]
    assert set(runs["runFeed"]["columnPinned"]) <= summary | {"run:displayName"}
    assert [each["name"] for each in runs["grouping"]] == ["jobType", "displayName"]
    assert {"group", "digits"} <= set(strings(runs["filters"]))
    assert runs["sort"]["keys"][0] == {"key": {"section": "summary", "name": "val_accuracy"}, "ascending": False}


def test_a_group_by_name_shows_whatever_terms_there_are(call):
    sent = printed(call, "somewhere", "--entity", "team", "--name", "mine")
    assert (sent["project"], sent["name"]) == ("kd", "mine")
    section = sent["spec"]["section"]
    assert "somewhere" in strings(section["runSets"][0]["filters"])
    (pattern,) = (
        panel["config"]["metricRegex"]
        for panel in section["panelBankConfig"]["sections"][1]["panels"]
        if "metricRegex" in panel["config"]
    )
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
