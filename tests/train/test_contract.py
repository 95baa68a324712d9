"""What the contract promises beside our own learners: names, turns, labels that are unknown, values per image."""

from __future__ import annotations

import json
from dataclasses import replace

import children
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learners import AsTeachers, alone
from test_resume import rows
from torch import nn

from kd.data import Split, TrainBatches, Views
from kd.data.store import Store
from kd.losses import KL, CrossEntropy, LogitsMSE, Loss, Term
from kd.models import View, build_classifier, state_hash
from kd.outputs import Batch, Outputs
from kd.students import Learner
from kd.teachers import Teachers
from kd.train.distiller import Distiller

CPU = torch.device("cpu")


class Given(nn.Module):
    """A network whose logits are its parameters."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        self.classes = [str(i) for i in range(logits.shape[1])]

    def tap(self, names):
        assert not list(names)

    def outputs(self, inputs, keys=None):
        return Outputs(self.table)


class PerImage(Loss):
    """The squared distance of each image's logits: a value per image."""

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean(1)


def test_a_loss_may_give_a_value_per_image():
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 3)
    batch = Batch({}, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    teacher = {"teacher": Outputs(other)}
    values = [
        Distiller(alone(Given(one)), [loss], AsTeachers(Given(other)))(batch, teacher)
        for loss in (PerImage(0.5), LogitsMSE(weight=0.5))
    ]
    assert values[0]["PerImage"].item() == pytest.approx(values[1]["LogitsMSE"].item(), rel=1e-6)


def unlabelled_split(count: int = 26) -> Split:
    labels = np.arange(count) % 3
    labels[np.random.default_rng(0).permutation(count)[:11]] = -1
    images = np.random.default_rng(1).integers(0, 256, (count, 1, 2, 2), dtype=np.uint8)
    return Split(Store(images, labels), np.arange(count))


def batches(split: Split, rank: int = 0, world: int = 1, accumulate: int = 1) -> TrainBatches:
    return TrainBatches(split, 8, 3, rank, world, Views(), accumulate)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 2)])
def test_losses_that_read_labels_see_the_labelled_images_and_others_all(world, accumulate):
    """As the loop weighs and averages them, the parts give the mean over the global batch's labelled images."""
    torch.manual_seed(0)
    split = unlabelled_split()
    mine, theirs = torch.randn(2, 26, 3)
    for step in range(4):
        where = batches(split).positions(step)
        known = where[split.labels[where] >= 0]
        labelled = F.cross_entropy(mine[known], torch.from_numpy(split.labels[known])).item() if len(known) else 0.0
        expected = {
            "CrossEntropy": labelled,
            "LogitsMSE": F.mse_loss(mine[where], theirs[where]).item(),
        }
        found = dict.fromkeys(expected, 0.0)
        for rank in range(world):
            source = batches(split, rank, world, accumulate)
            for micro in range(source.num_micro(step)):
                batch, share = source.read(step, CPU, micro)
                distiller = Distiller(
                    alone(Given(mine[batch.index])), [CrossEntropy(), LogitsMSE()], AsTeachers(Given(mine))
                )
                terms = distiller(batch, {"teacher": Outputs(theirs[batch.index])})
                for name, value in terms.items():
                    found[name] += share * value.item() / world
        assert found == pytest.approx(expected, rel=1e-5), step


def test_the_labels_of_unlabelled_images_are_never_read():
    split = unlabelled_split()
    batch, _ = batches(split).read(0, CPU)
    logits = torch.randn(len(batch.labels), 3)
    values = []
    for garbage in (-1, 2, 77):
        labels = torch.where(batch.labels < 0, garbage, batch.labels)
        distiller = Distiller(alone(Given(logits)), [CrossEntropy(), KL()], AsTeachers(Given(logits)))
        terms = distiller(replace(batch, labels=labels), {"teacher": Outputs(logits)})
        sum(terms.values()).backward()
        values.append((*(value.item() for value in terms.values()), distiller.learner.student.table.grad))
    assert values[0][:2] == values[1][:2] == values[2][:2]
    assert torch.equal(values[0][2], values[2][2])
    assert values[0][2][batch.labels < 0].abs().max() < 1e-7  # equal logits: KL moves nothing either


