"""A stranger's files are data: what a run folder names is not run, not deleted and not obeyed without bounds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import assert_one_line, write_image
from PIL import EpsImagePlugin, Image
from refusing import _one_thread, out, runs, teacher, train  # noqa: F401 (fixtures)

import kd
from kd.tools.export.images import RunImages
from kd.track import _identity
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1, every=5)


def rewrite(run: Path, **fields) -> None:
    """Change fields of a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **fields}))


# Names of code

NET = """
from pathlib import Path
from torch.hub import load
from kd.models.small import SMALL_NETS
Path(__file__).with_name("ran").touch()
def net(num_classes=10):
    return SMALL_NETS["mnist_teacher"](num_classes=num_classes)
"""
HUB = {"repo_or_dir": "evil", "model": "net", "source": "local"}
OF_EVIL = "the network 'evil.hubconf.net' is code (in "
REUSED = {"student_args": {}, "student_tap": "pool", "student_map": [8, 1, 1], "teacher_map": [8, 1, 1]}
NAMES = {
    "import path": ("evil.hubconf.net", {}, OF_EVIL),
    "path that is not found": ("evil.nothing.net", {}, "the network 'evil.nothing.net' is code (not found here)"),
    "hub": ("torch.hub.load", HUB, "the model 'torch.hub.load' is of torch"),
    "shell": ("os.system", {"command": "touch evil/ran"}, "the model 'os.system' is of os"),
    "builtin": ("builtins.exec", {}, "the model 'builtins.exec' is of builtins"),
    "own reused head": ("reused_head", {**REUSED, "student": "evil.hubconf.net"}, OF_EVIL),
    "hub's reused head": ("reused_head", {**REUSED, "student": "torch.hub.load", "student_args": HUB}, "is of torch"),
    "two reused heads": (
        "reused_head",
        {**REUSED, "student": "reused_head", "student_args": {**REUSED, "student": "evil.hubconf.net"}},
        OF_EVIL,
    ),
    "trust by itself": ("reused_head", {**REUSED, "student": "evil.hubconf.net", "trust": True}, "'trust'"),
}
DOORS = {
    "evaluate": ("evaluate", "RUN", "--latency", "false"),
    "predict": ("kd.tools.predict", "RUN", "docs/speed.png"),
    "export": ("kd.tools.export.command", "RUN", "--to", "safetensors"),
    "card": ("kd.tools.export.command", "RUN", "--to", "hub"),
    "teacher": ("distill", "--teacher", "RUN"),
    "init_from": ("train_teacher", "--init_from", "RUN", "--model", "mnist_teacher"),
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder on the path with `evil/hubconf.py`, which leaves the file `evil/ran` where it is run."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/hubconf.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "evil"
    for name in ("evil", "evil.hubconf"):
        sys.modules.pop(name, None)


@pytest.fixture
def enter(call, train, teacher):
    """Give the run `teacher` to one of DOORS."""

    def run(door: str, *more):
        script, *words = [str(teacher) if word == "RUN" else word for word in DOORS[door]]
        if script in ("distill", "train_teacher"):
            return train(*words, *more, script=script)
        return call(script, *words, *more)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_run_names_code(teacher, evil, monkeypatch, name):
    model, arguments, words = NAMES[name]
    rewrite(teacher, model=model, model_args=arguments)
    monkeypatch.chdir(evil.parent)
    with pytest.raises(UserError) as refusal:
        kd.load(teacher)
    assert words in str(refusal.value)
    assert str(teacher) in str(refusal.value)
    assert not (evil / "ran").exists()


@pytest.mark.parametrize("door", DOORS)
def test_code_is_run_by_no_door_until_it_is_trusted(teacher, evil, enter, door):
    rewrite(teacher, model="evil.hubconf.net")
    assert_one_line(enter(door), OF_EVIL + str(evil / "hubconf.py"), "--trust_code true")
    assert not (evil / "ran").exists()
    result = enter(door, "--trust_code", "true")
    assert result.status == 0, result.err
    assert f"own code: evil.hubconf.net in {evil / 'hubconf.py'}\n" in result.out + result.err
    assert (evil / "ran").exists()


@pytest.mark.parametrize("name", ["hub", "shell", "builtin", "trust by itself"])
def test_trust_goes_no_further_than_networks_of_ones_own(teacher, evil, monkeypatch, name):
    model, arguments, words = NAMES[name]
    rewrite(teacher, model=model, model_args=arguments)
    monkeypatch.chdir(evil.parent)
    with pytest.raises(UserError, match=words):
        kd.load(teacher, trust=True)
    assert not (evil / "ran").exists()


def test_what_a_trusted_module_has_from_elsewhere_is_not_its_own(teacher, evil, monkeypatch):
    rewrite(teacher, model="evil.hubconf.load", model_args=HUB)
    monkeypatch.chdir(evil.parent)
    with pytest.raises(UserError, match="is of torch"):
        kd.load(teacher, trust=True)


@pytest.mark.slow
def test_a_teacher_that_a_stranger_s_run_names(runs, teacher, evil, call, tmp_path):
    rewrite(teacher, model="evil.hubconf.net")
    student = Path(shutil.copytree(runs / "student", tmp_path / "student"))
    config = yaml.safe_load((student / "config.yaml").read_text())
    terms = [{"class_path": "evil.hubconf.Term", "init_args": {}}]
    config |= {"teacher": str(teacher), "teacher_mean": "logits", "losses": terms, "student": config.pop("model")}
    (student / "config.yaml").write_text(yaml.safe_dump(config))
    result = call("evaluate", student, "--latency", "false", "--report", tmp_path / "report")
    assert result.status == 0, result.err
    assert f"its teacher {teacher} cannot be compared with: run '{teacher}': {OF_EVIL}" in result.err
    assert call("kd.tools.export.command", student, "--to", "hub").status == 0
    kd.runs(tmp_path).frame()
    assert not (evil / "ran").exists()


@pytest.mark.slow
def test_ones_own_network_is_resumed_and_vouched_for_once_more_elsewhere(train, out, evil, call):
    command = ("--model", "evil.hubconf.net", "--log_every", 1)
    assert train(*command).status == 0
    assert (evil / "ran").exists()
    (out / "summary.json").unlink()
    assert train(*command).status == 0
    assert "trust_code" not in yaml.safe_load((out / "config.yaml").read_text())
    assert_one_line(call("evaluate", out, "--latency", "false"), OF_EVIL)
    assert call("evaluate", out, "--latency", "false", "--trust_code", "true").status == 0


def test_trust_is_true_or_false(call, teacher):
    assert_one_line(
        call("kd.tools.predict", teacher, "docs/speed.png", "--trust_code", "maybe"), "--trust_code", "'maybe'"
    )


# Names of what is deleted


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder of the user's beside the run, which nothing may touch."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("the user's own")
    yield tmp_path / "victim"
    assert (tmp_path / "victim/file").read_text() == "the user's own"


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
@pytest.mark.parametrize("identity", ["x/../../../victim", "../victim", "", "*", "a b", "a\n", 7.5, ["a"]])
def test_an_id_that_is_a_path(tmp_path, tracker, identity):
    note = tmp_path / "tracker.json"
    note.write_text(json.dumps({f"{tracker}_id": identity}))
    with pytest.raises(UserError, match=r"tracker\.json.*(is no id|not of type str).*delete the file"):
        _identity(tmp_path, tracker)


def test_a_tracker_json_deletes_no_folder(train, out, victim, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train().status == 0
    (out / "summary.json").unlink()
    (out / "wandb/offline-run-20200101_000000-x").mkdir(parents=True)
    (out / "tracker.json").write_text('{"wandb_id": "x/../../../victim"}')
    assert_one_line(train("--report_to", "wandb"), "tracker.json: wandb_id 'x/../../../victim' is no id")


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", ".owner", ".config.yaml.tmp"])
def test_a_run_folder_with_links_is_not_written_into(train, out, victim, name):
    (out / name).symlink_to(victim if name == "checkpoints" else victim / "file")
    assert_one_line(train("--overwrite", "true"), f"holds links ({name})", "name another output_dir")


# Images


@pytest.mark.parametrize("form", ["EPS", "TGA", "ICO", "PCX", "IM", "DDS"])
def test_pillow_s_other_decoders_are_not_started(tmp_path, teacher, call, monkeypatch, form):
    def never(*_arguments, **_named):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", form)
    result = call("kd.tools.predict", teacher, tmp_path / "x.jpg")
    assert result.status == 1
    assert "x.jpg (not an image of a known format (JPEG, PNG, " in result.err


# Sizes and folders

IMAGE = {"resize": 28, "crop": None, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "source_size": [8, 8]}
SIDE = "it is a whole number from 1 to 8192"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("source_size", [50_000, 50_000], f"a side of 50000 pixels; {SIDE}"),
        ("source_size", [8, 10**9], f"a side of 1000000000 pixels; {SIDE}"),
        ("source_size", [0, 8], f"a side of 0 pixels; {SIDE}"),
        ("source_size", [8], "source_size (8,); it is height and width"),
        ("source_size", "88", f"a side of '8' pixels; {SIDE}"),
        ("resize", 10**9, f"a side of 1000000000 pixels; {SIDE}"),
        ("resize", -1, f"a side of -1 pixels; {SIDE}"),
        ("crop", 10**9, f"a side of 1000000000 pixels; {SIDE}"),
        ("crop", 1.5, f"a side of 1.5 pixels; {SIDE}"),
        ("channels", 10**9, "images of 1000000000 channels"),
        ("mean", [0.5] * 2, "each with a finite mean and a std above 0"),
        ("mean", ["a"] * 3, "each with a finite mean and a std above 0"),
        ("std", [0.5, 0.5, float("inf")], "each with a finite mean and a std above 0"),
        ("std", [10**400] * 3, "each with a finite mean and a std above 0"),
        ("std", [0.5, 0.5, 0], "each with a finite mean and a std above 0"),
    ],
)
def test_sizes_of_images_in_config_json(teacher, call, field, value, words):
    rewrite(teacher, preprocess={**IMAGE, field: value})
    assert_one_line(call("kd.tools.predict", teacher, "docs/speed.png"), f"run '{teacher}': images ", words)


