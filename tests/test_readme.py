"""What the README shows is accepted: its commands, its recipe, its loss, its file list."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from conftest import ROOT

from kd.run.config import DistillConfig, EvaluateConfig, TeacherConfig
from kd.run.messages import _OTHER_NAMES
from kd.run.parse import parse

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^(?:accelerate launch|python) ((?:train_teacher|distill|evaluate)\.py .*)$",
                      "\n".join(text for _, text in BLOCKS).replace("\\\n", " "), re.M)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    script, *arguments = shlex.split(command)
    kind = {"train_teacher.py": TeacherConfig, "distill.py": DistillConfig, "evaluate.py": EvaluateConfig}[script]
    config = parse(kind, arguments, positional="runs" if kind is EvaluateConfig else None)
    if kind is EvaluateConfig:
        assert config.runs[-1] == "runs/stl10/kd"


def test_there_are_the_commands_of_the_main_job():
    assert sum("recipes/stl10" in command for command in COMMANDS) >= 2
    assert "make demo" in README
    assert "make test" in README


def test_the_loss_and_its_recipe_work(tmp_path, monkeypatch):
    code = next(text for kind, text in BLOCKS if kind == "python" and "class LogitsDistance" in text)
    recipe = next(text for kind, text in BLOCKS if kind == "yaml" and "my_losses" in text)
    (tmp_path / "my_losses.py").write_text(code)
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.syspath_prepend(tmp_path)
    config = parse(DistillConfig, ["--config", str(tmp_path / "r.yaml"), "--teacher", "runs/x"])
    assert [(type(loss).__name__, loss.weight) for loss in config.losses] == [
        ("LogitsDistance", 0.5),
        ("CrossEntropy", 1),
    ]
    assert yaml.safe_load(recipe)["losses"][0]["init_args"]["power"] == config.losses[0].power


def test_pictures_and_links_are_there_and_no_placeholder_is():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    assert "@@" not in README


TABLE = README.split("## Coming from")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1][:40])
def test_our_names_of_what_others_have_are_accepted(row):
    flags = re.findall(r"`(--[^`]+)`", row[-1])
    assert flags or "the same command" in row[-1]
    for kind, more in ((TeacherConfig, []), (DistillConfig, ["--teacher", "runs/x"])):
        config = parse(kind, [*more, *shlex.split(" ".join(flags))])
        default = parse(kind, more).resolved
        assert config.resolved != default or not flags


def test_a_flag_of_theirs_is_answered_by_what_the_table_says():
    theirs = {
        name.strip("-").replace("-", "_"): row[-1]
        for row in ROWS
        for name in re.findall(r"`([\w-]+)", " ".join(row[:-1]))
    }
    known = {name: ours for name, ours in _OTHER_NAMES.items() if name in theirs}
    assert len(known) > 20
    for name, ours in known.items():
        assert f"--{ours} " in theirs[name] or "the same command" in theirs[name] or f"--{ours}." in theirs[name], name


def test_the_way_of_a_batch_is_short():
    files = set(re.findall(r"`((?:kd/[\w/]+|distill)\.py)`", README.split("## Two commands")[0]))
    assert len(files) == 12
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) < 1600
