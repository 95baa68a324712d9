"""Recipes and flags: what wins, what the run folder keeps, your own loss without a fork."""

from __future__ import annotations

import pytest
import yaml
from conftest import SMALL

from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import differing_fields, parse
from kd.util.errors import UserError


def losses(config) -> list[tuple]:
    return [(type(loss).__name__, loss.weight, getattr(loss, "temperature", None)) for loss in config.losses]


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults():
    recipe, flags = ["--config", "recipes/digits/teacher.yaml"], ["--data.batch_size", "32", "--seed=7", "--epochs=9"]
    for argv in ([*recipe, *flags], [*flags, *recipe], [*flags[:2], "=".join(recipe), *flags[2:]]):
        config = parse(TeacherConfig, argv)
        assert (config.data.batch_size, config.seed, config.epochs) == (32, 7, 9)
        assert config.data.resize == 28
        assert config.data.val_fraction == 0.1
        assert config.data.mean == [0.5, 0.5, 0.5]


def test_default_losses_are_replaced_whole(tmp_path):
    teacher = ["--teacher", "t"]
    assert losses(parse(DistillConfig, teacher)) == [("KL", 0.9, 4.0), ("CrossEntropy", 0.1, None)]
    (tmp_path / "r.yaml").write_text("losses:\n- class_path: KL\n- class_path: CrossEntropy\n")
    own = parse(DistillConfig, [*teacher, "--config", str(tmp_path / "r.yaml")])
    assert losses(own) == [("KL", 1.0, 4.0), ("CrossEntropy", 1.0, None)]


def test_a_list_of_losses_on_the_command_line_takes_nothing_from_the_recipe():
    recipe = ["--config", "recipes/stl10/kd.yaml"]
    assert losses(parse(DistillConfig, recipe)) == [("KL", 0.7, 2.0), ("CrossEntropy", 0.3, None)]
    for flag in (["--losses", "[KL, CrossEntropy]"], ["--losses=[KL, CrossEntropy]"]):
        assert losses(parse(DistillConfig, [*recipe, *flag])) == [("KL", 1.0, 4.0), ("CrossEntropy", 1.0, None)]
    added = parse(DistillConfig, [*recipe, "--losses+=KL", "--losses.temperature=9"])
    assert losses(added) == [("KL", 0.7, 2.0), ("CrossEntropy", 0.3, None), ("KL", 1.0, 9.0)]


def test_several_teachers():
    assert parse(DistillConfig, ["--teacher", "a"]).teacher == "a"
    assert parse(DistillConfig, ["--teacher", "[a, b]"]).teacher == ["a", "b"]


def test_the_resolved_config_is_written_and_runs_again(call, tmp_path):
    folder = tmp_path / "run"
    assert call("train_teacher", *SMALL, "--epochs", 1, "--output_dir", folder, "--overwrite", "true").status == 0
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["data"]["num_train"] == 200
    assert written["losses"] == [
        {"class_path": "kd.losses.CrossEntropy", "init_args": {"label_smoothing": 0.0, "weight": 1.0}}
    ]
    result = call("train_teacher", "--config", folder / "config.yaml")
    assert result.status == 0
    assert "finished already" in result.out


def test_differing_fields_are_named_and_free_ones_are_not():
    old = {"seed": 0, "data": {"source": "digits", "cache_dir": None}, "report_to": "none", "checkpoint_every": 2}
    new = {"seed": 1, "data": {"source": "mnist", "cache_dir": "x"}, "report_to": "wandb", "checkpoint_every": 9}
    assert differing_fields(old, old) == []
    assert differing_fields(old, new) == ["data.source ('digits' there, 'mnist' here)", "seed (0 there, 1 here)"]


