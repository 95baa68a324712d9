"""What holds for every learner: exact resume, several processes, kept networks, export; and what each one is."""

from __future__ import annotations

import json
from pathlib import Path

import children
import pytest
import torch
from conftest import assert_one_line, interrupted_at
from test_resume import assert_same_run, rows
from test_sharded import ENGINES

import kd
from kd.losses import KL, CrossEntropy, Term
from kd.models import View, build_classifier, state_hash
from kd.outputs import Batch
from kd.students import LEARNERS, Cohort, Exits, Making, MeanTeacher
from kd.train.distiller import Distiller

FEW = ("--data.num_train", 100, "--data.batch_size", 24, "--epochs", 2, "--checkpoint_every", 2, "--log_every", 1)
FEW = (*FEW, "--data.flip", "true", "--report_to", "none", "--optimizer.name", "sgd", "--optimizer.lr", 0.01)


def term(loss: str, student: str = "student", teacher: str = "teacher", **arguments) -> dict:
    inner = {"class_path": loss, "init_args": arguments}
    return {"class_path": "Term", "init_args": {"loss": inner, "student": student, "teacher": teacher}}


# A learner is tested by being listed: its arguments, the student, the terms, and the networks it keeps beside its own.
MAPS = {"student_tap": "map", "teacher_tap": "map"}
HEAD = {"class_path": "FeatureDistance", "init_args": {"student_tap": "projector", "teacher_tap": "stage3"}}
SMALL = ("--student", "resnet8", "--data.resize", 8)
CASES = {
    "Plain": ({}, ("--student", "light_nn", "--data.resize", 32), [{"class_path": "CrossEntropy"}], []),
    "Cohort": (
        {"size": 3, "others": ["light_nn", "resnet8"]},
        ("--student", "light_nn", "--data.resize", 32),
        [term("CrossEntropy", "peer*"), term("KL", "peer*", "peer*"), term("DIST", "peer1", "mean")],
        ["peer2", "peer3"],
    ),
    "Exits": (
        {"taps": ["stage1", "stage2"]},
        SMALL,
        [
            term("CrossEntropy", "*"),
            term("KL", "exit*", "student"),
            term("FeatureDistance", "exit*", "student", **MAPS),
        ],
        ["exit1", "exit2"],
    ),
    "MeanTeacher": (
        {"decay": 0.9},
        SMALL,
        [{"class_path": "CrossEntropy"}, term("KL", "student", "mean")],
        ["mean"],
    ),
    "ReusedHead": ({}, SMALL, [HEAD, {"class_path": "CrossEntropy"}], []),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A finished resnet14 of a few steps, for the learners that need a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    few = ("--model", "resnet14", "--data.resize", 8, *FEW, "--output_dir", folder)
    assert children.run("train_teacher", few) == 0
    return folder


@pytest.fixture
def command(teacher):
    """The arguments of distill.py for a learner."""

    def of(name: str) -> tuple:
        arguments, student, losses, _ = CASES[name]
        learner = {"class_path": name, "init_args": arguments}
        given = ("--teacher", teacher) if name == "ReusedHead" else ()
        terms = (f"--learner={json.dumps(learner)}", f"--losses={json.dumps(losses)}", "--output_dir")
        return (*FEW, *student, *given, *terms)

    return of


def folders(run: Path, name: str) -> list[Path]:
    return [run, *(run / kept for kept in CASES[name][3])]


def test_every_learner_is_listed():
    assert CASES.keys() == LEARNERS.keys()


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("name", CASES)
def test_every_learner_resumes_exactly_and_its_networks_are_kept(call, command, tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("distill", *command(name), whole).status == 0
    with interrupted_at(4, 9):
        assert call("distill", *command(name), cut).status == 130
        assert call("distill", *command(name), cut).status == 130
    assert call("distill", *command(name), cut).status == 0
    assert_same_run(cut, whole)
    for one, other in zip(folders(cut, name), folders(whole, name), strict=True):
        for file in ("model.safetensors", "config.json"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
        assert summaries[0]["best"] == summaries[1]["best"]
        logits = kd.load(one)(torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8))
        assert logits.shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_survives_kills_on_two_processes(command, tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert children.run_several("distill", (*command(name), whole), 2) == [0, 0]
    for step in (4, 3):
        assert -9 in children.run_several("distill", (*command(name), cut), 2, ("kd.train.meter.Meter.add", step))
    assert children.run_several("distill", (*command(name), cut), 2) == [0, 0]
    for one, other in zip(folders(cut, name), folders(whole, name), strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_takes_the_same_first_step_on_two_processes(command, tmp_path, name):
    """Batch norm is local, so networks that have it differ in training; all are in eval mode here."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = (*command(name)[:-1], "--max_steps", 1, "--student", "light_nn", "--data.resize", 32, "--output_dir")
    if name in ("Exits", "ReusedHead"):
        pytest.skip("its heads have batch norm, which sees each process's own images")
    if name == "Cohort":
        arguments = (*arguments[:-1], "--learner.others", "[light_nn, light_nn]", "--output_dir")
    assert children.run("distill", (*arguments, one)) == 0
    assert children.run_several("distill", (*arguments, two), 2) == [0, 0]
    for row, same in zip(rows(one)[:1], rows(two)[:1], strict=True):
        assert {k: v for k, v in same.items() if k != "gradient_norm"} == {
            k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in row.items() if k != "gradient_norm"
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_is_sharded_by_fsdp2_and_resumes_exactly(command, tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments, fsdp2 = (*command(name)[:-1], "--max_steps", 4, "--output_dir"), ENGINES["fsdp2"]
    assert children.run_several("distill", (*arguments, whole), 2, environment=fsdp2) == [0, 0]
    stop = ("kd.train.meter.Meter.add:SIGTERM", 3)
    assert children.run_several("distill", (*arguments, cut), 2, stop, fsdp2) == [143, 143]
    assert children.run_several("distill", (*arguments, cut), 2, environment=fsdp2) == [0, 0]
    for one, other in zip(folders(cut, name), folders(whole, name), strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        assert kd.load(one)(torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_kept_network_is_evaluated_and_exported(call, command, tmp_path, name):
    run = tmp_path / "run"
    assert call("distill", *command(name), run).status == 0
    kept = folders(run, name)
    assert call("evaluate", *kept, "--latency", "false", "--json", tmp_path / "r.json").status == 0
    for row, folder in zip(json.loads((tmp_path / "r.json").read_text())["runs"], kept, strict=True):
        assert row["top1"] == pytest.approx(json.loads((folder / "summary.json").read_text())["test_accuracy"])
    from kd.tools.export.command import main

    assert main([str(kept[-1]), "--to", "torch", "--out", str(tmp_path / "x.pt2")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_is_one_compiled_graph(name):
    learner, losses = small(name)
    distiller = Distiller(learner, losses, image_shape=(3, 8, 8)).train()
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(distiller, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    index = torch.arange(4)
    batch = Batch({"image": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)}, index, index, index + 9)
    plain = {key: value.item() for key, value in distiller(batch, {}).items()}
    given = compiled(batch, {})
    assert len(graphs) == 1
    for key, value in plain.items():
        assert given[key].item() == pytest.approx(value, rel=1e-4, abs=1e-6)


def classifier(name: str = "resnet8", seed: int = 0):
    torch.manual_seed(seed)
    return build_classifier(name, list("abcd"), View(mean=(0.5,) * 3, std=(0.25,) * 3))


def set_up(learner, name: str = "resnet8", size: int = 8):
    learner.setup(
        classifier(name), Making(lambda other, _args, number: classifier(other, number), None, (3, size, size))
    )
    return learner


def small(name: str):
    """A learner of resnet8 set up for images of 8x8, and losses that join all of its outputs."""
    ce = CrossEntropy()
    if name == "Cohort":
        return set_up(Cohort(2)), [Term(ce, "peer*"), Term(KL(), "peer*", "peer*")]
    if name == "Exits":
        return set_up(Exits(["stage1", "stage2"])), [Term(ce, "*"), Term(KL(), "exit*", "student")]
    if name == "MeanTeacher":
        return set_up(MeanTeacher(0.5)), [ce, Term(KL(), "student", "mean")]
    if name == "ReusedHead":
        from kd.teachers import Teachers

        learner, teachers = LEARNERS[name](), Teachers({"teacher": classifier("resnet14")}, list("abcd"))
        learner.setup(classifier(), Making(None, teachers, (3, 8, 8)))
        return learner, [ce]
    return set_up(LEARNERS[name]()), [ce]


def batch_of(count: int = 6, size: int = 8) -> Batch:
    index = torch.arange(count)
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(5))
    return Batch({"image": images.to(torch.uint8)}, index % 4, index, index + 100)


# What each is


@pytest.mark.first_tier(1)
@pytest.mark.parametrize(
    "learner",
    [{"class_path": "Cohort", "init_args": {"size": 1}}, {"class_path": "MeanTeacher"}, {"class_path": "Plain"}],
    ids=lambda learner: learner["class_path"],
)
def test_a_learner_of_one_trained_network_is_the_plain_run(call, tmp_path, learner):
    """To the byte: a cohort of one, and a mean that teaches nothing."""
    arguments = (*FEW, "--student", "light_nn", "--data.resize", 32)
    losses = [term("CrossEntropy", "*")]
    alone = call("distill", *arguments, "--losses", '[{"class_path": "CrossEntropy"}]', "--output_dir", tmp_path / "a")
    assert alone.status == 0, alone.err
    rest = (f"--learner={json.dumps(learner)}", f"--losses={json.dumps(losses)}", "--output_dir", tmp_path / "b")
    assert call("distill", *arguments, *rest).status == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_peers_teach_and_are_not_changed_by_whom_they_teach():
    learner = set_up(Cohort(2))
    distiller = Distiller(learner, [Term(CrossEntropy(), "peer*"), Term(KL(1.0), "peer1", "peer2")])
    distiller(batch_of(), {})["KL[peer1<peer2]"].backward()
    assert all(p.grad is not None for p in learner.peers[0].parameters())
    assert all(p.grad is None for p in learner.peers[1].parameters())


def test_the_terms_of_a_cohort_are_the_papers_formula():
    torch.manual_seed(0)
    learner = set_up(Cohort(3))
    distiller = Distiller(learner, [Term(CrossEntropy(), "peer*"), Term(KL(1.0), "peer*", "peer*")]).double().eval()
    batch = batch_of()
    terms = distiller(batch, {})
    logits = [peer.logits(batch.inputs).double().log_softmax(1) for peer in learner.peers]
    for k, mine in enumerate(logits):
        expected = 0.0
        for other in (other for place, other in enumerate(logits) if place != k):
            for i in range(6):
                for c in range(4):
                    expected += other[i, c].exp() * (other[i, c] - mine[i, c]) / 6 / 2
        found = sum(value for name, value in terms.items() if name.startswith(f"KL[peer{k + 1}<"))
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_peers_of_equal_weights_and_dropout_stay_equal():
    learner = set_up(Cohort(2), "light_nn", 32)
    learner.peers[1].load_state_dict(learner.peers[0].state_dict())
    distiller = Distiller(learner.eval(), [Term(CrossEntropy(), "peer*"), Term(KL(1.0), "peer*", "peer*")])
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for _ in range(3):
        terms = distiller(batch_of(size=32), {})
        assert terms["KL[peer1<peer2]"].item() == pytest.approx(0, abs=1e-7)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert state_hash(learner.peers[0]) == state_hash(learner.peers[1])


def test_members_have_first_weights_and_dropout_of_their_own():
    learner = set_up(Cohort(2), "light_nn", 32).train()
    assert state_hash(learner.peers[0]) != state_hash(learner.peers[1])
    learner.peers[1].load_state_dict(learner.peers[0].state_dict())
    outputs = learner(batch_of(size=32))
    assert not torch.equal(outputs["peer1"].logits, outputs["peer2"].logits)


def test_the_mean_of_the_past_is_the_papers_formula():
    learner = set_up(MeanTeacher(0.6))
    expected = None
    for step in range(6):
        with torch.no_grad():
            for parameter in learner.student.network.parameters():
                parameter.add_(torch.randn(parameter.shape))
            learner.student.network.stem[1].num_batches_tracked += 1
            learner.after_step(step)
        decay = min(0.6, 1 - 1 / (step + 1))
        current = {k: v.double() for k, v in learner.student.network.state_dict().items()}
        before = expected or current
        expected = {k: decay * before[k] + (1 - decay) * v if "tracked" not in k else v for k, v in current.items()}
        for name, value in learner.mean.network.state_dict().items():
            assert torch.allclose(value.double(), expected[name], atol=1e-5), name
    assert not any(p.requires_grad for p in learner.mean.parameters())
    assert not learner.train().mean.network.training


def test_exits_are_networks_of_their_own_and_share_the_students_weights():
    learner = set_up(Exits(["stage1", "stage2"])).eval()
    batch = batch_of()
    with torch.no_grad():
        outputs = learner(batch)
        for name, network in learner.networks.items():
            assert torch.allclose(network.eval().logits(batch.inputs), outputs[name].logits, atol=1e-5), name
            twin = network.twin()
            twin.network.load_state_dict(network.network.state_dict())
            assert torch.allclose(twin.eval().logits(batch.inputs), outputs[name].logits, atol=1e-5)
    maps = {name: tuple(part.features["map"].shape) for name, part in outputs.items()}
    assert set(maps.values()) == {(6, 64, 2, 2)}
    names = [name for name, _ in learner.named_parameters()]
    assert len(names) == len(set(names)) == len(list(learner.parameters()))


@pytest.mark.first_tier(4)
@pytest.mark.parametrize(
    ("learner", "losses", "words"),
    [
        ("Cohrt", None, ["Cohrt", "Cohort"]),
        ({"class_path": "Cohort", "init_args": {"size": 0}}, None, ["Cohort: size 0 must be 1 or more"]),
        (
            {"class_path": "Cohort", "init_args": {"others": ["a", "b"]}},
            None,
            ["others names 2 networks", "must name 1"],
        ),
        ({"class_path": "Cohort", "init_args": {"others": ["resnet9"]}}, None, ["unknown model 'resnet9'", "resnet8"]),
        ({"class_path": "Cohort"}, [term("CrossEntropy", "peer1")], ["no term of losses trains peer2"]),
        ({"class_path": "Cohort"}, [term("CrossEntropy", "per*")], ["unknown student of CrossEntropy 'per*'", "peer1"]),
        (
            {"class_path": "Cohort"},
            [term("KL", "peer*", "per*")],
            ["unknown teacher of KL 'per*'", "mean, peer1, peer2"],
        ),
        ({"class_path": "Cohort"}, [term("KL", "peer*")], ["teacher is not given", "KL"]),
        ({"class_path": "Cohort"}, [{"class_path": "CrossEntropy"}], ["unknown student of CrossEntropy 'student'"]),
        ({"class_path": "MeanTeacher", "init_args": {"decay": 1}}, None, ["MeanTeacher: decay 1", "[0, 1)"]),
        ({"class_path": "MeanTeacher"}, [term("CrossEntropy", "mean")], ["unknown student of CrossEntropy 'mean'"]),
        ({"class_path": "Exits", "init_args": {"taps": []}}, None, ["Exits: taps is empty"]),
        ({"class_path": "Exits", "init_args": {"taps": ["stag1"]}}, None, ["unknown tap of resnet8 'stag1'", "stage1"]),
        ({"class_path": "Exits", "init_args": {"taps": ["pool"]}}, None, ["tap 'pool' of resnet8 gives 64", "map"]),
    ],
)
def test_what_does_not_fit_ends_in_one_line(call, tmp_path, learner, losses, words):
    learner = learner if isinstance(learner, str) else json.dumps(learner)
    losses = json.dumps(losses or [term("CrossEntropy", "*")])
    arguments = (*FEW, *SMALL, f"--learner={learner}", f"--losses={losses}", "--output_dir", tmp_path / "run")
    assert_one_line(call("distill", *arguments), *words)
    assert not (tmp_path / "run" / "config.yaml").exists()
