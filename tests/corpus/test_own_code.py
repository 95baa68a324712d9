"""Networks and losses of the user's own: what is odd is taken, what is wrong is one line that says whose it is."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from conftest import assert_one_line
from refusing import _one_thread, losses, out, refused, runs, teacher, train  # noqa: F401 (fixtures)

from kd.models import load_classifier, state_hash

pytestmark = pytest.mark.first_tier(1, every=5)

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, kind="tensor"):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))
        self.kind = kind

    def forward(self, images):
        logits = self.layers(images)
        return {
            "tensor": logits,
            "tuple": (logits, images),
            "none": None,
            "dict": {"logits": logits},
            "other dict": {"scores": logits},
            "object": type("Output", (), {"logits": logits})(),
        }[self.kind]


class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second = nn.Linear(3 * 28 * 28, 3 * 28 * 28), nn.Linear(3 * 28 * 28, 3 * 28 * 28)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3 * 28 * 28, num_classes)

    def forward(self, images):
        return self.head(self.second(self.first(images.flatten(1)).relu()))


class Half(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * 28 * 28, num_classes).bfloat16()

    def forward(self, images):
        return self.head(images.flatten(1).bfloat16())


class NoLayers(nn.Module):
    def __init__(self, num_classes):
        super().__init__()

    def forward(self, images):
        return images.flatten(1)[:, :10]


class NoLinear(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3 * 28 * 28, num_classes))

    def forward(self, images):
        return images.flatten(1) @ self.matrix


class Raises(Net):
    def forward(self, images):
        return self.layers(images) / self.missing


class OnlyInTraining(Net):
    def forward(self, images):
        if self.training:
            raise KeyError("no such thing")
        return self.layers(images)


def number(num_classes):
    return 3


def divides(num_classes):
    return 1 / 0


def leaves(num_classes):
    raise SystemExit(0)
"""

LOSSES = """
import torch
import torch.nn.functional as F

from kd.losses import Loss


class Own(Loss):
    needs_teacher = False

    def __init__(self, kind="scalar", weight: float = 1.0):
        super().__init__(weight)
        self.kind, self.calls = kind, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student, teacher, batch):
        self.calls += 1
        self.seen += 1
        torch.rand(3)
        each = F.cross_entropy(student.logits, batch.labels, reduction="none")
        mean = each.mean()
        if self.kind == "nan later":
            return mean * (float("nan") if self.calls > 1 else 1.0)
        return {
            "scalar": mean, "vector": each, "one": mean[None], "float": mean.item(), "none": None,
            "tuple": (mean, mean), "matrix": student.logits, "int": torch.tensor(3), "detached": mean.detach(),
            "nan": mean * float("nan"), "in place": each.clone().exp_().add_(each).mul_(each).mean(),
        }[self.kind]


class NoForward(Loss):
    needs_teacher = False


class NoInit(Loss):
    needs_teacher = False

    def __init__(self):
        pass

    def forward(self, student, teacher, batch):
        return student.logits.mean()


class NoInitWithModule(NoInit):
    def __init__(self):
        self.layer = torch.nn.Linear(2, 2)


class FewArguments(Loss):
    needs_teacher = False

    def forward(self, student):
        return student.logits.mean()


class Raises(Loss):
    needs_teacher = False

    def __init__(self, weight: float = 1.0):
        super().__init__(weight)
        {}["missing"]
"""

LEARNERS = """
from kd.students import Learner


class InInit(Learner):
    def __init__(self):
        super().__init__()
        {}["missing"]


class NoInit(Learner):
    def __init__(self):
        pass


class InSetup(Learner):
    def setup(self, student, making):
        self.head = making.nothing


class KeepsNothing(Learner):
    networks = {}


class InForward(Learner):
    def forward(self, batch):
        return {}["missing"]


class GivesTuple(Learner):
    def forward(self, batch):
        return ()


class GivesOthers(Learner):
    def forward(self, batch):
        return {"other": super().forward(batch)["student"]}


class InAfterStep(Learner):
    def after_step(self, step):
        {}["missing"]
"""

