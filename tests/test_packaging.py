"""`pip install .`: what a wheel of this repository holds, and that it works without the repository."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import kd

pytestmark = pytest.mark.slow
SCRIPTS = ("distill", "evaluate", "train_teacher")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the content of a wheel, built without a network from a copy of the sources."""
    found = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    if not found or int(found.partition(".")[0]) < 77 or importlib.util.find_spec("pip") is None:
        pytest.skip(f"a wheel is built with pip and setuptools 77 or newer, not with {found}")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "kd", folder / "source" / "kd")
    for name in (
        "setup.py",
        "pyproject.toml",
        "requirements.txt",
        "README.md",
        "LICENSE",
        *(f"{s}.py" for s in SCRIPTS),
    ):
        shutil.copy(ROOT / name, folder / "source")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    command = [sys.executable, "-m", "pip", "wheel", *flags, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(folder.glob("kd-*.whl"))).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_holds_the_library_its_templates_and_the_scripts(installed):
    listed = [path.relative_to(ROOT) for path in (ROOT / "kd").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {*map(str, listed), *(f"kd_scripts/{script}.py" for script in SCRIPTS)}
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info" not in name} == expected
    assert "kd/tools/export/templates/card.md" in expected


def test_a_wheel_needs_what_requirements_txt_lists(installed):
    known = importlib.metadata.Distribution.at(next(installed.glob("kd-*.dist-info")))
    assert known.version == kd.__version__
    assert set(known.metadata.get_all("Provides-Extra")) == {"tensorboard", "onnx", "sweep", "dev", "all"}
    lines = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")}
    needed = [line.partition(";")[::2] for line in known.requires]
    assert {name.strip() for name, _ in needed} == lines
    optional = {name.strip() for name, when in needed if 'extra == "all"' in when}
    assert {name.strip() for name, when in needed if not when} == lines - optional
    assert "optuna>=4.0" in optional
    assert not any(name.startswith(("torch", "accelerate")) for name in optional)


def test_console_commands_work_anywhere(installed, tmp_path):
    commands = importlib.metadata.Distribution.at(next(installed.glob("kd-*.dist-info"))).entry_points
    assert {entry.name for entry in commands} == {"kd-train-teacher", "kd-distill", "kd-evaluate"}
    for entry in commands:
        code = f"import sys; sys.argv[1:] = ['nothing']; from {entry.module} import {entry.attr}; {entry.attr}()"
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
