"""Between two lines of its record the loop reads nothing from the device; when it reads changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from kd.train.meter import Meter
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1)

READS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")
ALONE = SimpleNamespace(
    reduce=lambda value, _how: value, gather=lambda value: value, device=torch.device("cpu"), is_main_process=True
)


@pytest.fixture
def reads(monkeypatch):
    """How often each way of reading a tensor was called while `reads.open` was true."""
    counted = SimpleNamespace(open=False, calls=Counter())

    def watched(name, original):
        def read(*arguments, **named):
            counted.calls[name] += counted.open
            return original(*arguments, **named)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return counted


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        (("--precompute", "never", "--optimizer.schedule", "cosine"), set()),
        (("--precompute", "always"), {"cpu"}),  # a table of views is being filled
        (("--precompute", "never", "--data.pad_crop", 1, "--accumulate", 2, "--optimizer.clip_norm", 1.0), set()),
        (("--data.color_jitter", "[0.4,0.4,0.4,0.1]", "--data.mixup", 1.0), set()),
    ],
    ids=["flips", "table", "crops in clipped micro-batches", "mixed"],
)
def test_nothing_is_read_between_two_lines_of_the_record(
    call, teacher_run, tmp_path, monkeypatch, reads, more, allowed
):
    add, flush = Meter.add, Meter.flush

    def added(self, terms, num_images, step, *right):
        add(self, terms, num_images, step, *right)
        reads.open = step % 4 < 2  # of an epoch's four steps: from the first one's backward pass to the third one's
        reads.calls["steps"] += 1

    def flushed(self, *arguments):
        assert not reads.open
        return flush(self, *arguments)

    monkeypatch.setattr(Meter, "add", added)
    monkeypatch.setattr(Meter, "flush", flushed)
    command = ["--config", "recipes/digits/kd.yaml", "--student", "light_nn", "--data.resize", 32]
    command += ["--data.flip", "true", "--data.num_train", 192, "--data.batch_size", 48]
    command += ["--epochs", 2, "--log_every", 100]
    result = call("distill", *command, *more, "--teacher", teacher_run, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert reads.calls.pop("steps") >= 8
    assert set(+reads.calls) == allowed, reads.calls


def test_sums_do_not_depend_on_when_they_are_read():
    torch.manual_seed(0)
    steps = [{"KL": torch.randn(()), "CE": torch.rand(())} for _ in range(40)]
    rows = []
    for every in (1, 7, 100):
        meter = Meter(["KL", "CE"], [], ALONE, {}, 0.1)
        for number, terms in enumerate(steps):
            meter.add(terms, 3 + number % 4, number, {}, 0)
            if number % every == 0:
                state = meter.state()
                meter = Meter(["KL", "CE"], [], ALONE, state, 0.1)
        rows.append(meter.flush(torch.tensor(1.0)))
        del rows[-1]["images_per_second"], rows[-1]["peak_memory_mb"]
    assert rows[0] == rows[1] == rows[2]
    images = [3 + number % 4 for number in range(40)]
    mean = sum(count * terms["KL"].double().item() for count, terms in zip(images, steps, strict=True)) / sum(images)
    assert rows[0]["train/KL"] == pytest.approx(mean, rel=1e-12)
    assert rows[0]["train/loss"] == pytest.approx(rows[0]["train/KL"] + rows[0]["train/CE"], rel=1e-12)


def test_the_first_step_that_is_not_finite_is_named_and_an_empty_part_counts_for_nothing():
    meter = Meter(["CE"], [], ALONE, {}, 0.1)
    for step, (value, images) in enumerate([(1.0, 2), (9.0, 0), (math.inf, 2), (math.nan, 2)]):
        if step == 2:
            assert meter.state()["interval"] == {"CE": [2.0, 2.0], "loss": [2.0, 2.0]}
        meter.add({"CE": torch.tensor(value)}, images, step, {}, 0)
    with pytest.raises(UserError, match="not finite at step 3"):
        meter.check()
