"""Sweep files that cannot be searched: one line that names what is wrong and what it takes, and no folder is made."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT, assert_one_line

pytest.importorskip("optuna", reason="optuna is not installed")

pytestmark = pytest.mark.first_tier(1)

GOOD = {
    "program": "distill.py",
    "method": "random",
    "metric": {"name": "val/accuracy", "goal": "maximize"},
    "run_cap": 1,
    "parameters": {"optimizer.lr": {"values": [0.001]}},
    "command": [
        "${program}",
        f"--config={ROOT}/recipes/digits/kd.yaml",
        "--output_dir=trials/$WANDB_RUN_ID",
        "${args}",
    ],
}
COMMAND = GOOD["command"]


def rate(**spec) -> dict:
    return {"parameters": {"optimizer.lr": spec}}


WRONG = {
    "unknown key": ({"methud": "grid"}, ["'methud'", "did you mean 'method'"]),
    "key that is a number": ({7: "grid"}, ["unknown key", "7"]),
    "program": ({"program": "evaluate.py"}, ["program is evaluate.py", "train_teacher.py"]),
    "program that is a list": ({"program": ["distill.py"]}, ["program is ['distill.py']", "distill.py"]),
    "no program": ({"program": None}, ["program is None", "distill.py"]),
    "method": ({"method": "hyper"}, ["method is hyper", "bayes, grid, random"]),
    "method that is a mapping": ({"method": {}}, ["method is {}", "bayes, grid, random"]),
    "metric of the test split": (
        {"metric": {"name": "test_accuracy", "goal": "maximize"}},
        ["test_accuracy", "test split"],
    ),
    "goal": ({"metric": {"name": "val/nll", "goal": "maximize"}}, ["val/nll", "minimize"]),
    "metric that is a word": ({"metric": "val/accuracy"}, ["metric is val/accuracy", "maximize"]),
    "no metric": ({"metric": None}, ["metric is None"]),
    "run_cap x": ({"run_cap": "x"}, ["run_cap is x", "a number of trials"]),
    "run_cap 0": ({"run_cap": 0}, ["run_cap is 0", "a number of trials"]),
    "run_cap -1": ({"run_cap": -1}, ["run_cap is -1", "a number of trials"]),
    "run_cap 1.5": ({"run_cap": 1.5}, ["run_cap is 1.5", "a number of trials"]),
    "no number of trials": ({"run_cap": None}, ["--trials N"]),
    "no command": ({"command": None}, ["command is None", "${args}"]),
    "command that is a line": ({"command": "python ${program} ${args}"}, ["a list of words"]),
    "command without args": ({"command": ["${program}"]}, ["command", "${args}"]),
    "args before program": ({"command": ["${args}", "${program}"]}, ["after it, ${args}"]),
    "args_json": ({"command": ["${program}", "${args_json}"]}, ["command", "${args}"]),
    "no folder of its own": ({"command": [*COMMAND[:2], "${args}"]}, ["--output_dir=FOLDER/$WANDB_RUN_ID"]),
    "a field of the script": ({"command": [*COMMAND, "--epoch=3"]}, ["'epoch'", "did you mean 'epochs'"]),
    "parameters that are a list": ({"parameters": [1]}, ["parameters is [1]"]),
    "no parameters": ({"parameters": None}, ["parameters is None"]),
    "parameter that is a number": ({"parameters": {"optimizer.lr": 0.1}}, ["parameters.optimizer.lr is 0.1", "values"]),
    "unknown field": ({"parameters": {"optimzer.lr": {"value": 1}}}, ["optimzer.lr", "optimizer.lr"]),
    "unknown field of a loss": (
        {"parameters": {"losses.KL.temperatur": {"value": 1}}},
        ["'temperatur'", "did you mean 'temperature'"],
    ),
    "nested": ({"parameters": {"optimizer": {"parameters": {"lr": {"value": 1}}}}}, ["dotted as optimizer.lr"]),
    "distribution": (rate(distribution="beta", min=1, max=2), ["beta", "log_uniform_values"]),
    "distribution that is a list": (rate(distribution=[1], min=1, max=2), ["[1]", "log_uniform_values"]),
    "distribution without a range": (rate(distribution="uniform", value=3), ["uniform", "min and max"]),
    "unknown key of a parameter": (rate(min=1, max=2, mean=3), ["mean", "min and max"]),
    "value and values": (rate(value=1, values=[1]), ["value", "values"]),
    "value and range": (rate(value=1, min=1, max=2), ["value", "min and max"]),
    "no max": (rate(min=0.1), ["'min': 0.1", "min and max"]),
    "min above max": (rate(min=2, max=1), ["'min': 2", "in order"]),
    "min above max, real": (rate(min=0.2, max=0.1), ["'min': 0.2", "in order"]),
    "log of zero": (rate(distribution="log_uniform_values", min=0, max=1), ["'min': 0", "above 0"]),
    "min of another type": (rate(min="a", max=1), ["'min': 'a'"]),
    "infinite": (rate(min=0.1, max=float("inf")), ["inf"]),
    "not a number": (rate(min=float("nan"), max=1.0), ["nan"]),
    "larger than a float": (rate(min=0.1, max=10**400), ["100000"]),
    "exponent too large": (rate(distribution="log_uniform", min=0, max=5000), ["5000"]),
    "int_uniform of real numbers": (rate(distribution="int_uniform", min=0.5, max=3), ["0.5"]),
    "q 0": (rate(distribution="q_uniform", min=0, max=1, q=0), ["'q': 0", "q (above 0)"]),
    "q -1": (rate(distribution="q_uniform", min=0, max=1, q=-1), ["'q': -1", "q (above 0)"]),
    "q without q_": (rate(min=0.0, max=1.0, q=0.1), ["'q': 0.1", "q_..."]),
    "no values": (rate(values=[]), ["'values': []", "a list"]),
    "values that are a word": (rate(values="abc"), ["'values': 'abc'", "a list"]),
    "a range in a grid": ({"method": "grid", **rate(min=0.1, max=0.2)}, ["grid", "optimizer.lr", "random"]),
    "early_terminate median": ({"early_terminate": {"type": "median"}}, ["median", "hyperband"]),
    "early_terminate that is a number": ({"early_terminate": 3}, ["early_terminate is 3", "hyperband"]),
    "early_terminate that is empty": ({"early_terminate": {}}, ["early_terminate is {}", "hyperband"]),
    "early_terminate misspelt": (
        {"early_terminate": {"type": "hyperband", "min_iter": 2, "etta": 2}},
        ["etta", "eta (2 or more)"],
    ),
    "min_iter 0": ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, ["'min_iter': 0"]),
    "eta 1": ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, ["eta (2 or more)"]),
}


@pytest.fixture
def sweep(call, tmp_path, monkeypatch):
    """Search a file of this content, or text, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "")  # a search sets it for good

    def run(content, *arguments):
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "sweep.yaml").write_text(text)
        return call("kd.tools.sweep", "sweep.yaml", *arguments)

    return run


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_file(sweep, tmp_path, change, words):
    assert_one_line(sweep({**GOOD, **change}), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize("text", ["- 1\n", "7", "", "a: [", "\x00"])
def test_a_file_that_is_no_mapping(sweep, text):
    assert_one_line(sweep(text), "sweep.yaml")


@pytest.mark.parametrize(
    "arguments", [("--seed", -1), ("--seed", "x"), ("--seed", 2**70), ("--trials", -3), ("--trials", 1.5)]
)
def test_a_wrong_flag(sweep, tmp_path, arguments):
    assert_one_line(sweep(GOOD, *arguments), arguments[0], str(arguments[1]))
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_file_that_is_not_there(call):
    assert_one_line(call("kd.tools.sweep", "nowhere.yaml"), "nowhere.yaml")


def test_a_grid_of_four_million_is_not_listed(sweep, tmp_path):
    values = {f"losses.KL.{name}": {"values": list(range(1, 22))} for name in ("temperature", "weight")}
    values |= {name: {"values": list(range(1, 22))} for name in ("seed", "epochs", "data.batch_size")}
    result = sweep({**GOOD, "method": "grid", "parameters": values}, "--trials", 0)
    assert result.status == 0, result.err
    assert "none yet" in result.out
    assert (tmp_path / "trials/study.journal").stat().st_size < 10_000