BROKEN = {
    "syntax": "def f(:\n",
    "raises": "x = 1\nraise RuntimeError('not today')\n",
    "leaves": "import sys\nsys.exit(0)\n",
    "needs": "import a_package_that_is_not_there\n",
}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A folder of modules on the path: own_nets, own_losses, own_learners and the broken ones."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in {"own_nets": NETS, "own_losses": LOSSES, "own_learners": LEARNERS, **BROKEN}.items():
        name = name if name.startswith("own") else f"own_{name}"
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("kind", ["tensor", "dict", "object"])
def test_logits_are_found(train, out, kind):
    result = train("--model", "own_nets.Net", "--model_args", json.dumps({"kind": kind}))
    assert result.status == 0, result.err
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert load_classifier(out, trust=True)(image).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "own_nets.Net", "--model_args", '{"kind": "tuple"}'), ["gives tuple; let it return the logits"]),
        (("--model", "own_nets.Net", "--model_args", '{"kind": "none"}'), ["gives NoneType; let it return the logits"]),
        (
            ("--model", "own_nets.Net", "--model_args", '{"kind": "other dict"}'),
            ["gives dict; let"],
        ),
        (
            ("--model", "own_nets.Net", "--model_args", '{"kind": 7}'),
            ["KeyError: 7", "own_nets.py", "in forward"],
        ),
        (("--model", "own_nets.NoLayers"), ["has no parameter to train"]),
        (("--model", "own_nets.number"), ["gives no torch.nn.Module but int"]),
        (("--model", "own_nets.divides"), ["ZeroDivisionError", "your own code", "own_nets.py, line", "in divides"]),
        (("--model", "own_nets.leaves"), ["SystemExit: 0", "your own code"]),
        (("--model", "own_nets.Raises"), ["AttributeError", "'missing'", "own_nets.py, line", "in forward"]),
        (("--model", "own_nets.OnlyInTraining"), ["a trial on 4 training images failed", "KeyError", "in forward"]),
        (("--model", "own_syntax.Net"), ["cannot import the model", "SyntaxError", "own_syntax.py, line 1"]),
        (("--model", "own_raises.Net"), ["RuntimeError: not today", "your own code", "own_raises.py, line 2"]),
        (("--model", "own_leaves.Net"), ["SystemExit: 0", "your own code", "own_leaves.py, line 2"]),
        (
            ("--model", "own_needs.Net"),
            ["cannot import the model", "a_package_that_is_not_there", "own_needs.py, line 1"],
        ),
        (("--model", ".."), ["'..' is no import path"]),
        (("--model", "math.pi"), ["'math.pi' is of math"]),
        (("--model", "builtins.dict"), ["'builtins.dict' is of builtins"]),
        (("--model", "resnet18", "--model_args", "{groups: x}"), ["resnet18 does not take these arguments"]),
        (("--model", "light_nn", "--model_args", "{dropout: x}"), ["cannot build light_nn: TypeError"]),
    ],
    ids=lambda value: str(value)[:50],
)
def test_network(refused, arguments, words):
    refused(arguments, words)


@pytest.mark.slow
def test_tied_weights_are_kept(train, out):
    result = train("--model", "own_nets.Tied", "--checkpoint_every", 1, "--max_steps", 3)
    assert result.status == 0, result.err
    state = safetensors.torch.load_file(out / "model.safetensors")
    assert torch.equal(state["first.weight"], state["second.weight"])
    network = load_classifier(out, trust=True).network
    assert network.first.weight is network.second.weight
    hashed = state_hash(network)
    (out / "summary.json").unlink()  # killed just before the end: it resumes from a checkpoint
    assert train("--model", "own_nets.Tied", "--checkpoint_every", 1, "--max_steps", 3).status == 0
    assert state_hash(load_classifier(out, trust=True).network) == hashed


@pytest.mark.parametrize("model", ["own_nets.Half", "own_nets.NoLinear"])
def test_odd_networks_are_taken(train, out, model):
    result = train("--model", model)
    assert result.status == 0, result.err
    assert len(state_hash(load_classifier(out, trust=True).network)) == 64


def test_half_precision_has_a_hash_of_its_bytes():
    one, other = torch.nn.Linear(3, 2).bfloat16(), torch.nn.Linear(3, 2).bfloat16()
    assert state_hash(one) != state_hash(other)
    other.load_state_dict(one.state_dict())
    assert state_hash(one) == state_hash(other)


def own_loss(kind: str) -> tuple[str, str]:
    return "--losses", losses(("own_losses.Own", {"kind": kind}))


