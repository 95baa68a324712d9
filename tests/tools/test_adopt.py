"""python -m kd.adopt: a network that was trained elsewhere is a finished run, with the accuracy that it had."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import ROOT, assert_one_line

import kd
from kd.models import state_hash
from kd.run.config import AdoptConfig
from kd.run.parse import parse

COMMAND = "kd.tools.adopt"
DATA = ("--data.num_train", 200, "--data.resize", 28, "--data.mean", "[0.5]", "--data.std", "[0.4]")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a run of two steps."""
    import train_teacher

    folder = tmp_path_factory.mktemp("source") / "run"
    words = [*map(str, DATA), "--model", "mnist_student", "--max_steps", "2", "--report_to", "none"]
    assert train_teacher.main([*words, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def weights(source, tmp_path):
    torch.save(kd.load(source).network.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def adopt(call, weights, tmp_path):
    def run(*more):
        given = ("--model", "mnist_student", "--weights", weights, "--output_dir", tmp_path / "adopted")
        return call(COMMAND, *DATA, *given, *more)

    return run


def test_it_is_the_run_that_it_was(adopt, source, weights, tmp_path):
    folder = tmp_path / "adopted"
    assert adopt().status == 0
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    mine, theirs = (json.loads((run / "summary.json").read_text()) for run in (folder, source))
    for name in ("test_accuracy", "val_accuracy", "test_nll", "num_params", "multiply_adds", "images"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert mine["inputs"]["data"] == theirs["inputs"]["data"]
    assert list(mine["inputs"]["weights"]) == [str(weights)]
    before = (folder / "summary.json").read_bytes()
    assert "finished already" in adopt().out
    assert (folder / "summary.json").read_bytes() == before


def test_its_config_makes_it_again(adopt, call, tmp_path):
    assert adopt().status == 0
    config = tmp_path / "adopted/config.yaml"
    assert call(COMMAND, "--config", config, "--output_dir", tmp_path / "again").status == 0
    assert state_hash(kd.load(tmp_path / "again")) == state_hash(kd.load(tmp_path / "adopted"))
    assert "epochs" not in yaml.safe_load(config.read_text())


@pytest.mark.slow
def test_a_student_learns_from_it_and_all_else_takes_it(adopt, call, source, tmp_path):
    assert adopt().status == 0
    folder, student = tmp_path / "adopted", tmp_path / "student"
    words = (*DATA, "--data.split_seed", 1, "--student", "mnist_student", "--max_steps", 2, "--report_to", "none")
    distilled = call("distill", *words, "--teacher", folder, "--output_dir", student)
    assert distilled.status == 0
    assert "has seen" not in distilled.out  # on what it was trained is not known
    measured = call("evaluate", folder, source, student, "--latency", "false", "--report", tmp_path / "report")
    assert measured.status == 0, measured.err
    assert "damaged" not in measured.out + measured.err
    assert kd.runs(tmp_path / "adopted").frame().loc[0, "finished"]
    assert call("kd.tools.export.command", folder, "--to", "hub").status == 0
    card = (folder / "export/hub/README.md").read_text()
    assert "trained elsewhere" in card
    assert "optimizer" not in card
    assert "weights.pth" in card


def test_class_names_in_the_networks_order(adopt, source, weights, tmp_path):
    order = [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]
    state = torch.load(weights, weights_only=True)
    head = list(kd.load(source).network.named_modules())[-1][0]
    for name in ("weight", "bias"):
        state[f"{head}.{name}"] = state[f"{head}.{name}"][order]
    torch.save(state, weights)
    (tmp_path / "names.txt").write_text("\n".join(map(str, order)) + "\n\n")
    assert adopt("--classes", tmp_path / "names.txt").status == 0
    mine, theirs = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "adopted", source))
    assert mine["test_accuracy"] == theirs["test_accuracy"]
    assert mine["inputs"]["data"] == theirs["inputs"]["data"]
    assert kd.load(tmp_path / "adopted").classes == [str(number) for number in order]


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema"])
def test_checkpoints_of_others(adopt, source, weights, key, tmp_path):
    state = {f"module.{name}": value for name, value in torch.load(weights, weights_only=True).items()}
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: state}, weights)
    assert adopt().status == 0
    assert state_hash(kd.load(tmp_path / "adopted")) == state_hash(kd.load(source))


def test_what_cannot_be_adopted_is_one_line_and_leaves_no_folder(adopt, call, weights, tmp_path, image_folder):
    assert_one_line(adopt("--model", "resnet19"), "'resnet19'", "did you mean")
    assert_one_line(adopt("--model", "light_nn"), "do not fit light_nn")
    assert_one_line(adopt("--data.source", image_folder, "--data.num_train", "null"), "10 classes", "3", "random")
    assert_one_line(adopt("--weights", tmp_path / "none.pth"), "there is no such file")
    assert_one_line(adopt("--data.resize", 32), "28x28")
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456788") + "\nzebra\n")
    assert_one_line(adopt("--classes", names), "twice: 8", "not of the data: zebra", "missing: 9")
    assert_one_line(adopt("--classes", tmp_path), "cannot be read")
    assert_one_line(adopt("--epochs", 3), "unknown field 'epochs'")
    torch.save({"args": AdoptConfig(weights="x"), "model": {}}, weights)
    assert_one_line(adopt(), "cannot be read", "save network.state_dict() alone")
    weights.write_bytes(b"damaged")
    assert_one_line(adopt(), "cannot be read")
    assert_one_line(call(COMMAND), "weights is empty")
    assert not (tmp_path / "adopted").exists()


def test_no_epoch_names_the_way(call):
    assert_one_line(call("train_teacher", "--epochs", 0), "epochs 0 must be above 0", "python -m kd.adopt")


def test_the_command_of_the_readme_is_accepted():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.startswith("python -m kd.adopt"))
    assert parse(AdoptConfig, command.split()[3:]).output_dir == "runs/mine/teacher"