def test_your_own_loss_by_import_path(call, tmp_path, monkeypatch, teacher_run):
    (tmp_path / "my_losses.py").write_text(
        "import torch.nn.functional as F\n"
        "from kd.losses import Loss\n\n\n"
        "class LogitsDistance(Loss):\n"
        '    """Mean of |student - teacher| ** power."""\n\n'
        "    def __init__(self, power: float = 2.0, weight: float = 1.0):\n"
        "        super().__init__(weight)\n"
        "        self.power = power\n\n"
        "    def forward(self, student, teacher, batch):\n"
        "        return (student.logits - teacher.logits).abs().pow(self.power).mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = ["--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 1, "--teacher", teacher_run]
    own = "[{class_path: my_losses.LogitsDistance, init_args: {power: 1.5, weight: 0.5}}, CrossEntropy]"
    result = call("distill", *command, "--losses", own, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert "0.5 * LogitsDistance(power=1.5) + 1 * CrossEntropy" in result.out


@pytest.mark.parametrize("teacher_mean", ["logits", "probabilities"])
def test_a_mean_of_teachers(teacher_run, tmp_path, teacher_mean):
    import torch

    from kd.models import load_classifier
    from kd.teachers.load import load_teachers

    classes = [str(digit) for digit in range(10)]
    single = load_classifier(teacher_run)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    both = load_teachers([str(teacher_run)] * 2, classes, teacher_mean, torch.device("cpu"))
    both.members["teacher2"].network.classifier[-1].bias.data += torch.linspace(-2, 2, 10)
    one, other = (member(images) for member in both.members.values())
    assert not torch.allclose(one, other)
    assert torch.equal(one, single(images))
    logits = both.logits({"image": images})
    if teacher_mean == "logits":
        assert torch.allclose(logits, (one + other) / 2)
    else:
        assert torch.allclose(logits.softmax(1), (one.softmax(1) + other.softmax(1)) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None, 6),  # what `accelerate launch` sets
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2"}, None, 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "9"}, None, 1),
        ({"OMP_NUM_THREADS": "4", "ACCELERATE_MIXED_PRECISION": "no"}, None, None),
        ({"OMP_NUM_THREADS": "1"}, None, None),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 2, 2),
    ],
)
def test_the_launchers_single_thread_is_not_taken_for_the_users_wish(monkeypatch, environment, asked, expected):
    import os

    import torch

    from kd.train.setup import set_threads

    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    set_threads(asked)
    assert chosen == ([] if expected is None else [expected])


def test_a_run_of_an_earlier_version_resumes():
    """Fields and arguments that its config.yaml does not know yet count as their defaults."""
    from kd.run.parse import differing_fields

    new = parse(DistillConfig, ["--config", "recipes/digits/kd.yaml"]).resolved
    old = yaml.safe_load(yaml.safe_dump(new))
    del old["learner"], old["data"]["pad_crop"], old["losses"][0]["init_args"]["standardize"]
    assert differing_fields(old, new) == []
    old["losses"][0]["init_args"]["temperature"] = 2.0
    old["data"]["flip"] = True
    assert [text.split()[0] for text in differing_fields(old, new)] == ["data.flip", "losses"]
    new["learner"] = {"class_path": "kd.students.ReusedHead", "init_args": {"tap": None}}
    assert [text.split()[0] for text in differing_fields(old, new)] == ["data.flip", "learner", "losses"]


def test_one_loss_of_a_recipe_is_changed_by_its_name():
    recipe = ["--config", "recipes/digits/kd.yaml"]
    flags = ["--losses.KL.temperature=8", "--losses.CrossEntropy.weight", "1e-05", "--losses.KL.standardize=True"]
    changed = parse(DistillConfig, [*flags, *recipe])
    assert losses(changed) == [("KL", 0.9, 8.0), ("CrossEntropy", 1e-05, None)]
    assert changed.losses[0].standardize is True
    kept = changed.resolved["losses"]
    assert kept[0]["init_args"] == {"temperature": 8.0, "standardize": True, "weight": 0.9}
    both = parse(DistillConfig, [*recipe, "--losses+=KL", "--losses.KL.weight=3"])
    assert losses(both) == [("KL", 3, 4.0), ("CrossEntropy", 0.1, None), ("KL", 3, 4.0)]
    for flags, message in (
        (["--losses.DKD.beta=1"], "'DKD'; known: CrossEntropy, KL"),
        (["--losses.KL.temprature=1"], "did you mean 'temperature'"),
        (["--losses.KL.temperature=hot"], "it takes float"),
        (["--losses.KL.temperature=-1"], "must be a finite number above 0"),
        (["--losses.KL.temperature"], "has no value"),
    ):
        with pytest.raises(UserError, match=message):
            parse(DistillConfig, [*recipe, *flags])


def test_output_dir_takes_names_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_RUN", "seven")
    config = parse(TeacherConfig, ["--output_dir", "runs/$MY_RUN/${MY_RUN}_b"])
    assert config.output_dir == config.resolved["output_dir"] == "runs/seven/seven_b"
    monkeypatch.setenv("HOME", "/somebody")
    assert parse(TeacherConfig, ["--output_dir=~/runs/x"]).output_dir == "/somebody/runs/x"
    with pytest.raises(UserError, match=r"\$NO_RUN is not set"):
        parse(TeacherConfig, ["--output_dir", "runs/$NO_RUN"])


def test_freed_memory_is_kept_on_a_cpu_only(monkeypatch):
    import ctypes

    from kd.train import setup

    calls = []
    library = type("Library", (), {"mallopt": lambda self, *arguments: calls.append(arguments)})()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(setup, "on_cpu", lambda: False)
    setup.keep_freed_memory()
    assert calls == []
    monkeypatch.setattr(setup, "on_cpu", lambda: True)
    setup.keep_freed_memory()
    assert calls == [(-4, 0), (-1, 2**31 - 1)]
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("", ""))
    setup.keep_freed_memory()
    assert len(calls) == 2
