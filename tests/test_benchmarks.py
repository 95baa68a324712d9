"""The benchmarks: what they write from made numbers, small runs of each, and docs/speed.md beside the results."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import common
import document
import run

MACHINE = {
    "device": "cpu (x86_64, 2 threads)",
    "processor": "A processor",
    "cores": 2,
    "threads": 2,
    "load_before": 0.1,
    "date": "2026-01-02",
    "commit": "abc",
    "versions": {"torch": "2.14.1", "python": "3.11.7"},
}


def made(folder) -> None:
    """One file of each kind with small numbers."""
    sides = {
        side: {
            "runs": [{"seconds": 12.0 / times, "accuracy": 61.5}, {"seconds": 24.0 / times, "accuracy": 62.5}],
            "ratios": [times, times],
            "times_faster": times,
        }
        for side, times in (("plain", 1.0), ("first run", 6.0), ("second run", 8.0))
    }
    common.record("plain", "kd", {**MACHINE, "images": 10, "test_images": 5, "epochs": 2, "sides": sides}, folder)
    setting = {"student": "light_nn", "image_size": 32, "batch_size": 128, "losses": "kl"}
    pairs = [{"limit": 1000.0, "loop": 970.0}]
    common.record("limit", "light_nn", {**MACHINE, **setting, "pairs": pairs, "share_percent": [97.0]}, folder)
    rows = [
        {
            "images": count,
            "ms_per_step": 4.5,
            "seconds_to_first_step": 3.0,
            "cold_seconds": count / 100,
            "peak_mb": 800.0,
        }
        for count in (1000, 4000)
    ]
    common.record("growth", "images", {**MACHINE, "rows": rows}, folder)
    stages = [
        {"stage": "store", "seconds": 30.0, "images_per_second": None, "made_mb": 1350.0, "held_mb": 600.4},
        {"stage": "table", "seconds": 50.0, "images_per_second": 2500.0, "made_mb": 1700.0, "held_mb": None},
    ]
    memory = {"limit": "cgroup", "limit_mb": 900, "images": 7000, "source_mb": 1234.5, "rows": stages}
    common.record("growth", "memory", {**MACHINE, **memory}, folder)
    seconds = {"ours": [2.0, 4.0], "timm": [6.0, 12.0]}
    job = {"teacher": "resnet20", "student": "resnet8", "images": 100, "epochs": 3, "packages": {"timm": "1.0"}}
    common.record("peers", "cifar", {**MACHINE, **job, "seconds": seconds}, folder)
    found = {"ms_per_step": 5.0, "kernel_percent": 91.0, "largest": [{"name": "aten::mm", "percent": 40.0}]}
    found["parts"] = {"backward pass": 4.25, "dropout": 0.125}
    common.record("kernels", "light_nn_32", {**MACHINE, **setting, **found}, folder)
    runs = [{"seconds": 25.0}, {"seconds": 27.0}]
    common.record("gpu", "tutorial", {**MACHINE, "epochs": 10, "runs": runs}, folder)
    one = {"accuracy": 95.1, "seconds": 300.0, "images_per_second": 20_000.0}
    common.record("gpu", "teacher95", {**MACHINE, "epochs": 60, "runs": [{"teacher": one, "student": one}]}, folder)


def test_tables_say_what_was_measured(tmp_path):
    made(tmp_path)
    tables = document.tables(tmp_path)
    assert "| first run | 3.0 (2.0 to 4.0) | 6.0 (6.0 to 6.0) | 62.00 (61.50 to 62.50) |" in tables["plain"]
    assert "| `light_nn` | 32 | 128 | kl | 970 | 1,000 | 97.0 (97.0 to 97.0) |" in tables["limit"]
    assert "| 4,000 | 4.5 | 3.0 | 40.0 | 800 |" in tables["growth"]
    assert "4 times the images: ms/step 1.0, seconds 1.0, with nothing made 4.0, MB 1.0 times. " in tables["growth"]
    assert "A limit of 900 MB (cgroup); 7,000 images, 1,234 MB of Parquet files." in tables["growth"]
    assert "| images decoded into the store | 1,350 | 30 |  | 600 |" in tables["growth"]
    assert "an epoch from it | 1,700 | 50 | 2,500 |  |" in tables["growth"]
    assert "| timm 1.0 | 9.0 (6.0 to 12.0) | 33 | 3.0 |" in tables["peers"]
    assert "91.0 % of it in kernels" in tables["kernels"]
    assert "| backward pass | 4.25 |" in tables["kernels"]
    assert "26.0 (25.0 to 27.0) s" in tables["gpu"]
    assert "| teacher | 95.10 (95.10 to 95.10) | 300 (300 to 300) | 20,000 (20,000 to 20,000) |" in tables["gpu"]
    assert all("A processor, 2 cores, 2 threads" in text for text in tables.values())


@pytest.mark.slow
def test_document_and_picture_are_written_beside_the_numbers(tmp_path):
    before = document.DOCUMENT.read_text()
    made(tmp_path)
    shown = document.write(tmp_path)
    text = (tmp_path / "speed.md").read_text()
    for name, table in document.tables(tmp_path).items():
        assert f"<!-- table {name} -->\n{table}<!-- end -->" in text
        assert table in shown
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert document.DOCUMENT.read_text() == before


def test_without_numbers_the_tables_say_so(tmp_path):
    assert set(document.tables(tmp_path).values()) == {document.NOTHING}
    document.write(tmp_path)
    assert (tmp_path / "speed.png").exists()


def test_docs_speed_says_what_the_results_say():
    text = document.DOCUMENT.read_text()
    assert {name for _, name, _ in document.BLOCK.findall(text)} == set(document.TABLES)
    assert document.filled(text, document.tables(common.RESULTS)) == text, "run python benchmarks/document.py"


def test_record_keeps_what_other_runs_measured(tmp_path):
    common.record("plain", "head", {"rounds": 1}, tmp_path)
    common.record("plain", "kd", {"rounds": 1}, tmp_path)
    common.record("plain", "kd", {"rounds": 2}, tmp_path)
    assert json.loads((tmp_path / "plain.json").read_text()) == {"head": {"rounds": 1}, "kd": {"rounds": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["plain.json"]


def test_a_part_that_fails_or_hangs_is_told_and_ended():
    assert run.run_part("x", [sys.executable, "-c", "pass"], 60) == "done"
    assert run.run_part("x", [sys.executable, "-c", "raise SystemExit(3)"], 60) == "failed with 3"
    assert run.run_part("x", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5).startswith("stopped after")


@pytest.mark.parametrize("name", ["plain", "limit", "growth", "peers", "kernels", "gpu"])
def test_every_part_has_arguments_that_its_script_takes(name, capsys):
    module = __import__(name)
    known = {part: values for part, values in run.PARTS.items() if values[0] == f"{name}.py"}
    assert known
    for _, full, quick in known.values():
        for given in (full, quick):
            if given is not None:
                with pytest.raises(SystemExit) as ended:  # --help last: parsed after all that stands before it
                    module.main([*given.split(), "--help"])
                assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_random_images_and_subset_are_what_they_say(tmp_path):
    from kd.data import load_data
    from kd.run.config import DataConfig

    source = common.random_images(tmp_path / "random", 300, 8, num_classes=3)
    data = load_data(DataConfig(source=source, val_fraction=0))
    assert (len(data.train), len(data.test), data.image_shape) == (300, 3, (3, 8, 8))
    assert len({image.tobytes() for image in data.train.store.images}) == common.DISTINCT
    small = load_data(DataConfig(source=common.subset(source, tmp_path / "small", 30, 2), val_fraction=0))
    assert sorted(small.train.labels.tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    assert len(small.test) == 2
    assert small.classes == data.classes
    pixels = {image.tobytes() for image in data.train.store.images}
    assert {image.tobytes() for image in small.train.store.images} <= pixels


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[str, str]:
    """A set of 256 random images of 32x32 and a light_nn teacher for it."""
    folder = tmp_path_factory.mktemp("benchmark")
    source = common.random_images(folder / "set", 256, 32)
    return source, common.make_teacher(folder, "light_nn", source)


@pytest.mark.slow
def test_plain_measures_both_sides(digits, monkeypatch):
    import plain

    monkeypatch.setattr(plain, "EPOCHS", {"kd": 1})
    for side in (plain.plain, plain.ours):
        found = side("kd", digits[0], 0, digits[1])
        assert found["seconds"] > 0
        assert 0 <= found["accuracy"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["kl", "all"])
def test_limit_measures_loop_and_bare_step(digits, losses):
    import limit

    assert limit.loop(*digits, "light_nn", 128, 2, losses)["images_per_second"] > 0
    assert limit.limit("light_nn", 32, 10, 128, 2)["images_per_second"] > 0


@pytest.mark.slow
def test_growth_measures_taps_and_teachers(digits, tmp_path):
    import growth

    found = growth.one(digits[0], 1, 1, digits[1], "never", 15, str(tmp_path))
    assert found["ms_per_step"] > 0
    assert found["seconds_to_first_step"] > 0
    assert found["peak_mb"] > 100


@pytest.mark.slow
def test_kernels_names_the_operations(digits):
    import kernels

    found = kernels.profile(*digits, "light_nn", 128, 2)
    assert 0 < found["kernel_percent"] <= 100
    assert any("convolution" in row["name"] for row in found["largest"])
    assert sum(row["percent"] for row in found["largest"]) <= found["kernel_percent"] + 1e-6
    parts = kernels.parts(*digits, "light_nn", 128, 2)["parts"]
    assert len(parts) == 10
    assert all(milliseconds > 0 for milliseconds in parts.values())


@pytest.mark.slow
def test_the_tutorial_of_the_gpu_part_runs_its_recipes(digits, monkeypatch):
    import gpu

    some = (*gpu.EXTRA, "kd_t10")
    monkeypatch.setattr(gpu, "TUTORIAL", [pair for pair in gpu.TUTORIAL if pair[0] in some])

    found = gpu.tutorial(digits[0], 1, 0, ["--max_steps", "1"])
    assert set(found["runs"]) == set(some)
    assert found["seconds_with_extra"] > found["seconds"] > 0


@pytest.mark.slow
def test_the_teacher_of_the_gpu_part_has_its_students(digits, tmp_path):
    import gpu

    few = common.subset(digits[0], tmp_path / "few", 40, 2)
    found = gpu.teacher95(few, 1, 0, ["--max_steps", "1", "--data.batch_size", "8"])
    assert list(found) == ["teacher", "student", "second_student"]


@pytest.mark.slow
def test_peers_measures_our_side(digits, tmp_path):
    import peers

    teacher = common.make_teacher(tmp_path, "resnet20", digits[0])
    assert peers.ours(peers.JOBS["cifar"], digits[0], 1, teacher) > 0


def test_peers_names_what_is_not_installed(capsys, monkeypatch):
    import peers

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.main([]) == 1
    assert "not installed: torchdistill, timm" in capsys.readouterr().err


def test_gpu_says_that_there_is_none(capsys, monkeypatch):
    import gpu
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU")