@pytest.fixture
def rewrite_data(teacher):
    """Change fields of the teacher's data in its config.yaml."""

    def change(**fields) -> None:
        config = yaml.safe_load((teacher / "config.yaml").read_text())
        config["data"] |= fields
        (teacher / "config.yaml").write_text(yaml.safe_dump(config))

    return change


@pytest.mark.parametrize(
    ("field", "value"), [("resize", 10**9), ("resize", "large"), ("val_fraction", 7), ("channels", 10**9), ("mean", 1)]
)
def test_sizes_of_images_in_config_yaml(teacher, rewrite_data, call, field, value):
    rewrite_data(**{field: value})
    assert_one_line(call("evaluate", teacher, "--latency", "false"), f"run '{teacher}' is damaged: config.yaml", field)


@pytest.mark.parametrize("field", ["cache_dir", "download_dir", "num_workers", "store"])
def test_a_machine_s_own_folders_and_processes_are_not_followed(teacher, rewrite_data, call, tmp_path, field):
    value = {"num_workers": 10**9, "store": "stream"}.get(field, str(tmp_path / "theirs"))
    rewrite_data(**{field: value})
    assert call("evaluate", teacher, "--latency", "false").status == 0
    assert RunImages(teacher, kd.load(teacher)).absent is None
    assert not (tmp_path / "theirs").exists()


