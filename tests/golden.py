"""Two runs whose bytes a change that only rearranges must leave as they are: `make golden BASE=COMMIT`.

Logits (KL, with dropout and flips) and features (VID with CRD) on the digits, a dozen steps each, with a checkpoint in
between. The checksums of `model.safetensors` are those of this machine's arithmetic, so both commits run here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FEW = ["--data.num_train", "200", "--max_steps", "12", "--log_every", "5", "--report_to", "none", "--num_threads", "1"]
VID = "{class_path: VID, init_args: {student_taps: [features.3], teacher_taps: [features.3]}}"
CRD = "{class_path: CRD, init_args: {student_tap: features.3, teacher_tap: features.3}}"
RUNS = {
    "kl": ["--config", "recipes/digits/kd.yaml", "--student", "light_nn", "--data.resize", "32", "--data.flip", "true"],
    "vid_crd": ["--config", "recipes/digits/kd.yaml", f"--losses=[{VID}, {CRD}, CrossEntropy]"],
}


def checksums(tree: Path, folder: Path) -> dict[str, str]:
    """Run a tree's scripts in `folder`; the SHA-256 of each run's weights."""
    environment = {**os.environ, "KD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}

    def run(script: str, *arguments: str) -> None:
        subprocess.run([sys.executable, script, *arguments], cwd=tree, env=environment, check=True, capture_output=True)

    def teacher(*arguments: str) -> str:
        name = str(folder / f"teacher{len(arguments)}")
        run("train_teacher.py", "--config", "recipes/digits/teacher.yaml", *FEW, *arguments, "--output_dir", name)
        return name

    teachers = {"kl": teacher("--model", "deep_nn", "--data.resize", "32"), "vid_crd": teacher()}
    for name, arguments in RUNS.items():
        run("distill.py", *arguments, *FEW, "--teacher", teachers[name], "--output_dir", str(folder / name))
    return {name: hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() for name in RUNS}


def main(base: str) -> int:
    """Compare this working tree with a commit; returns 1 where a run's bytes differ."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, base], cwd=ROOT, check=True)
        try:
            before = checksums(tree, Path(scratch) / "before")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
        after = checksums(ROOT, Path(scratch) / "after")
    for name in RUNS:
        same = "the same bytes" if before[name] == after[name] else f"OTHER BYTES than at {base}"
        print(f"{name}: {after[name][:16]} {same}")
    return int(before != after)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))}: {(error.stderr or b'').decode()[-2000:]}")
