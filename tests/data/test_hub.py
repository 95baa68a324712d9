"""Data sets of the Hub: from a small server in this process that answers as the Hub does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from kd.data import load_data
from kd.run.config import DataConfig
from kd.util.errors import UserError

pytest.importorskip("datasets")

COMMIT = "0123456789" * 4
READ = """
import sys
from kd.data import load_data
from kd.run.config import DataConfig

data = load_data(DataConfig(source="hub:me/pets", val_fraction=0, cache_dir=sys.argv[1] if len(sys.argv) > 1 else None))
shades = [split.on_host(range(len(split)))[0]["image"][:, 0, 0, 0].tolist() for split in (data.train, data.test)]
print(data.classes, [split.labels.tolist() for split in (data.train, data.test)], shades)
"""


class Hub(BaseHTTPRequestHandler):
    """The set me/pets, whose files are those of a folder."""

    def __init__(self, folder: Path, *arguments):
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        super().__init__(*arguments)

    def entries(self) -> list[dict]:
        return [{"type": "file", "path": n, "size": len(c), "oid": n.encode().hex()} for n, c in self.files.items()]

    def do_POST(self):
        paths = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer([entry for entry in self.entries() if entry["path"] in paths])

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" in self.path and name in self.files:
            self.answer(self.files[name], ETag=f'"{name}"')
        elif "/resolve/" in self.path:
            self.answer({}, 404, **{"X-Error-Code": "EntryNotFound"})
        elif "/tree/" in self.path:
            self.answer(self.entries())
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/pets", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    do_HEAD = do_GET

    def answer(self, content, status: int = 200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def hub(tmp_path):
    """The folder of the set's files, which `read(cache_dir, **environment)` loads in a process of its own."""
    folder = tmp_path / "files"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def read(*arguments, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KD_"))},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            **{name: str(value) for name, value in environment.items()},
        }
        environment.pop("XDG_CACHE_HOME", None)
        command = [sys.executable, "-c", READ, *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    yield folder, read
    server.shutdown()
    server.server_close()


def write(folder: Path, split: str, names: list[str], labels: list[int], kind: list[str] | None = None) -> None:
    """A Parquet file of grey images, dark ones of cats and light ones of others; the classes of `kind` alternate."""
    import datasets

    kinds = {"label": datasets.ClassLabel(names=names), **({"kind": datasets.ClassLabel(names=kind)} if kind else {})}
    images = [Image.new("L", (6, 5), 10 if names[label] == "cat" else 200) for label in labels]
    columns = {"label": labels, "kind": [place % 2 for place in range(len(labels))]}
    columns = {"image": images, **{name: columns[name] for name in kinds}}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), **kinds}))
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.slow
def test_a_set_of_the_hub_lies_where_the_user_says(hub, tmp_path):
    folder, read = hub
    write(folder, "train", ["cat", "dog"], [0, 0, 1])
    write(folder, "test", ["dog", "cat"], [0, 1])
    expected = "['cat', 'dog'] [[0, 0, 1], [1, 0]] [[10, 10, 200], [200, 10]]\n"
    home, cache = tmp_path / "home/.cache", tmp_path / "cache"
    assert read(cache) == expected
    assert list((cache / "huggingface/hub").rglob("train-*.parquet"))
    assert list((cache / "huggingface/me___pets").rglob("*.arrow"))
    assert not [path for path in home.rglob("*") if path.suffix in (".parquet", ".arrow", ".npy")]
    assert read(cache, HF_HUB_OFFLINE=1) == expected
    shutil.rmtree(cache / "store")
    assert "without a network: in which order each of its files names the classes is not known" in read(
        cache, HF_HUB_OFFLINE=1
    )
    assert read(HF_HOME=tmp_path / "hf") == expected  # without a cache_dir theirs is where their libraries say
    assert list((tmp_path / "hf/hub").rglob("train-*.parquet"))
    assert list((tmp_path / "hf/datasets").rglob("*.arrow"))
    assert not [path for path in home.rglob("*") if path.suffix in (".parquet", ".arrow")]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """The folder of the set's files, read by the library's loader of folders; `local.load()` gives the data."""
    import datasets

    folder, builder = tmp_path / "files", datasets.load_dataset_builder
    folder.mkdir()
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, **settings: builder(str(folder), **settings))

    def load(**settings):
        settings = {"val_fraction": 0, "cache_dir": str(tmp_path / "cache"), **settings}
        return load_data(DataConfig(source="hub:me/pets", **settings))

    return folder, load


def test_class_names_in_another_order_in_each_file(local):
    folder, load = local
    write(folder, "train", ["cat", "dog"], [0, 0, 1])
    write(folder, "test", ["dog", "cat"], [0, 1, 1])
    data = load()
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 0, 1], [1, 0, 0])
    write(folder, "test", ["dog", "cow"], [0, 1, 1])
    with pytest.raises(UserError, match=r"unknown label in test-.*'cow'; known: cat, dog"):
        load()


def test_each_label_column_has_labels_of_its_own(local):
    folder, load = local
    for split in ("train", "test"):
        write(folder, split, ["cat", "dog"], [0, 0, 1], kind=["old", "young"])
    assert load(label_column="label").train.labels.tolist() == [0, 0, 1]
    data = load(label_column="kind")
    assert (data.classes, data.train.labels.tolist()) == (["old", "young"], [0, 1, 0])
