"""python -m kd.export: every format says what the run's network says, and nothing is written that does not."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import statistics
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, assert_one_line

import kd
from kd.data import load_data
from kd.models import View, build_classifier
from kd.run.config import DataConfig
from kd.tools.export import formats
from kd.tools.export.card import escaped, model_card
from kd.tools.export.command import _arguments
from kd.tools.export.images import RunImages
from kd.util import machine
from kd.util.errors import UserError

COMMAND = "kd.tools.export.command"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="needs onnx, onnxscript and onnxruntime"
)


@pytest.fixture
def digits():
    """The test images of `teacher_run` as a network takes them, uint8 (N, 3, 8, 8), and their labels."""
    data = load_data(DataConfig(source="digits", num_train=200))
    images = data.test.store.images[data.test.places]
    return torch.from_numpy(np.repeat(images, 3, axis=1)), data.test.labels


@pytest.fixture
def bare(teacher_run, tmp_path) -> Path:
    """Weights and config.json of a run alone: its data is not known."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(teacher_run / name, folder)
    return folder


def ask(file: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.slow
@needs_onnx
def test_onnx_and_int8_equal_the_run_and_what_is_said_of_them(call, teacher_run, digits, tmp_path):
    import onnx
    import onnxruntime

    images, labels = digits
    result = call(COMMAND, teacher_run, "--to", "onnx", "--quantize", "int8", "--out", tmp_path / "new" / "net.onnx")
    assert result.status == 0, result.err
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"net.onnx", "net.int8.onnx", "net.onnx.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
    said = json.loads((tmp_path / "new" / "net.onnx.json").read_text())
    summary = json.loads((teacher_run / "summary.json").read_text())
    with torch.no_grad():
        expected = kd.load(teacher_run)(images).numpy()
    for name, file in (("float32", "net.onnx"), ("int8", "net.int8.onnx")):
        file = tmp_path / "new" / file
        assert str(ROOT).encode() not in file.read_bytes()  # no path of this machine
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (taken,), (given,) = session.get_inputs(), session.get_outputs()
        assert (taken.name, taken.type, taken.shape) == ("images", "tensor(uint8)", ["batch", 3, 8, 8])
        assert (given.name, given.type, given.shape) == ("logits", "tensor(float)", ["batch", 10])
        inside = json.loads(session.get_modelmeta().custom_metadata_map["kd"])
        assert inside["classes"] == said["classes"] == [str(digit) for digit in range(10)]
        for count in (1, 2, 7, 359):
            logits = session.run(None, {"images": images[:count].numpy()})[0]
            assert logits.shape == (count, 10)
            if name == "float32":
                assert np.abs(logits - expected[:count]).max() <= 1e-4 * np.abs(expected).max()
        assert said["int8"][name]["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        assert said["int8"][name]["bytes"] == file.stat().st_size
        assert 0 < said["int8"][name]["latency_ms"] < 1000
        row = next(line.split() for line in result.out.splitlines() if line.split()[:1] == [name])
        assert row[1:3] == [f"{said['int8'][name]['accuracy']:.2f}", f"{file.stat().st_size:,}"]
    assert said["int8"]["float32"]["accuracy"] == pytest.approx(summary["test_accuracy"])
    assert said["int8"]["same_class"] == (logits.argmax(1) == expected.argmax(1)).sum() > 340
    assert said["int8"]["int8"]["bytes"] < said["int8"]["float32"]["bytes"] / 2
    assert said["int8"]["calibration_images"] == 200  # all that the run was trained on
    assert said["int8"]["test_images"] == 359
    assert "calibrated on 200 train images" in result.out
    assert said["check"]["of"] == "test images"
    # batches of other sizes round differently
    assert said["check"]["largest_difference"] <= said["check"]["tolerance"] <= 1.00001e-4 * np.abs(expected).max()
    assert said["weights_sha256"] == json.loads((teacher_run / "config.json").read_text())["sha256"]

    graph = onnx.load(tmp_path / "new" / "net.int8.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    assert all(made_by[node.input[0]] == "DequantizeLinear" for node in graph.node if node.op_type == "Conv")
    assert [made_by[node.input[0]] for node in graph.node if node.op_type == "Resize"] == ["Cast"]  # stays in float32


@pytest.mark.slow
@needs_onnx
def test_preprocessing_may_stay_outside(call, teacher_run, digits, tmp_path):
    result = call(COMMAND, teacher_run, "--to", "onnx", "--preprocess", "outside", "--out", tmp_path)
    assert result.status == 0, result.err
    network = kd.load(teacher_run)
    with torch.no_grad():
        prepared = network.preprocess(digits[0][:9])
        expected = network(digits[0][:9]).numpy()
    assert np.allclose(ask(tmp_path / "model.onnx", prepared.numpy()), expected, atol=1e-3)
    taken = json.loads((tmp_path / "model.onnx.json").read_text())["input"]
    assert taken == {"name": "images", "type": "float32", "shape": ["batch", 3, 28, 28], "preprocess": "outside"}


@pytest.mark.slow
@pytest.mark.parametrize("preprocess", ["inside", "outside"])
def test_a_torch_program_takes_any_number_of_images(call, teacher_run, digits, tmp_path, preprocess):
    file = tmp_path / "net.pt2"
    result = call(COMMAND, teacher_run, "--to", "torch", "--out", file, "--preprocess", preprocess)
    assert result.status == 0, result.err
    assert "checked against PyTorch on 64 test images" in result.out
    extra = {"kd.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["kd.json"])["classes"][7] == "7"
    network = kd.load(teacher_run)
    images = digits[0] if preprocess == "inside" else network.preprocess(digits[0])
    with torch.no_grad():
        expected = network(digits[0])
        for count in (1, 2, 100):
            assert torch.allclose(program(images[:count]), expected[:count], atol=1e-3)
    assert file.stat().st_size < 2e6  # weights, and none of the images
    with zipfile.ZipFile(file) as archive:
        assert not any(str(ROOT).encode() in archive.read(name) for name in archive.namelist())


@pytest.mark.slow
def test_without_its_images_an_export_is_checked_on_noise_and_nothing_is_fetched(call, teacher_run, bare, monkeypatch):
    import urllib.request

    def refuse(*_arguments, **_more):
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    result = call(COMMAND, bare, "--to", "torch")
    assert result.status == 0, result.err
    assert "note: the run's images are absent (it has no config.yaml); the export is checked on noise" in result.out
    assert json.loads((bare / "export/torch/model.pt2.json").read_text())["check"]["of"] == "images of noise"
    config = yaml.safe_load((teacher_run / "config.yaml").read_text())
    config["data"].update(source="mnist", num_train=None)
    (bare / "config.yaml").write_text(yaml.safe_dump(config))
    result = call(COMMAND, bare, "--to", "torch", "--overwrite", "--download_dir", bare / "downloads")
    assert result.status == 0, result.err
    assert f"mnist is not in {bare / 'downloads'}" in result.out
    if not formats_missing():
        result = call(COMMAND, bare, "--to", "onnx", "--quantize", "int8")
        assert_one_line(result, "--quantize int8 needs the run's train images", "mnist is not in")
        assert not (bare / "export/onnx").exists()


def formats_missing() -> bool:
    try:
        formats.require_onnx()
    except UserError:
        return True
    return False


def test_weights_alone_load_with_one_line(call, teacher_run, digits, tmp_path):
    result = call(COMMAND, teacher_run, "--to", "safetensors", "--out", tmp_path / "weights")
    assert result.status == 0, result.err
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {"model.safetensors", "config.json"}
    with torch.no_grad():
        assert torch.equal(kd.load(tmp_path / "weights")(digits[0]), kd.load(teacher_run)(digits[0]))


@pytest.fixture
def seeds(call, teacher_run, tmp_path) -> list[Path]:
    """A student's run and, standing for other seeds, copies of it with other numbers."""
    first = tmp_path / "kd_s0"
    arguments = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 100, "--epochs", 1, "--report_to", "none")
    result = call("distill", *arguments, "--teacher", teacher_run, "--output_dir", first)
    assert result.status == 0, result.err
    runs = [first]
    for seed in (1, 2):
        runs.append(Path(shutil.copytree(first, tmp_path / f"kd_s{seed}")))
        config, summary = yaml.safe_load((first / "config.yaml").read_text()), json.loads(
            (first / "summary.json").read_text()
        )  # fmt: skip
        config.update(seed=seed, teacher=f"{teacher_run}_{seed}")
        summary.update(seed=seed, test_accuracy=summary["test_accuracy"] + seed**2)
        (runs[-1] / "config.yaml").write_text(yaml.safe_dump(config))
        (runs[-1] / "summary.json").write_text(json.dumps(summary))
    return runs


def test_a_hub_folder_loads_again_and_its_card_says_what_the_run_says(call, seeds, teacher_run, digits):
    from huggingface_hub import ModelCard

    result = call(COMMAND, *seeds, "--to", "hub", "--license", "apache-2.0")
    assert result.status == 0, result.err
    folder = seeds[0] / "export" / "hub"
    assert f"hf upload OWNER/NAME {folder}" in result.out
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    with torch.no_grad():
        assert torch.equal(kd.load(folder)(digits[0]), kd.load(seeds[0])(digits[0]))
    text, card = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md")
    summaries = [json.loads((run / "summary.json").read_text()) for run in seeds]
    values = [summary["test_accuracy"] for summary in summaries]
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "-".join(seeds[0].parts[-2:])
    assert "knowledge-distillation" in card.data.tags
    assert card.data.eval_results[0].metric_value == pytest.approx(values[0] / 100, abs=1e-4)
    teacher = json.loads((teacher_run / "summary.json").read_text())
    for part in (
        f"| test accuracy, % | {values[0]:.2f} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |",
        f"of the teacher {escaped('/'.join(teacher_run.parts[-2:]))}, % | {teacher['test_accuracy']:.2f} |",
        "mean ± standard deviation of 3 seeds",
        "Seeds: 0, 1, 2.",
        escaped("0.9 * KL(temperature=4.0, standardize=False) + 0.1 * CrossEntropy(label_smoothing=0.0)"),
        "https://arxiv.org/abs/1503.02531",
        "- data: digits; 100 training images (a class-balanced subset), 143 for validation, 359 for the test",
        "`mnist_student` with 15,562 parameters",
        f"({escaped('mnist_teacher')}, 221,962 parameters)",
        "kd.load(snapshot_download(",
        "These weights: apache-2.0.",
        f"With the `kd` library, version {kd.__version__}: `pip install ",
    ):
        assert part in text, part
    assert "One run:" not in text
    assert str(ROOT) not in text
    assert not re.search(r"(^|[\s`(])/\w", text)  # no path of this machine
    alone = call(COMMAND, seeds[0], "--to", "hub", "--overwrite")
    assert alone.status == 0, alone.err
    text = (folder / "README.md").read_text()
    assert "license: unknown" in text
    assert "- One run: how much the results vary with the seed was not measured." in text
    assert "standard deviation" not in text


@pytest.mark.slow
def test_the_card_names_every_view_of_the_training_images(seeds):
    config = yaml.safe_load((seeds[0] / "config.yaml").read_text())
    assert "views of the training images: as stored" in model_card(seeds[:1])
    config["data"].update(color_jitter=[0.4, 0.4, 0.4, 0.1], random_erasing=0.25, mixup=0.2)
    (seeds[0] / "config.yaml").write_text(yaml.safe_dump(config))
    words = "colour jitter 0.4/0.4/0.4/0.1, a rectangle erased in 25% of the images, mixup (alpha 0.2)"
    assert f"views of the training images: {words}\n" in model_card(seeds[:1])


def test_class_names_are_shown_as_they_are(seeds):
    network = json.loads((seeds[0] / "config.json").read_text())
    network["classes"][:3] = ["*bold*", "a_b|c", "<img src=x>\n# head"]
    (seeds[0] / "config.json").write_text(json.dumps(network))
    text = model_card(seeds[:1])
    assert r"Its 10 classes: \*bold\*, a\_b\|c, \<img src=x\> \# head, 3, " in text


@pytest.mark.slow
def test_the_card_names_the_file_of_a_network_of_the_users_own(seeds, tmp_path, monkeypatch):
    file = tmp_path / "own_net_of_the_card.py"
    file.write_text("class Net: ...\n")
    network = json.loads((seeds[0] / "config.json").read_text())
    network.update(model="own_net_of_the_card.Net", model_args={"width": 8})
    (seeds[0] / "config.json").write_text(json.dumps(network))
    assert "`own_net_of_the_card.Net` (width=8) with 15,562 parameters" in model_card(seeds[:1])
    needed = ", which defines the network, is needed too and is not in this folder."
    assert f"The module `own_net_of_the_card`{needed}" in model_card(seeds[:1])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_net_of_the_card")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    named = f"The module `own_net_of_the_card` (`{file.name}`, sha256 {digest}){needed}"
    assert named in model_card(seeds[:1])


@pytest.mark.parametrize("address", ["https://example.org/kd.git", "/srv/kd", "https://me:secret@example.org/kd"])
def test_the_library_comes_from_a_public_address_or_its_repository(address, monkeypatch):
    known = {"remote": address, "describe": "abc-dirty"}
    monkeypatch.setattr(machine, "_git", lambda command, *_: known[command])
    public = "`pip install git+https://example.org/kd.git@abc`"
    alone = "`pip install .` in its repository at commit abc-dirty"
    assert machine.install_command() == (public if address.endswith("kd.git") else alone)


def test_a_spread_is_of_runs_that_differ_by_the_seed_alone(call, seeds, teacher_run, tmp_path):
    assert_one_line(call(COMMAND, seeds[0], teacher_run, "--to", "hub"), "another seed", "losses")
    assert_one_line(call(COMMAND, seeds[0], seeds[1], seeds[1], "--to", "hub"), "seeds are 0, 1, 1", "once")
    (seeds[2] / "summary.json").unlink()
    assert_one_line(call(COMMAND, *seeds, "--to", "hub"), "kd_s2", "not finished")
    config = yaml.safe_load((seeds[0] / "config.yaml").read_text())
    del config["data"]["source"]
    (seeds[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert_one_line(call(COMMAND, seeds[0], "--to", "hub"), "lacks", "source")
    assert not (seeds[0] / "export").exists()


@pytest.mark.slow
def test_what_is_there_is_kept_unless_it_is_to_be_replaced(call, bare, tmp_path):
    out = tmp_path / "out"
    assert call(COMMAND, bare, "--to", "safetensors", "--out", out).status == 0
    (out / "notes.txt").write_text("mine")
    (out / "config.json").write_text("edited")
    result = call(COMMAND, bare, "--to", "safetensors", "--out", out)
    assert_one_line(result, "model.safetensors, config.json already", "--overwrite", "--out")
    assert (out / "config.json").read_text() == "edited"
    assert call(COMMAND, bare, "--to", "safetensors", "--out", out, "--overwrite").status == 0
    assert (out / "config.json").read_bytes() == (bare / "config.json").read_bytes()
    (out / "model.int8.onnx").write_text("of an earlier export")
    assert call(COMMAND, bare, "--to", "torch", "--out", out).status == 0  # beside the weights
    names = {path.name for path in out.iterdir()}
    assert names == {"notes.txt", "model.safetensors", "config.json", "model.int8.onnx", "model.pt2", "model.pt2.json"}
    if not formats_missing():  # no int8 file of other weights stays beside a new one
        assert call(COMMAND, bare, "--to", "onnx", "--out", out, "--overwrite").status == 0
        assert {path.name for path in out.iterdir()} == (names - {"model.int8.onnx"}) | {
            "model.onnx",
            "model.onnx.json",
        }


@pytest.mark.slow
def test_an_export_that_says_something_else_is_not_written(call, bare, monkeypatch):
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    before = sorted(bare.iterdir())
    assert_one_line(call(COMMAND, bare, "--to", "torch"), "gives something else than PyTorch", "nothing was written")
    assert sorted(bare.iterdir()) == before


def test_nan_is_a_difference():
    nothing = torch.full((2, 3), torch.nan)
    with pytest.raises(UserError, match="something else"):
        formats.check(lambda images: nothing[: len(images)], lambda images: torch.ones(len(images), 3), nothing, "", "")


@pytest.mark.slow
def test_a_network_that_cannot_be_traced_is_one_line(call, tmp_path, monkeypatch):
    (tmp_path / "odd_nets.py").write_text(
        "from torch import nn\nclass Odd(nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.fc = nn.Linear(48, num_classes)\n"
        "    def forward(self, x):\n        y = self.fc(x.flatten(1))\n        return y if y.sum() > 0 else -y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    classifier = build_classifier("odd_nets.Odd", ["a", "b"], View(source_size=(4, 4)))
    (tmp_path / "run").mkdir()
    for name, content in classifier.files().items():
        (tmp_path / "run" / name).write_bytes(content)
    for to in ("torch",) if formats_missing() else ("torch", "onnx"):
        assert_one_line(call(COMMAND, tmp_path / "run", "--to", to, "--trust_code", "true"), "cannot be traced")


@pytest.mark.slow
@needs_onnx
def test_a_network_in_half_precision(call, tmp_path, monkeypatch):
    (tmp_path / "half_nets.py").write_text(
        "import torch\nfrom torch import nn\nclass Half(nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.fc = nn.Linear(48, num_classes).bfloat16()\n"
        "    def forward(self, x):\n        return self.fc(x.flatten(1).bfloat16())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    classifier = build_classifier("half_nets.Half", ["a", "b"], View(source_size=(4, 4)))
    (tmp_path / "run").mkdir()
    for name, content in classifier.files().items():
        (tmp_path / "run" / name).write_bytes(content)
    run = call(COMMAND, tmp_path / "run", "--to", "onnx", "--trust_code", "true")
    assert_one_line(run, "ONNX Runtime cannot run the network", "--to torch")
    assert call(COMMAND, tmp_path / "run", "--to", "safetensors", "--trust_code", "true").status == 0


def test_mistakes_are_one_line(call, teacher_run, tmp_path, monkeypatch):
    assert_one_line(call(COMMAND, teacher_run), "--to", "--help")
    assert_one_line(call(COMMAND, teacher_run, "--to", "onxn"), "onxn", "'onnx', 'torch', 'safetensors', 'hub'")
    assert_one_line(call(COMMAND, tmp_path / "gone", "--to", "torch"), "gone", "no such folder")
    assert_one_line(call(COMMAND, teacher_run, "--to", "torch", "--quantize", "int8"), "--quantize", "--to onnx")
    assert_one_line(
        call(COMMAND, teacher_run, "--to", "hub", "--preprocess", "inside"), "--preprocess", "onnx or torch"
    )
    assert_one_line(call(COMMAND, teacher_run, "--to", "torch", "--license", "mit"), "--license", "hub")
    assert_one_line(call(COMMAND, teacher_run, teacher_run, "--to", "torch"), "one run, not 2")
    (tmp_path / "file").write_text("")
    assert_one_line(call(COMMAND, teacher_run, "--to", "hub", "--out", tmp_path / "file"), "is a file", "folder")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    result = call(COMMAND, teacher_run, "--to", "onnx")
    assert_one_line(result, "onnx, onnxscript, onnxruntime", "pip install onnx onnxscript onnxruntime")
    assert not (teacher_run / "export").exists()


def test_colour_images_of_a_network_that_sees_luminance(monkeypatch):
    from kd.data import Data, Split
    from kd.data.store import Store

    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    store = Store(pixels, np.arange(20) % 2)
    split = Split(store, np.arange(20))
    monkeypatch.setattr("kd.tools.export.images._open", lambda *_: Data(["b", "a"], split, None, split))
    view = View(channels=1, mean=(0.5,), std=(0.5,), source_size=(32, 32))
    classifier = build_classifier("mnist_student", ["a", "b"], view)
    images = RunImages(Path("run"), classifier)
    (found, labels), *rest = images.batches("test", size=12)
    assert len(rest) == 1
    assert found.shape == (12, 1, 32, 32)
    assert labels.tolist() == [1, 0] * 6  # in the order of the network's classes
    expected = classifier.preprocess(torch.from_numpy(pixels[:12]))
    assert (classifier.preprocess(found) - expected).abs().max() <= 0.51 / 127.5  # half a level of 255
    assert images.some("test", 5).shape == (5, 1, 32, 32)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(
    ("name", "size"),
    [("deep_nn", 32), ("wrn_16_2", 32), ("shufflenet_v1", 32), ("squeezenet1_1", 64)],
)
def test_networks_with_dropout_batch_norm_groups_and_branches(name, size, tmp_path):
    torch.manual_seed(0)
    view = View(resize=size, crop=size, source_size=(70, 90))
    classifier = build_classifier(name, [f"class {i}" for i in range(10)], view).eval()
    images = torch.randint(0, 256, (9, 3, 70, 90), dtype=torch.uint8)
    module = formats.deployed(classifier, inside=True)
    with torch.no_grad():
        assert torch.allclose(module(images), classifier(images), atol=1e-6)
    for to, file in ((formats.to_onnx, "net.onnx"), (formats.to_torch, "net.pt2")):
        exported = to(module, torch.zeros_like(images[:2]), {}, tmp_path / file)
        assert formats.check(exported, module, images, file, "noise")["images"] == 9


def test_what_the_readme_shows_is_accepted(tmp_path):
    commands = re.findall(r"^python -m kd\.export (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) >= 2
    for command in commands:
        if "onnx" not in command or not formats_missing():
            assert _arguments(shlex.split(command)).to in ("onnx", "torch", "safetensors", "hub")
