"""Checkpoints hold what is trained: frozen weights are written once beside them, and resume stays exact."""

from __future__ import annotations

from pathlib import Path

import children
import pytest
import safetensors.torch
import torch
from conftest import SMALL
from test_resume import assert_same_run
from test_sharded import ENGINES, SHARDED
from torch import nn

from kd.train.checkpoint import FROZEN, Progress, checkpoints, frozen_tensors, load_newest, save_checkpoint

KILL = "kd.train.meter.Meter.add"


class HalfFrozen(nn.Module):
    """A network of the user's own, whose first layer keeps the random weights that it begins with."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.head = nn.Linear(3 * 28 * 28, 256), nn.Linear(256, num_classes)
        self.body.requires_grad_(False)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())


def cases(teacher: Path) -> dict[str, tuple]:
    """Script, arguments, and the start of the names of what must not stand in each checkpoint."""
    weights = ("--weights", teacher / "model.safetensors", "--freeze_backbone", "true")
    mnist = ("--model", "mnist_teacher", "--data.resize", 28)
    frozen = "learner.student.network.features."
    return {
        "weights": ("train_teacher", (*mnist, *weights), frozen),
        "never_tabled": ("train_teacher", (*mnist, *weights, "--precompute", "never", "--data.flip", "true"), frozen),
        "init_from": ("train_teacher", (*mnist, "--init_from", teacher, "--freeze_backbone", "true"), frozen),
        "seed": ("train_teacher", ("--model", f"{__name__}.HalfFrozen"), "learner.student.network.body."),
        "mean_teacher": ("train_teacher", (*mnist, *weights, "--learner", "MeanTeacher"), frozen),
    }


CASES = tuple(cases(Path()))


@pytest.fixture
def command(teacher_run):
    """The script and arguments of a case, and what it does not train."""

    def of(name: str):
        script, arguments, frozen = cases(teacher_run)[name]
        more = ("--select", "best", "--checkpoint_every", 1, "--report_to", "none", "--output_dir")
        return script, (*SMALL, "--data.resize", 28, *arguments, *more), frozen

    return of


def held(run: Path) -> list[dict]:
    """The tensors of the newest checkpoint's files of networks."""
    newest = checkpoints(run / "checkpoints")[0]
    return [safetensors.torch.load_file(newest / f"{stem}.safetensors") for stem in ("distiller", "best")]


@pytest.mark.parametrize("name", ["weights", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])])
def test_frozen_weights_are_written_once_and_the_run_resumes_exactly(command, tmp_path, name):
    script, arguments, frozen = command(name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert children.run(script, (*arguments, whole)) == 0
    trained, best = held(whole)
    assert trained
    assert not [key for key in trained if key.startswith(frozen)]
    assert not [key for key in best if key.startswith(frozen.replace("learner.student.network", "student"))]
    once = whole / "checkpoints" / FROZEN
    assert safetensors.torch.load_file(once)
    full = load_newest(whole / "checkpoints")[1]
    assert [key for key in full["distiller"] if key.startswith(frozen)]
    for number, moment in enumerate((3, 2, 4)):
        assert children.run(script, (*arguments, cut), sabotage=(KILL, moment)) == -9
        if number == 1:
            (cut / "checkpoints" / FROZEN).unlink()  # what the run begins with serves, and the file is written again
    assert children.run(script, (*arguments, cut)) == 0
    assert_same_run(cut, whole)
    assert (cut / "checkpoints" / FROZEN).read_bytes() == once.read_bytes()
    for one, other in zip(held(cut), held(whole), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_frozen_weights_are_written_once_where_weights_are_shared_out(command, tmp_path, engine):
    script, arguments, frozen = command("never_tabled")
    for name, sabotage in (("whole", None), ("cut", (f"{KILL}:SIGTERM", 3)), ("cut", None)):
        statuses = children.run_several(script, (*arguments, tmp_path / name), 2, sabotage, ENGINES[engine])
        assert statuses == ([0, 0] if sabotage is None else [143, 143])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert not [key for key in held(tmp_path / "cut")[0] if key.startswith(frozen)]


@pytest.fixture
def saved(tmp_path):
    """A folder with a checkpoint of a network whose last layer alone was trained, and its tensors."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frozen = frozen_tensors(module)
    save_checkpoint(tmp_path, Progress(step=1), {"distiller": state, "optimizer": {}}, frozen)
    return tmp_path, state, frozen


def test_a_resumed_run_has_the_frozen_weights_that_it_began_with_though_they_are_others_now(saved):
    folder, state, _ = saved
    _, tensors = load_newest(folder, frozen_tensors(nn.Sequential(nn.Linear(3, 4).requires_grad_(False))))
    assert tensors["distiller"].keys() == state.keys()
    assert all(torch.equal(tensors["distiller"][name], state[name]) for name in state)


@pytest.mark.parametrize("damage", ["content", "header", "absent"])
def test_damaged_frozen_weights_are_those_of_the_start_or_the_checkpoint_is_damaged(saved, capsys, damage):
    folder, state, frozen = saved
    content = bytearray((folder / FROZEN).read_bytes())
    content[-1 if damage == "content" else 0] ^= 1
    (folder / FROZEN).write_bytes(content)
    if damage == "absent":
        (folder / FROZEN).unlink()
    _, tensors = load_newest(folder, frozen)
    assert all(torch.equal(tensors["distiller"][name], state[name]) for name in state)
    assert load_newest(folder) is None
    assert f"{FROZEN} does not hold its 0." in capsys.readouterr().out


def test_a_frozen_weight_that_something_else_moved_stands_in_the_checkpoint(saved):
    """An average of the past is written without gradients."""
    folder, state, frozen = saved
    moved = {**state, "0.weight": state["0.weight"] + 1}
    save_checkpoint(folder, Progress(step=2), {"distiller": moved, "optimizer": {}}, frozen)
    assert set(safetensors.torch.load_file(folder / "step_00000002/distiller.safetensors")) == {
        "0.weight",
        "1.bias",
        "1.weight",
    }
    assert torch.equal(load_newest(folder)[1]["distiller"]["0.weight"], moved["0.weight"])


def test_where_all_is_trained_nothing_is_written_beside_the_checkpoint(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert frozen_tensors(module) == {}
    save_checkpoint(tmp_path, Progress(step=1), {"distiller": module.state_dict(), "optimizer": {}}, ())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 1), (3, 3)])
def test_a_finished_run_keeps_as_many_checkpoints_as_it_is_told(call, tmp_path, keep, left):
    arguments = (*SMALL, "--checkpoint_every", 1, "--keep_checkpoints", keep, "--output_dir", tmp_path / "run")
    assert call("train_teacher", *arguments).status == 0
    steps = [int(path.name[5:]) for path in checkpoints(tmp_path / "run/checkpoints")]
    assert steps == list(range(8, 8 - left, -1))
    assert (tmp_path / "run/checkpoints").exists() == bool(left)
    again = call("train_teacher", *arguments)
    assert again.status == 0
    assert "is finished already" in again.out
    assert call("train_teacher", *arguments, "--overwrite").status == 0


def test_without_checkpoints_what_the_user_put_beside_them_stays(call, tmp_path):
    arguments = (*SMALL, "--keep_checkpoints", 0, "--output_dir", tmp_path / "run", "--max_steps", 1)
    (tmp_path / "run").mkdir()
    assert call("train_teacher", *arguments).status == 0
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/mine.txt").write_text("x")
    assert call("train_teacher", *arguments, "--overwrite").status == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["mine.txt"]
