"""A plugin of pytest for `make soak`: how long, and the table at the end.

pytest -p soak tests/faults/test_faults.py --soak 100
"""

from __future__ import annotations

from collections import defaultdict


def pytest_addoption(parser):
    parser.addoption(
        "--soak",
        type=int,
        metavar="KILLS",
        default=100,
        help="kills on each number of processes, half of them inside a checkpoint; of the other faults a twentieth",
    )


def pytest_terminal_summary(terminalreporter):
    """How often each fault was injected, and how it ended; a test that failed is a run that was lost."""
    counts = defaultdict(lambda: defaultdict(set))
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == "fault":
                    counts[tuple(value)][outcome].add(report.nodeid)
    print = terminalreporter.write_line
    print(f"\n{'fault':<36} {'processes':>9} {'injected':>9} {'survived':>9} {'lost':>5}")
    totals = [0, 0, 0]
    for (fault, processes), ended in sorted(counts.items()):
        lost = len(ended["failed"] | ended["error"])
        survived = len(ended["passed"] - ended["error"])
        row = [survived + lost, survived, lost]
        totals = [total + number for total, number in zip(totals, row, strict=True)]
        note = f"  ({len(ended['skipped'])} not possible here)" if ended["skipped"] else ""
        print(f"{fault:<36} {processes:>9} {row[0]:>9} {row[1]:>9} {row[2]:>5}{note}")
    print(f"{'all':<36} {'':>9} {totals[0]:>9} {totals[1]:>9} {totals[2]:>5}")
