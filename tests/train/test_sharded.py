"""The launch configurations, and engines that share out optimizer or weights: FSDP version 2, DeepSpeed ZeRO."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, assert_one_line
from test_parallel import ARGUMENTS, close
from test_resume import assert_same_run, rows

import kd
from kd.losses import Loss

# As `accelerate launch` asks for them; without GPUs, which Accelerate would take rather than the CPU.
ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "CUDA_VISIBLE_DEVICES": ""},
    "deepspeed_zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "CUDA_VISIBLE_DEVICES": ""},
}


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="DeepSpeed is not installed, or the C++ compiler that it needs on a CPU",
)
SHARDED = ["fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert children.run("train_teacher", (*ARGUMENTS, "--output_dir", folder)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_sharded_run_has_the_losses_of_one_process_and_resumes_exactly(alone, tmp_path, engine):
    for name, sabotage in (("whole", None), ("cut", ("kd.train.meter.Meter.add:SIGTERM", 6))):
        command = (*ARGUMENTS, "--output_dir", tmp_path / name)
        statuses = children.run_several("train_teacher", command, 2, sabotage, ENGINES[engine])
        assert statuses == ([0, 0] if sabotage is None else [143, 143])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (alone, tmp_path / "whole")]
    assert [summary["sharded"] for summary in summaries] == [False, True]
    close(rows(alone), rows(tmp_path / "whole"), 1e-4)
    assert kd.load(tmp_path / "whole").network.state_dict().keys() == kd.load(alone).network.state_dict().keys()
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    # the checkpoint is whole: it resumes exactly on as many processes, and without the engine to rounding
    if engine == "fsdp2":  # not forked: each process reads in an order of its own
        check_launched(engine, launch(engine, *command, "--num_threads", 1), tmp_path / "cut")
    else:
        assert children.run_several("train_teacher", command, 2, None, ENGINES[engine]) == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert children.run("train_teacher", (*ARGUMENTS, "--output_dir", tmp_path / "other")) == 0
    close(rows(alone), rows(tmp_path / "other"), 1e-4)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_resumes_from_a_run_without_it_and_with_adam_exactly(alone, tmp_path):
    zero = ENGINES["deepspeed_zero2"]
    command = (*ARGUMENTS, "--accumulate", 2, "--output_dir", tmp_path / "run")
    assert children.run("train_teacher", command, sabotage=("kd.train.meter.Meter.add:SIGTERM", 9)) == 143
    assert children.run_several("train_teacher", command, 2, None, zero) == [0, 0]
    close(rows(alone), rows(tmp_path / "run"), 1e-3)  # 2 images at a time at the end: one unit's sign shows in the norm
    adam = (*ARGUMENTS, "--optimizer.name", "adamw", "--optimizer.lr", 0.01, "--optimizer.clip_norm", 1)
    for name, sabotage in (("whole", None), ("cut", ("kd.train.meter.Meter.add:SIGTERM", 6))):
        statuses = children.run_several("train_teacher", (*adam, "--output_dir", tmp_path / name), 2, sabotage, zero)
        assert statuses == ([0, 0] if sabotage is None else [143, 143])
    assert children.run_several("train_teacher", (*adam, "--output_dir", tmp_path / "cut"), 2, None, zero) == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert children.run_several("train_teacher", (*adam, "--output_dir", tmp_path / "ddp"), 2) == [0, 0]
    close(rows(tmp_path / "ddp"), rows(tmp_path / "whole"), 1e-2)  # Adam magnifies rounding


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_evaluation_under_an_engines_launcher(alone, tmp_path, engine):
    for name, environment in (("ddp", {}), (engine, ENGINES[engine])):
        command = (alone, "--latency", "false", "--json", tmp_path / f"{name}.json")
        assert children.run_several("evaluate", command, 2, None, environment) == [0, 0]
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["runs"][0] for name in (engine, "ddp"))
    assert ours["top1"] == theirs["top1"]
    assert ours["nll"] == theirs["nll"]


class Remembering(Loss):
    """Distance to the mean of the logits that this process saw at the step before: a buffer that nobody keeps equal."""

    needs_teacher = False

    def setup(self, setting):
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student, teacher, batch):
        value = (student.logits - self.seen).square().mean()
        self.seen.copy_(student.logits.detach().mean())
        return value


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_sharded_with_losses_that_learn_and_remember(teacher_run, tmp_path, engine):
    """FSDP2 by blocks; DeepSpeed in half precision, which is autocast's as without it."""
    half = ("--mixed_precision", "bf16") if engine == "deepspeed_zero2" else ()
    command = (
        *("--config", "recipes/digits/kd.yaml", "--teacher", teacher_run, "--report_to", "none"),
        *("--student", "resnet18", "--data.num_train", 72, "--data.batch_size", 24, "--epochs", 1, "--log_every", 1),
        *("--optimizer.name", "sgd", "--optimizer.clip_norm", 0.5, "--losses+=test_sharded.Remembering"),
        *("--losses+=CC", "--losses.init_args.student_tap", "layer4", "--losses.init_args.teacher_tap", "features"),
        *half,
        "--output_dir",
    )
    blocks = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicBlock"}
    assert children.run_several("distill", (*command, tmp_path / "ddp"), 2) == [0, 0]
    environment = {**ENGINES[engine], **blocks}
    assert children.run_several("distill", (*command, tmp_path / "sharded"), 2, None, environment) == [0, 0]
    # not the epoch's row: DDP evaluates with each process's own batch norm statistics
    training = [[row for row in rows(tmp_path / name) if "lr" in row] for name in ("ddp", "sharded")]
    assert len(training[0]) == 3
    close(*training, 1e-2 if half else 1e-3)