def test_a_batch_without_any_label_still_has_gradients_for_every_parameter():
    batch = Batch({}, torch.full((4,), -1), torch.arange(4), labelled=torch.zeros(0, dtype=torch.int64))
    distiller = Distiller(alone(Given(torch.randn(4, 3))), [CrossEntropy()])
    terms = distiller(batch, {})
    assert terms["CrossEntropy"].item() == 0
    terms["CrossEntropy"].backward()
    assert not distiller.learner.student.table.grad.any()


def test_a_teacher_that_knows_fewer_classes_teaches_these():
    torch.manual_seed(0)
    teacher = build_classifier("resnet8", ["d", "b"], View())
    student = build_classifier("resnet8", list("abcd"), View())
    teachers = Teachers({"teacher": teacher}, student.classes)
    distiller = Distiller(alone(student), [KL(2.0)], teachers).eval()
    index = torch.arange(3)
    batch = Batch({"image": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)}, index, index)
    terms = distiller(batch, teachers(batch))
    from kd.losses.kl import kl_divergence

    with torch.no_grad():
        mine = student.logits(batch.inputs)[:, [1, 3]]
        expected = kl_divergence(mine, teacher.eval().logits(batch.inputs)[:, [1, 0]], 2.0)
    assert terms["KL"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_several_teachers_have_names_and_a_mean():
    torch.manual_seed(0)
    members = {f"teacher{i}": build_classifier("resnet8", list("abc"), View()) for i in (1, 2)}
    teachers = Teachers(members, list("abc"))
    student = build_classifier("resnet8", list("abc"), View())
    losses = [Term(KL(), teacher="teacher?"), KL(4.0)]
    distiller = Distiller(alone(student), losses, teachers).eval()
    index = torch.arange(3)
    batch = Batch({"image": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)}, index, index)
    outputs = teachers(batch)
    assert set(outputs) == {"teacher1", "teacher2", "teacher"}
    terms = distiller(batch, outputs)
    assert list(terms) == ["KL[student<teacher1]", "KL[student<teacher2]", "KL"]
    assert distiller.objective().startswith("1 * KL[student<teacher?](temperature=4.0) + 1 * KL(temperature=4.0)")
    one = Distiller(alone(student), [Term(KL(), teacher="teacher1")], teachers).eval()(batch, outputs)
    (whole,) = one.values()
    assert terms["KL[student<teacher1]"].item() == pytest.approx(whole.item() / 2, rel=1e-6)  # the mean of two


def test_a_teacher_that_no_term_compares_with_is_not_computed(call, teacher_run, tmp_path, monkeypatch):
    computed = []
    forward = Teachers.outputs
    monkeypatch.setattr(Teachers, "outputs", lambda self, inputs: computed.append(1) or forward(self, inputs))
    arguments = ("--student", "mnist_student", "--data.resize", 28, "--data.num_train", 40, "--max_steps", 1)
    arguments = (*arguments, "--report_to", "none", "--teacher", teacher_run, "--output_dir", tmp_path / "run")
    result = call("distill", *arguments, "--losses", '[{"class_path": "CrossEntropy"}]')
    assert result.status == 0, result.err
    assert not computed


class Alternating(Learner):
    """A student, and a critic of its logits that moves every other step: it tells the student's from the labels'."""

    turns = ("critic", "student")
    names = ("student", "critic")

    def setup(self, student, making):
        super().setup(student, making)
        self.critic = nn.Linear(len(student.classes), 2)

    def forward(self, batch):
        outputs = super().forward(batch)
        return {**outputs, "critic": Outputs(self.critic(outputs["student"].logits))}

    def still(self, turn):
        return self.student.parameters() if turn == "critic" else self.critic.parameters()


