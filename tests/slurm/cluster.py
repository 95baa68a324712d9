"""A private SLURM of two nodes on this machine; see cluster.sh for how.

python tests/slurm/cluster.py [COMMAND...]     runs a command, or else a shell, on the login node of a fresh one
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"  # where a user's PATH does not lead
UNSHARE = ("unshare", "--mount", "--propagation", "private", "--uts", "--net", "--pid", "--fork", "--mount-proc")


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)}); on Debian or Ubuntu: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "only root can start a cluster"
    attempt = ("ip", "link", "add", "bridge", "type", "bridge")
    tried = subprocess.run([*UNSHARE, *attempt], env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """A running cluster; use as a context manager.

    Args:
        folder: gets the daemons' logs.
        nodes: how many compute nodes.
        cpus: how many each claims to have; nothing holds a job to them.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 8):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": "/run/slurm/slurm.conf"}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "KD_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        script = Path(__file__).with_name("cluster.sh")
        self._first = subprocess.Popen(
            [*UNSHARE, "--kill-child", "bash", str(script), str(self.folder), str(nodes), str(cpus)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "start.log").open("w"),
            text=True,
        )
        if self._first.stdout.readline() != "ready\n":
            self.__exit__()
            raise RuntimeError(f"the cluster did not start: {(self.folder / 'start.log').read_text()[-3000:]}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_) -> None:
        """End the daemons and all jobs: they cannot outlive the first process of their namespace."""
        self._first.stdin.close()
        try:
            self._first.wait(20)
        except subprocess.TimeoutExpired:
            self._first.kill()
            self._first.wait()

    def command(self, *words) -> list[str]:
        """A command as it is run on the login node, in this process's working directory."""
        of = f"/proc/{self._first.pid}/ns"
        spaces = [f"--mount={of}/mnt", f"--uts={of}/uts", f"--net={of}/net", f"--pid={of}/pid_for_children"]
        return ["nsenter", *spaces, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *map(str, words)]

    def run(self, *words, check: bool = True, **environment) -> str:
        """Run a command on the login node and return what it prints."""
        result = subprocess.run(
            self.command(*words), env={**self.environment, **environment}, capture_output=True, text=True, timeout=120
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: {result.stdout}{result.stderr}")
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        line = self.run("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def log(self, number: str) -> str:
        """What a job has printed so far."""
        path = Path(self.job(number).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait(self, number: str, what: str, condition, timeout: float = 300):
        """Poll until `condition()` is true and return what it gives.

        Raises:
            TimeoutError: it never was; with the job's state and log.
        """
        end = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > end:
                state = self.job(number)
                raise TimeoutError(
                    f"job {number}: {what} did not happen in {timeout} s; state {state.get('JobState')}, "
                    f"reason {state.get('Reason')}, restarts {state.get('Restarts')}; its log:\n{self.log(number)}"
                )
            time.sleep(0.5)
        return found

    def end(self, number: str, state: str, timeout: float = 300) -> None:
        """Wait until a job has ended for good, in this state."""
        for_now = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")
        self.wait(number, "its end", lambda: self.job(number)["JobState"] not in for_now, timeout)
        found = self.job(number)["JobState"]
        assert found == state, f"job {number} is {found}, not {state}; its log:\n{self.log(number)}"


def main() -> int:
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kd-slurm-") as folder, Cluster(Path(folder)) as cluster:
        print("two idle nodes, node1 and node2; all ends with this command", file=sys.stderr)
        return subprocess.run(
            cluster.command(*(sys.argv[1:] or [os.environ.get("SHELL", "bash")])), env=cluster.environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