def test_folders_are_named_by_who_measures(teacher, call, tmp_path):
    assert call("evaluate", teacher, "--latency", "false", "--cache_dir", tmp_path / "mine").status == 0
    assert list((tmp_path / "mine/store").glob("digits-*/meta.json"))
    RunImages(teacher, kd.load(teacher), cache_dir=str(tmp_path / "also"))
    assert list((tmp_path / "also/store").glob("digits-*/meta.json"))


# Letters that act

RED, SHOWN = "\x1b[31mred\x07\x9b2J\u202e\n", r"\x1b[31mred\x07\x9b2J\u202e"


def assert_nothing_acts(*texts: str) -> None:
    assert SHOWN in "".join(texts)
    for text in texts:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("form", ["table", "csv"])
def test_class_names_in_a_terminal(teacher, call, form):
    rewrite(teacher, classes=[RED, *map(str, range(9))])
    result = call("kd.tools.predict", teacher, "docs/speed.png", "--top", 10, "--format", form)
    assert_nothing_acts(result.out)
    assert form == "csv" or SHOWN + r"\n" in result.out


@pytest.mark.slow
def test_errors_and_lines_in_a_terminal(teacher, rewrite_data, call):
    rewrite(teacher, classes=[RED, *map(str, range(9))])
    result = call("evaluate", teacher)
    assert_one_line(result, "different classes")
    assert_nothing_acts(result.err)
    rewrite_data(source=RED)
    result = call("kd.tools.export.command", teacher, "--to", "torch")
    assert result.status == 0
    assert_nothing_acts(result.out, result.err)


@pytest.mark.slow
def test_a_table_in_a_terminal(call, train, tmp_path, out):
    for i, name in enumerate(("\x1b[31mred\x07\x9b2J\u202e", "blue")):
        for place in range(24):
            write_image(tmp_path / "pictures/train" / name / f"{place}.png", (200 * i, 60, 60), (28, 28), seed=place)
    words = ("--data.source", tmp_path / "pictures", "--data.test_fraction", 0.4, "--data.num_train", "null")
    assert train(*words).status == 0
    result = call("evaluate", out, "--latency", "false", "--report", tmp_path / "report")
    assert result.status == 0
    assert_nothing_acts(result.out, result.err, (tmp_path / "report/report.md").read_text())


def test_names_in_a_model_card(teacher, rewrite_data, call):
    mark = "<script>|[a](b)`*c*\n# d"
    shown = r"\<script\>\|\[a\](b)\`\*c\* \# d"
    rewrite(teacher, classes=[mark, *map(str, range(9))])
    rewrite_data(source=mark)
    config = yaml.safe_load((teacher / "config.yaml").read_text())
    config["optimizer"]["name"], config["init_from"] = mark, mark
    config["losses"] = [{"class_path": "my.Loss", "init_args": {"a": mark}}]
    (teacher / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((teacher / "summary.json").read_text())
    (teacher / "summary.json").write_text(json.dumps({**summary, "device": mark, "git_commit": mark}))
    assert call("kd.tools.export.command", teacher, "--to", "hub").status == 0
    text = (teacher / "export/hub/README.md").read_text().split("---\n", 2)[2]
    assert text.count(shown) >= 6
    assert "<script>" not in text
