"""Tables of what a frozen network gives for views: filled as views come up, never wrong, equal to computing each."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from test_precompute import TAPS, assert_close, distil  # noqa: F401 (a fixture)
from test_resume import rows

from kd import keyed
from kd.data.views import Views
from kd.teachers.tables import ViewTable

SHAPES = {"logits": (3,), "map": (2, 4, 4)}
ROUNDING = 2**-11  # of float16, relative


class Network:
    """Stands in for a frozen network: gives something else for each image, and counts the images it was given."""

    def __init__(self, scale: float = 1.0):
        self.computed, self.scale = 0, scale

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = inputs["image"]
        self.computed += len(images)
        mean = images.float().mean((1, 2, 3))[:, None] * self.scale
        return {"logits": mean * torch.tensor([1.0, -0.37, 0.011]), "map": mean[:, :, None, None].expand(-1, 2, 4, 4)}


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8))


def shown(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a batch."""
    return {"image": images}


def lookup(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs)


def test_what_was_computed_is_found_and_rounded_alike(tmp_path):
    network, images = Network(), pictures(4)
    where = lookup((0, 0), (5, 1), (2, 2), (5, 2))
    first = ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)
    again = ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)  # opened again
    assert network.computed == 4
    for name, exact in Network()(shown(images)).items():
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name], exact.half().float())
        assert torch.equal(first[name], again[name])
        assert ((first[name] - exact).abs() <= ROUNDING * exact.abs()).all()


def test_only_what_is_missing_is_computed(tmp_path):
    network, images = Network(), pictures(4)
    table = ViewTable(tmp_path / "t", SHAPES, 6, 3)
    table.look(lookup((1, 0), (3, 2)), shown(images[:2]), network)
    values = table.look(lookup((0, 0), (1, 0), (3, 1), (3, 2)), shown(images[[2, 0, 3, 1]]), network)
    assert network.computed == 4
    assert torch.equal(values["logits"], Network()(shown(images[[2, 0, 3, 1]]))["logits"].half().float())
    assert table.filled(np.arange(6)) == pytest.approx(4 / 18)


def test_what_has_no_number_is_computed_exactly_and_not_kept(tmp_path):
    table, images = ViewTable(tmp_path / "t", SHAPES, 6, 3), pictures(2)
    assert torch.equal(table.look(None, shown(images), Network())["logits"], Network()(shown(images))["logits"])
    assert table.filled(np.arange(6)) == 0


def test_what_float16_cannot_hold_is_computed_each_time_and_not_rounded(tmp_path):
    table, images, network = ViewTable(tmp_path / "t", SHAPES, 6, 3), pictures(2), Network(scale=1e4)
    images[1] = 0
    for computed in (2, 3):
        values = table.look(lookup((0, 0), (1, 1)), shown(images), network)
        assert torch.equal(values["logits"], Network(scale=1e4)(shown(images))["logits"])
        assert network.computed == computed


@pytest.mark.parametrize("kind", ["bit", "half", "mark", "moved", "zero"])
def test_a_record_that_is_not_whole_is_computed_again(tmp_path, monkeypatch, kind):
    table, images, where = ViewTable(tmp_path / "t", SHAPES, 6, 3), pictures(2), lookup((0, 0), (1, 1))
    network, write = Network(), os.pwrite
    if kind == "half":  # as after a crash in the middle of writing
        monkeypatch.setattr(os, "pwrite", lambda file, content, at: write(file, content[: len(content) // 2], at))
    expected = table.look(where, shown(images), network)
    monkeypatch.undo()
    size = table._type.itemsize
    content = bytearray((tmp_path / "t" / "rows.bin").read_bytes())
    if kind == "bit":
        content[20] ^= 4
        content[4 * size + 20] ^= 4
    elif kind == "mark":
        content[0] ^= 1
        content[4 * size] ^= 1
    elif kind == "moved":
        content[:size], content[4 * size : 5 * size] = content[4 * size : 5 * size], content[:size]
    elif kind == "zero":  # a page that never reached the disk, but for the mark
        content[4:size] = content[4 * size + 4 : 5 * size] = bytes(size - 4)
    (tmp_path / "t" / "rows.bin").write_bytes(content)
    values = ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)
    assert network.computed == 4
    for name, value in values.items():
        assert torch.equal(value, expected[name])
    ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)
    assert network.computed == 4  # repaired


@pytest.mark.parametrize("name", ["meta.json", "rows.bin"])
def test_a_damaged_or_foreign_table_is_refused_and_rebuilt(tmp_path, capsys, name):
    where, images, network = lookup((0, 0)), pictures(1), Network()
    ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)
    file = tmp_path / "t" / name
    file.write_bytes(file.read_bytes()[:-5])
    ViewTable(tmp_path / "t", SHAPES, 6, 3).look(where, shown(images), network)
    assert "is damaged" in capsys.readouterr().out
    assert network.computed == 2
    ViewTable(tmp_path / "t", {"logits": (3,)}, 6, 3)
    assert "is damaged (meta.json is not that of this table)" in capsys.readouterr().out