@pytest.mark.parametrize("kind", ["scalar", "vector", "one"])
def test_a_loss_may_give_a_value_per_image(train, out, kind):
    assert train(*own_loss(kind)).status == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plain = out.parent / "plain"
    assert train("--output_dir", plain).status == 0
    expected = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["train/Own"] == pytest.approx(expected[0]["train/CrossEntropy"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (own_loss("float"), ["losses: Own returns float; let it return a scalar tensor"]),
        (own_loss("none"), ["losses: Own returns NoneType"]),
        (own_loss("tuple"), ["losses: Own returns tuple"]),
        (own_loss("matrix"), ["losses: Own returns a tensor of shape (4, 10)", "one value per image"]),
        (own_loss("int"), ["losses: Own returns a tensor of shape () and torch.int64"]),
        (own_loss("detached"), ["loss of your own", "does not require grad"]),
        (own_loss("in place"), ["loss of your own", "modified by an inplace operation"]),
        (own_loss("nan"), ["losses: Own is nan on the first images, before any step"]),
        (own_loss("missing"), ["KeyError: 'missing'", "own_losses.py, line", "in forward"]),
        (("--losses", "[own_losses.NoForward]"), ["losses: NoForward has no forward"]),
        (("--losses", "[own_losses.NoInit]"), ["losses: __init__ of NoInit does not call super().__init__(weight)"]),
        (
            ("--losses", "[own_losses.NoInitWithModule]"),
            ["before Module.__init__() call", "own_losses.py, line", "in __init__"],
        ),
        (("--losses", "[own_losses.FewArguments]"), ["loss of your own", "positional argument"]),
        (("--losses", "[own_losses.Raises]"), ["KeyError: 'missing', raised by your own code", "in __init__"]),
        (("--losses", "[own_syntax.Loss]"), ["SyntaxError", "own_syntax.py, line 1"]),
        (("--losses", "[own_raises.Loss]"), ["RuntimeError: not today", "own_raises.py, line 2"]),
        (("--losses", "[own_leaves.Loss]"), ["SystemExit: 0", "your own code", "own_leaves.py, line 2"]),
        (("--losses", "[own_needs.Loss]"), ["ModuleNotFoundError: No module named", "own_needs.py, line 1"]),
        (("--losses", "[own_nets.Net]"), ["own_nets.Net does not correspond to a subclass of Loss"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_loss(refused, arguments, words):
    refused(arguments, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_learners.InInit", ["KeyError: 'missing'", "your own code", "own_learners.py, line", "in __init__"]),
        ("own_learners.NoInit", ["learner: __init__ of NoInit does not call super().__init__()"]),
        ("own_learners.InSetup", ["no attribute 'nothing'", "your own code", "own_learners.py, line", "in setup"]),
        ("own_learners.KeepsNothing", ["learner KeepsNothing keeps no network"]),
        ("own_learners.InForward", ["a trial on 4 training images failed: KeyError", "line", "in forward"]),
        ("own_learners.GivesTuple", ["a network or loss of your own: AttributeError: 'tuple' object"]),
        ("own_learners.GivesOthers", ["a network or loss of your own: KeyError: 'student'"]),
        ("own_learners.InAfterStep", ["KeyError: 'missing', raised by your own code", "in after_step"]),
        ("own_syntax.Own", ["SyntaxError", "own_syntax.py, line 1"]),
        ("own_raises.Own", ["RuntimeError: not today", "your own code", "own_raises.py, line 2"]),
        ("own_leaves.Own", ["SystemExit: 0", "your own code", "own_leaves.py, line 2"]),
        (
            "own_needs.Own",
            ["ModuleNotFoundError: No module named 'a_package_that_is_not_there'", "own_needs.py, line 1"],
        ),
        ("own_absent.Own", ["learner: ", "No module named 'own_absent'"]),
    ],
)
def test_learner(refused, name, words):
    refused(("--learner", name), words)


def test_nan_of_one_loss_alone_is_not_a_learning_rate_too_high(refused):
    both = losses(("CrossEntropy", {}), ("own_losses.Own", {"kind": "nan later"}))
    refused(("--losses", both), ["not finite at step 2", "only Own is", "logarithm, root or division"])


def test_the_trial_leaves_everything_as_it_was(train, out, monkeypatch):
    """An own loss counts its calls, keeps a buffer and draws from torch's generator; the network has dropout."""
    arguments = ("--model", "light_nn", "--data.resize", 32, *own_loss("scalar"))
    assert train(*arguments).status == 0
    with_trial = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr("kd.train.trial.try_first_batch", lambda *_: None)
    assert train(*arguments, "--output_dir", out.parent / "without").status == 0
    assert (out.parent / "without" / "model.safetensors").read_bytes() == with_trial


def test_a_failed_trial_takes_no_folder(train, out):
    assert_one_line(train(*own_loss("none")), "returns NoneType")
    assert train().status == 0
