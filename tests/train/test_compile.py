"""The compiled step: one graph a size of batch, the same terms, the same bytes after a restart, the same names."""

from __future__ import annotations

from types import SimpleNamespace

import children
import pytest
import safetensors.torch
import torch
from conftest import UNEVEN, assert_one_line
from learners import alone
from test_resume import rows

from kd.losses import CTKD, DKD, KL, CosineEmbedding, CrossEntropy, FitNet, Setting
from kd.models import View, build_classifier
from kd.outputs import Batch
from kd.teachers import Teachers
from kd.train.distiller import Distiller
from kd.train.setup import compile_step

CLASSES = [str(i) for i in range(10)]


def features():
    cosine = CosineEmbedding(student_tap="features.5", teacher_tap="features.2")
    return [FitNet(student_tap="features.3", teacher_tap="features.4"), cosine, CrossEntropy()]


@pytest.fixture
def settings():
    changed = [(torch.compiler.config, "recompile_limit"), (torch.compiler.config, "dynamic_sources")]
    before = [(owner, name, getattr(owner, name)) for owner, name in changed]
    torch._dynamo.reset()
    yield SimpleNamespace(compile=True, deterministic=False)
    for owner, name, value in before:
        setattr(owner, name, value)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "losses", [lambda: [KL(), CrossEntropy()], features, lambda: [CTKD(), DKD()]], ids=["usual", "features", "epoch"]
)
@pytest.mark.parametrize("half", [False, True])
def test_each_size_of_batch_is_one_whole_graph_at_every_epoch(settings, losses, half):
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    torch.manual_seed(0)
    teachers = Teachers({"teacher": build_classifier("light_nn", CLASSES, View())}, CLASSES)
    shape, setting = (3, 32, 32), Setting(labels=torch.zeros(16, dtype=torch.int64))
    students = (alone(build_classifier("light_nn", CLASSES, View())) for _ in "12")
    step, plain = (Distiller(student, losses(), teachers, shape, setting).train() for student in students)
    plain.load_state_dict(step.state_dict())
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_fsdp2=False)
    compile_step(step, settings, accelerator, backend)
    torch._dynamo.utils.counters.clear()
    for epoch in range(12):
        for size in (16, 6):
            index = torch.arange(size)
            images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
            batch = Batch({"image": images}, index % 10, index, index * 77 + epoch, epoch, step=2 * epoch + size)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                given = teachers(batch)
                terms, wanted = step(batch, given), plain(batch, given)
            for name, value in wanted.items():
                assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), (epoch, name)
            for each, module in ((terms, step), (wanted, plain)):
                module.zero_grad()
                sum(each.values()).backward()
            for parameter, same in zip(step.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(parameter.grad, same.grad, rtol=1e-4, atol=1e-5), epoch
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(compiled) == 2
    assert not any("_orig_mod" in name for name in step.state_dict())


def test_without_a_compiler_the_error_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    result = call("train_teacher", *UNEVEN, "--compile", "true", "--output_dir", tmp_path / "run")
    assert_one_line(result, "compile true", "no-such-compiler", "g++", "set compile to false")
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Children share what they have compiled."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_compiled_run_is_resumed_exactly_and_rounds_only(tmp_path, environment):
    run = (*UNEVEN, "--report_to", "none", "--optimizer.name", "sgd", "--checkpoint_every", 3, "--output_dir")
    true = ("--compile", "true")
    assert children.run("train_teacher", (*run, tmp_path / "eager")) == 0
    assert children.run("train_teacher", (*run, tmp_path / "whole", *true), environment) == 0
    again = (*run, tmp_path / "cut", *true)
    assert children.run("train_teacher", again, environment, ("kd.train.meter.Meter.add", 8)) == -9
    assert children.run("train_teacher", again, environment) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    for row, same in zip(rows(tmp_path / "eager"), rows(tmp_path / "whole"), strict=True):
        assert same == {key: pytest.approx(value, rel=1e-3) for key, value in row.items()}
    names = [
        set(safetensors.torch.load_file(next((tmp_path / name / "checkpoints").glob("*/distiller.safetensors"))))
        for name in ("eager", "whole")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_processes_compile_the_step_of_one(tmp_path, environment):
    run = (*UNEVEN, "--report_to", "none", "--optimizer.name", "sgd", "--epochs", 1, "--compile", "true")
    assert children.run("train_teacher", (*run, "--output_dir", tmp_path / "one"), environment) == 0
    two = (*run, "--output_dir", tmp_path / "two")
    assert children.run_several("train_teacher", two, 2, environment=environment) == [0, 0]
    for one, both in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert both == {key: pytest.approx(value, rel=1e-3) for key, value in one.items()}