def test_a_full_disk_costs_the_table_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    table, images, network = ViewTable(tmp_path / "t", SHAPES, 6, 3), pictures(2), Network()
    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        values = table.look(lookup((0, 0), (1, 1)), shown(images), network)
        assert torch.equal(values["logits"], Network()(shown(images))["logits"].half().float())
    assert network.computed == 4
    assert capsys.readouterr().out.count("the disk is full") == 1


def test_the_share_that_is_filled_is_counted_by_its_marks(tmp_path):
    table, images = ViewTable(tmp_path / "t", SHAPES, 6, 3), pictures(4)
    assert table.filled(np.arange(6)) == 0
    table.look(lookup((0, 0), (0, 2), (2, 2), (5, 1)), shown(images), Network())
    assert table.filled(np.arange(6)) == 4 / 18
    assert table.filled(np.array([0, 2])) == 3 / 6
    assert table.filled(np.array([1, 3])) == 0


def test_an_empty_table_takes_no_space(tmp_path):
    ViewTable(tmp_path / "t", SHAPES, 100_000, 162)
    assert (tmp_path / "t" / "rows.bin").stat().st_size > 1e9
    assert (tmp_path / "t" / "rows.bin").stat().st_blocks < 100


def _fill(folder: str, seed: int, ready) -> None:
    """Child process: look all rows up in an order of its own, and check each answer."""
    ready.wait()
    images = pictures(300)
    expected = {name: value.half().float() for name, value in Network()(shown(images)).items()}
    table = ViewTable(Path(folder), SHAPES, 100, 3)
    for part in keyed.permutation(seed, 300).split(16):
        values = table.look(torch.stack([part // 3, part % 3], 1), shown(images[part]), Network())
        assert all(torch.equal(values[name], expected[name][part]) for name in values)


@pytest.mark.slow
def test_several_processes_fill_one_table(tmp_path):
    ready = children.CONTEXT.Barrier(3)
    each = [children.CONTEXT.Process(target=_fill, args=(str(tmp_path / "t"), seed, ready)) for seed in range(3)]
    for process in each:
        process.start()
    assert children.finish(*each) == [0, 0, 0]
    assert ViewTable(tmp_path / "t", SHAPES, 100, 3).filled(np.arange(100)) == 1


# Numbers of views


@pytest.mark.parametrize("views", [Views(), Views(flip=True), Views(pad_crop=1), Views(flip=True, pad_crop=2)])
def test_a_views_number_tells_its_pixels(views):
    image = pictures(1)
    seen: dict[int, torch.Tensor] = {}
    for epoch in range(40):
        keys, numbers = views.draw(3, epoch, torch.arange(50))
        shown = views.apply(image.expand(50, -1, -1, -1), keys)
        for number, view in zip(numbers.tolist(), shown, strict=True):
            assert torch.equal(seen.setdefault(number, view), view)
    assert sorted(seen) == list(range(views.count))
    assert len({view.numpy().tobytes() for view in seen.values()}) == views.count


def test_the_expected_number_of_views_is_that_of_a_count():
    views, epochs = Views(flip=True, pad_crop=1), 20
    numbers = torch.stack([views.draw(0, epoch, torch.arange(400))[1] for epoch in range(epochs)])
    counted = np.mean([len(set(column.tolist())) for column in numbers.T])
    assert views.expected_new(epochs) == pytest.approx(counted, rel=0.02)


# Runs

VIEWS = ("--data.flip", "true", "--data.pad_crop", 1, "--optimizer.name", "sgd", "--precompute", "always")


def share(result) -> int:
    """How much of its table a run found filled, in percent."""
    return int(result.out.split(" when full, ")[1].split("%")[0])


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("losses", ["[KL, CrossEntropy]", TAPS])
def test_a_run_with_a_table_is_the_run_without(distil, tmp_path, losses):  # noqa: F811
    command = (*VIEWS, "--losses", losses, "--seed", 21)
    live, made = distil("live", *command, "--precompute", "never")
    assert "teacher: computed at each step" in live.out
    assert not made
    table, made = distil("table", *command)
    assert "teacher: computed once for each view (18 views of 150 images" in table.out
    assert share(table) == 0
    assert_close(tmp_path / "live", tmp_path / "table", 2e-3)
    found, more = distil("found", *command)
    assert not more
    assert share(found) > 10
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("table", "found")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--data.mixup", 1.0)])
def test_a_number_of_views_makes_a_table_possible(distil, tmp_path, more):  # noqa: F811
    views = ("--data.random_resized_crop", 0.3, *more, "--optimizer.name", "sgd", "--epochs", 4)
    endless, made = distil("endless", *views)
    assert (
        "teacher: computed at each step (views without end; with data.views_per_image a table is possible)"
        in endless.out
    )
    assert not made
    live, _ = distil("live", *views, "--data.views_per_image", 2, "--precompute", "never")
    assert "; 2 of them per image, in turn" in live.out
    table, made = distil("table", *views, "--data.views_per_image", 2)
    assert "computed once for each view (2 views of 150 images" in table.out
    assert len(made) == 1
    assert_close(tmp_path / "live", tmp_path / "table", 2e-3)
    other, made = distil("other", *views, "--data.views_per_image", 2, "--seed", 9)
    assert share(other) == 100
    assert not made


@pytest.mark.slow
def test_the_teacher_does_not_compute_what_is_found_by_other_seeds_students_losses_or_subsets(
    distil,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))  # no other test's rows are found
    computed = []
    look = ViewTable.look

    def counting(self, where, inputs, compute):
        return look(self, where, inputs, lambda some: computed.append(len(some["image"])) or compute(some))

    monkeypatch.setattr(ViewTable, "look", counting)
    command = ("--data.flip", "true", "--epochs", 30, "--precompute", "always", "--data.split_seed", 31)
    distil("first", *command)
    assert 290 <= sum(computed) <= 300  # two views of 150 images
    for name, other in (
        ("seed", ("--seed", 3)),
        ("student", ("--student", "mnist_teacher")),
        ("loss", ("--losses", "[KL]")),
        ("part", ("--data.num_train", 60)),
    ):
        computed.clear()
        result, more = distil(name, *command, *other, "--epochs", 2)
        assert not more
        assert share(result) > 95
        assert sum(computed) <= 10
    computed.clear()
    _, made = distil("views", *command, "--epochs", 2, "--data.pad_crop", 2)
    assert len(made) == 1
    assert sum(computed) > 100


COMMAND = (
    "--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 3, "--checkpoint_every", 3,
    "--log_every", 1, "--report_to", "none", *VIEWS,
)  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_with_a_table(teacher_run, tmp_path):
    def run(name: str, sabotage=None) -> int:
        command = (*COMMAND, "--teacher", teacher_run, "--data.cache_dir", tmp_path / f"{name}-cache")
        return children.run("distill", (*command, "--output_dir", tmp_path / name), sabotage=sabotage)

    assert run("whole") == 0
    for moment in (2, 3, 4):
        assert run("cut", ("kd.train.meter.Meter.add", moment)) == -9
    assert run("cut") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_fill_and_use_one_table(teacher_run, tmp_path):
    command = (*COMMAND, "--teacher", teacher_run, "--data.cache_dir", tmp_path / "cache", "--data.batch_size", 48)
    assert children.run_several("distill", (*command, "--output_dir", tmp_path / "two"), 2) == [0, 0]
    (folder,) = (tmp_path / "cache" / "tables").glob("teacher-*/")
    shutil.rmtree(folder)
    assert children.run("distill", (*command, "--output_dir", tmp_path / "one")) == 0
    (folder,) = (tmp_path / "cache" / "tables").glob("teacher-*/")  # of the same name
    assert_close(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.slow
def test_a_run_resumes_as_it_chose_when_it_began(teacher_run, tmp_path, call, monkeypatch):
    """A table that another run has filled meanwhile, or a fuller disk, must not change how a stopped run resumes."""
    command = (*COMMAND[:-2], "--teacher", teacher_run, "--data.cache_dir", tmp_path / "cache", "--data.pad_crop", 3)
    status = children.run(
        "distill", (*command, "--output_dir", tmp_path / "run"), sabotage=("kd.train.meter.Meter.add:SIGTERM", 4)
    )
    assert status == 128 + 15
    chosen = json.loads((tmp_path / "run" / ".choices.json").read_text())
    assert "of a table of 98 views" in chosen["teacher table"]
    monkeypatch.setattr("kd.teachers.precompute.MIN_FOUND", 0.0)
    assert "computed once for each view" in call("distill", *command, "--output_dir", tmp_path / "other").out
    result = call("distill", *command, "--output_dir", tmp_path / "run")
    assert result.status == 0
    assert "teacher: computed at each step (of a table of 98 views" in result.out
    assert (
        "computed once for each view"
        in call("distill", *command, "--output_dir", tmp_path / "run", "--overwrite", "true").out
    )


@pytest.mark.slow
def test_a_frozen_backbone_is_computed_once_for_each_view(call, tmp_path):
    from kd.models import build_network

    torch.manual_seed(0)
    network = build_network("mobilenet_v3_small", 10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    command = ("--config", "recipes/digits/student.yaml", "--data.num_train", 60, "--model", "mobilenet_v3_small",
               "--weights", tmp_path / "w.pth", "--epochs", 4, "--log_every", 1, "--freeze_backbone", "true",
               "--optimizer.name", "sgd", "--data.batch_size", 32, "--data.flip", "true", "--data.test_fraction", 0.03,
               "--data.val_fraction", 0)  # fmt: skip
    live = call("train_teacher", *command, "--precompute", "never", "--output_dir", tmp_path / "live")
    table = call("train_teacher", *command, "--output_dir", tmp_path / "table")
    assert live.status == table.status == 0, live.err + table.err
    assert "backbone: computed once for each view (2 views of 60 images" in table.out
    assert_close(tmp_path / "live", tmp_path / "table", 2e-3)
    again = call("train_teacher", *command, "--output_dir", tmp_path / "again")
    assert share(again) > 90
    assert rows(tmp_path / "again") == rows(tmp_path / "table")
