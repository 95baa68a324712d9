"""What holds for the code itself: sizes, directions of imports, quick help, no traces of a machine."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SCRIPTS = ("train_teacher.py", "distill.py", "evaluate.py")

# From low to high; a module imports only from rooms before its own, or from its own.
ROOMS = (
    "keyed",
    "outputs",
    "util",
    "losses",
    "data",
    "models",
    "teachers",
    "students",
    "run",
    "measure",
    "track",
    "train",
    "report",
    "tools",
)
COMMANDS = {"adopt", "predict", "export", "sweep", "workspace"}  # files of a few lines, `python -m kd.NAME`
KNOWS_PROCESSES = ("train/", "track/", "util/gathers.py", "util/processes.py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(ROOT / "kd").parts[0].removesuffix(".py"), path) for path in (ROOT / "kd").rglob("*.py")]


def test_imports_go_one_way():
    for room, path in modules():
        if room == "__init__" or room in COMMANDS:
            continue
        for name in imports(ast.parse(path.read_text())):
            if name.startswith("kd.") and (target := name.split(".")[1]) != room:
                assert ROOMS.index(target) < ROOMS.index(room), f"{room}/{path.name} imports {name}"


def test_no_circle_of_imports():
    """Those at the top of modules; what is imported inside a function is imported after all modules are there."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for _, path in modules()}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph = {}
    for name, path in paths.items():
        body = ast.parse(path.read_text()).body
        found = imports(ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        graph[name] = {n if n in paths else n.rpartition(".")[0] for n in found if n.startswith("kd.")} - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_functions_have_at_most_60_lines():
    found = {
        f"{path.relative_to(ROOT / 'kd').as_posix()}: {node.name}"
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not found, "a function over 60 lines is two"


# Private names of other packages, which may break at their next release; the list may only become shorter.
PRIVATE = {
    "data/sources.py: _fingerprint",  # of datasets
    "measure/cost.py: _python_dispatch",  # of torch, as are the next four
    "models/__init__.py: _modules",
    "models/fold.py: _forward_hooks",
    "models/fold.py: _forward_pre_hooks",
    "teachers/__init__.py: _apply",
    "track/wandb_run.py: _log_artifact",  # of W&B
    "train/zero.py: _lazy_init_hp_params_optimizer_state",  # of DeepSpeed
}


def test_no_private_names_of_other_packages():
    found = set()
    for _, path in modules():
        tree = ast.parse(path.read_text())
        names = {part for name in imports(tree) if not name.startswith("kd") for part in name.split(".")}
        for node in ast.walk(tree):
            own = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "ctx")
            names |= {node.attr} if isinstance(node, ast.Attribute) and not own else set()
        private = {name for name in names if name[0] == "_" and name[1:2] != "_"}
        found |= {f"{path.relative_to(ROOT / 'kd').as_posix()}: {name}" for name in private}
    assert not found - PRIVATE, "find a public way"
    assert not PRIVATE - found, "take them off the list"


def test_contributing_names_every_room_in_order():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)[./]?\w*` \|", text, re.M)) == ROOMS


def test_only_rooms_stand_at_the_root():
    found = {path.name.removesuffix(".py") for path in (ROOT / "kd").iterdir() if path.name != "__pycache__"}
    assert found == {*ROOMS, *COMMANDS, "__init__"}
    for name in COMMANDS:
        assert len((ROOT / f"kd/{name}.py").read_text().splitlines()) < 10


def test_only_these_modules_know_of_processes():
    for _, path in modules():
        for name in imports(ast.parse(path.read_text())):
            if name.startswith(("accelerate", "torch.distributed")):
                where = path.relative_to(ROOT / "kd").as_posix()
                assert where.startswith(KNOWS_PROCESSES), f"{where} imports {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text().splitlines()) < 150


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    """In one Python, one after the other."""
    commands = [(script.removesuffix(".py"), ["--help"]) for script in SCRIPTS]
    commands.append(("distill", ["--teacher", "x", "--print_config"]))
    code = f"""
import contextlib, importlib, io, sys
for script, arguments in {commands}:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            importlib.import_module(script).main(arguments)
        except SystemExit as ended:
            assert not ended.code, ended.code
    assert "batch_size" in shown.getvalue(), script
print(*sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "kd.run.config" in loaded
    assert not loaded & {"accelerate", "torchvision", "datasets", "wandb", "sklearn", "matplotlib", "torch._dynamo"}


def test_help_names_every_field_and_loss(capsys):
    import distill

    with pytest.raises(SystemExit):
        distill.main(["--help"])
    text = capsys.readouterr().out
    for field in (
        "data.source",
        "data.batch_size",
        "data.num_train",
        "data.val_fraction",
        "student",
        "teacher",
        "losses",
        "epochs",
        "max_steps",
        "seed",
        "output_dir",
        "init_from",
        "report_to",
        "mixed_precision",
        "checkpoint_every",
        "overwrite",
    ):
        assert f"--{field} " in text
    assert "CrossEntropy" in text
    assert "KL" in text


@pytest.mark.first_tier(2)
@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_recipe_is_accepted_and_names_its_command(recipe):
    from kd.run.config import DistillConfig, TeacherConfig
    from kd.run.parse import parse

    kind = DistillConfig if "student:" in recipe.read_text() else TeacherConfig
    config = parse(kind, ["--config", str(recipe)])
    assert config.output_dir == f"runs/{recipe.parent.name}/{recipe.stem}"
    assert yaml.safe_load(recipe.read_text())["losses"]
    script = "distill.py" if kind is DistillConfig else "train_teacher.py"
    assert f"#   accelerate launch {script} --config recipes/{recipe.parent.name}/{recipe.name}" in recipe.read_text()


def test_nothing_of_this_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    path_pattern = re.compile(r"/(root|home|tmp|work)/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".sh", ".sbatch", "")
            and path.is_file()
            and path != Path(__file__)
        ):
            assert not path_pattern.search(path.read_text()), name