@pytest.mark.slow
def test_adopt_gives_the_network_s_own_weights_or_refuses(alone, tmp_path):
    weights = alone / "model.safetensors"
    command = ("--model", "light_nn", "--weights", weights, "--data.source", "digits", "--data.resize", 32)
    statuses = {}
    for engine in ("ddp", "fsdp2"):
        arguments = (*command, "--output_dir", tmp_path / engine)
        processes = children.start_several("kd.tools.adopt", arguments, 2, None, ENGINES[engine], tmp_path / "said")
        statuses[engine] = children.finish(*processes)
    assert statuses == {"ddp": [0, 0], "fsdp2": [2, 2]}
    assert (tmp_path / "ddp/model.safetensors").read_bytes() == weights.read_bytes()
    assert "error: kd.adopt trains nothing that FSDP2 could share out" in (tmp_path / "said").read_text()
    assert not (tmp_path / "fsdp2").exists()


class Missing(Loss):
    """Fails at the first batch."""

    needs_teacher = False

    def forward(self, student, teacher, batch):
        return {"other": student.logits.mean()}["missing"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_a_loss_that_fails_is_one_line_before_anything_is_written(tmp_path, engine):
    command = (*ARGUMENTS, "--losses", "[test_sharded.Missing]", "--output_dir", tmp_path / "run")
    processes = children.start_several("train_teacher", command, 2, None, ENGINES[engine], tmp_path / "said")
    assert children.finish(*processes) == [2, 2]
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert "error: a trial on 4 training images failed: KeyError: 'missing', raised by your own code" in said
    assert not (tmp_path / "run").exists()


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, (), ("version 1", "fsdp_version: 2")),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, (), ("stage 3", "zero_stage to 1 or 2", "fsdp2.yaml")),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, (), ("offload_optimizer to cpu",)),
        (DEEPSPEED, ("--mixed_precision", "fp16"), ("fp16", "DeepSpeed", "bf16 or no")),
        (DEEPSPEED, ("--compile", "true"), ("compile true", "DeepSpeed")),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"}, (), ("missing.json", "cannot be read")),
    ],
)
def test_what_an_engine_cannot_do_is_refused(call, monkeypatch, tmp_path, environment, arguments, words):
    monkeypatch.setattr("kd.train.zero.find_spec", lambda name: name)
    monkeypatch.setattr("kd.train.zero.shutil.which", lambda name: name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_one_line(call("train_teacher", *SMALL, *arguments, "--output_dir", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("installed", "words"), [(None, "pip install deepspeed"), ("there", "a C++ compiler")])
def test_what_deepspeed_needs_is_said(call, monkeypatch, tmp_path, installed, words):
    monkeypatch.setattr("kd.train.zero.find_spec", lambda name: installed)
    for name, value in {**DEEPSPEED, "ACCELERATE_USE_CPU": "true", "CXX": "no-such-compiler"}.items():
        monkeypatch.setenv(name, value)
    assert_one_line(call("train_teacher", *SMALL, "--output_dir", tmp_path / "run"), words)


def test_a_deepspeed_file_sets_zero_and_nothing_else(monkeypatch, tmp_path):
    from kd.run.config import TeacherConfig
    from kd.train import zero
    from kd.util.errors import UserError

    file = tmp_path / "deepspeed.json"
    monkeypatch.setattr("kd.train.zero.find_spec", lambda name: name)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    content = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "train_batch_size": "auto"}
    file.write_text(json.dumps(content))
    zero.check(TeacherConfig(), "no", on_cpu=False)
    assert zero.zero_section() == content["zero_optimization"]
    file.write_text(json.dumps({**content, "optimizer": {}, "bf16": {}}))
    with pytest.raises(UserError, match=r"sets bf16, optimizer; only zero_optimization is read"):
        zero.check(TeacherConfig(), "no", on_cpu=False)


PROCESSES = {
    "cpu": 1,
    "cpu_2proc": 2,
    "single_gpu": 1,
    "multi_gpu": 8,
    "multi_node": 16,
    "fsdp2": 8,
    "deepspeed_zero2": 8,
}


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))])
def test_launch_configs_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == PROCESSES[name]
    assert config.use_cpu == name.startswith("cpu")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cpu_2proc", *SHARDED[1:]])
def test_accelerate_launch(tmp_path, name):
    """FSDP2 is launched above."""
    result = launch(name, *SMALL, "--output_dir", tmp_path / "run", "--report_to", "none")
    check_launched(name, result, tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"] == "mnist_student"


def check_launched(name: str, result: subprocess.CompletedProcess, run: Path) -> None:
    """The launcher ended well and one of its processes has said how many they are and what they share out."""
    assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_processes"] == (1 if name == "cpu" else 2)
    assert result.stdout.count("test accuracy") == 1
    assert ("weights in 2 parts (FSDP2)" in result.stdout) == (name == "fsdp2")
    assert ("optimizer state in 2 parts (DeepSpeed)" in result.stdout) == (name == "deepspeed_zero2")


def launch(name: str, *arguments) -> subprocess.CompletedProcess:
    """`accelerate launch` with one of the config files, on at most two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        f"accelerate_configs/{name}.yaml",
        *(["--num_processes", "2"] if name in ("fsdp2", "deepspeed_zero2") else []),
    ]
    command += ["train_teacher.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