class IsReal(Loss):
    """Cross entropy of the critic with one class."""

    needs_teacher = False

    def __init__(self, real: int = 1, weight: float = 1.0):
        super().__init__(weight)
        self.real = real

    def forward(self, student, teacher, batch):
        return F.cross_entropy(student.logits, torch.full_like(batch.labels, self.real))


def turned(real: int, turn: str) -> dict:
    loss = {"class_path": "test_contract.IsReal", "init_args": {"real": real}}
    return {"class_path": "Term", "init_args": {"loss": loss, "student": "critic", "turn": turn}}


TURNS = [{"class_path": "CrossEntropy"}, turned(0, "critic"), turned(1, "student")]
TURNS = (f"--losses={json.dumps(TURNS)}", "--learner", "test_contract.Alternating", "--student", "mnist_student")
TURNS = (*TURNS, "--data.resize", 28, "--data.num_train", 100, "--data.batch_size", 24, "--epochs", 2)
TURNS = (*TURNS, "--log_every", 1, "--checkpoint_every", 2, "--report_to", "none", "--output_dir")


@pytest.mark.slow
def test_turns_move_their_own_parameters_and_resume_exactly_on_two_processes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert children.run_several("distill", (*TURNS, whole), 2) == [0, 0]
    for step in (3, 3):
        assert -9 in children.run_several("distill", (*TURNS, cut), 2, ("kd.train.meter.Meter.add", step))
    assert children.run_several("distill", (*TURNS, cut), 2) == [0, 0]
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    steps = [row for row in rows(whole) if "train/loss" in row]
    for row in steps:
        assert ("train/IsReal[critic]" in row) == (row["step"] % 2 == 1)
        assert ("train/IsReal[critic]_2" in row) == (row["step"] % 2 == 0)
    assert {key for row in rows(whole) for key in row if key.startswith("epoch/")} >= {
        "epoch/CrossEntropy",
        "epoch/IsReal[critic]",
        "epoch/IsReal[critic]_2",
    }


def test_in_a_turn_only_its_parameters_move(call, tmp_path):
    from kd.train.checkpoint import load_newest

    seen = {}
    for steps in (1, 2):
        folder = tmp_path / str(steps)
        result = call("distill", *TURNS, folder, "--max_steps", steps)
        assert result.status == 0, result.err
        seen[steps] = load_newest(folder / "checkpoints")[1]["distiller"]
    moved = {name for name, value in seen[1].items() if not torch.equal(value, seen[2][name])}
    assert moved
    assert all(name.startswith("learner.student") for name in moved)


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_turns_are_refused_where_weights_are_shared_out(call, tmp_path, monkeypatch, engine):
    from conftest import assert_one_line

    monkeypatch.setenv(engine, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    if engine == "ACCELERATE_USE_DEEPSPEED":
        monkeypatch.setattr("kd.train.zero.wanted", lambda _: True)
        monkeypatch.setattr("kd.train.zero.check", lambda *_: None)
    assert_one_line(call("distill", *TURNS, tmp_path / "run"), "learner Alternating takes turns", "FSDP2")


def test_frozen_teachers_keep_their_hash_while_a_student_learns_from_them():
    torch.manual_seed(0)
    teachers = Teachers({"teacher": build_classifier("resnet8", list("ab"), View())}, list("ab"))
    student = build_classifier("resnet8", list("ab"), View())
    before = state_hash(teachers)
    distiller = Distiller(alone(student), [KL()], teachers).train()
    teachers.train()
    index = torch.arange(4)
    for _ in range(2):
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        batch = Batch({"image": images}, index % 2, index)
        sum(distiller(batch, teachers(batch)).values()).backward()
    assert state_hash(teachers) == before
    assert not any(p.requires_grad for p in teachers.parameters())
