"""Whatever is injected into a run, it ends with the bytes of one that nothing happened to.

Each kind of each fault once; `make soak` injects them again and again, at other moments, on other numbers of processes.
"""

from __future__ import annotations

import random
import time

import children
import pytest
from job import ARGUMENTS, Job
from kinds import FAULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on so many processes that nothing happened to, and the seconds it took."""
    known = {}

    def run(count: int):
        if not known:
            children.run("train_teacher", ["--help"])  # the server that the processes are forked from takes its time
        if count not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            arguments, start = (*ARGUMENTS, "--output_dir", folder), time.monotonic()
            if count == 1:
                assert children.run("train_teacher", arguments) == 0
            else:
                assert children.run_several("train_teacher", arguments, count) == [0] * count
            known[count] = folder, time.monotonic() - start
        return known[count]

    return run


def pytest_generate_tests(metafunc):
    if "fault" not in metafunc.fixturenames:
        return
    soak = metafunc.config.getoption("soak", default=None)
    cases = []
    for name, (_, counts, kinds) in FAULTS.items():
        if soak is None:
            cases += [(name, counts[0], round) for round in range(len(kinds))]
        else:
            rounds = soak // 2 if name.startswith("killed") else max(4, soak // 20)
            cases += [(name, count, round) for round in range(rounds) for count in counts]
    cases.sort(key=lambda case: case[2])  # a soak that is stopped has had some of each
    metafunc.parametrize(("fault", "count", "round"), cases)


def test_nothing_is_lost(whole, tmp_path, record_property, fault, count, round):
    record_property("fault", (fault, count))
    inject, _, kinds = FAULTS[fault]
    draw = random.Random(f"{fault}, {count} processes, round {round}")
    inject(Job(tmp_path, count, draw, kinds[round % len(kinds)], whole))
