"""Every loss gives several processes the value and the gradients that it gives one process with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import children
import pytest
import torch
import torch.distributed as dist
from test_losses import Given, build
from torch.nn.modules.batchnorm import _BatchNorm

from kd.losses import LOSSES
from kd.outputs import Batch

pytestmark = pytest.mark.slow

# How many of a batch's images each process has: 7 unevenly, 7 or 1 with a process that has none.
PARTS = {2: [(5, 2), (7, 0), (1, 0)], 3: [(4, 2, 1), (5, 2, 0)]}
# The second step sees what the first left behind: a memory bank, running statistics.
NUM_STEPS = 2


class Part(torch.nn.Module):
    """A `Given` student that is asked about some of its images only; its gradients are at these images' rows."""

    def __init__(self, whole: Given, rows: slice):
        super().__init__()
        self.whole, self.rows = whole, rows

    def outputs(self, inputs, keys=None):
        return self.whole.outputs({}).rows(self.rows)


def steps(name: str, counts: tuple[int, ...], rank: int | None) -> dict:
    """What a loss gives in some steps: values, gradients of all that learns, and what it keeps itself.

    With a rank these are one process's part of the batch, weighed and averaged as the loop and DistributedDataParallel
    do; without one it is the whole batch.
    """
    size = sum(counts)
    distiller, teacher, batch = build(name, size=size)
    student, share, rows = distiller.learner.student, 1.0, slice(0, size)
    if rank is not None:
        share, start = counts[rank] * len(counts) / size, sum(counts[:rank])
        rows = slice(start, start + counts[rank]) if counts[rank] else slice(0, 1)
        distiller.learner.student = Part(student, rows)
        parts = (tensor[rows] for tensor in (batch.labels, batch.index, batch.keys))
        batch = Batch({}, *parts, batch.epoch, list(counts))
    (loss,) = distiller.losses.values()
    for module in loss.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # in training it sees its own process's images, as a network's does
    learned = dict(loss.named_parameters()) | {f"student.{key}": p for key, p in student.named_parameters()}
    found = {"values": []}
    for _ in range(NUM_STEPS):
        if rank is not None:
            for key, buffer in loss.named_buffers():
                if key not in loss.replicated:
                    dist.broadcast(buffer, 0)
        distiller.zero_grad()
        (value,) = distiller(batch, {"teacher": teacher.detach().rows(rows)}).values()
        (value * share).backward()
        found["values"].append(averaged(value.detach() * share, rank))
    found["gradients"] = {key: averaged(p.grad, rank) for key, p in learned.items() if p.grad is not None}
    found["kept"] = {key: buffer.clone() for key, buffer in loss.named_buffers() if key in loss.replicated}
    return found


def averaged(tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
    """The mean over the processes, if there are several."""
    tensor = tensor.detach().clone()
    if rank is not None:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def main(arguments: list[str] | None = None) -> None:
    """What each of several processes does: all losses on all parts, kept in a file by rank."""
    torch.set_num_threads(1)
    (folder,) = arguments or sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for name in LOSSES:
        for counts in PARTS[dist.get_world_size()]:
            try:
                found[name, counts] = steps(name, counts, rank)
            except Exception as error:
                raise RuntimeError(f"{name} on process {rank} of {counts}") from error
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """For each number of processes what each process found."""
    folders = {count: tmp_path_factory.mktemp(str(count)) for count in PARTS}
    for count, folder in folders.items():
        assert children.run_several("test_losses_parallel", [folder], count) == [0] * count
    return {
        count: [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
        for count, folder in folders.items()
    }


def close(found: torch.Tensor, expected: torch.Tensor, what: str, scale: float) -> None:
    """Equal to float32's rounding, which is that of the largest numbers, `scale`, where others cancel."""
    found, expected = found.float(), expected.float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5 * scale + 1e-9, msg=lambda text: f"{what}: {text}")


def largest(tensors: dict[str, torch.Tensor]) -> float:
    return max((tensor.float().abs().max().item() for tensor in tensors.values()), default=0.0)


@pytest.mark.parametrize("counts", [counts for several in PARTS.values() for counts in several], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_several_processes_give_what_one_gives(found, name, counts):
    expected = steps(name, counts, None)
    for rank, each in enumerate(found[len(counts)]):
        each = each[name, counts]
        assert all(value.isfinite() for value in each["values"])
        assert all(gradient.isfinite().all() for gradient in each["gradients"].values())
        assert each["gradients"].keys() == expected["gradients"].keys()
        for step, (value, alone) in enumerate(zip(each["values"], expected["values"], strict=True)):
            close(value, alone, f"value of step {step} on process {rank}", alone.abs().item())
        for part in ("gradients", "kept"):
            for key, alone in expected[part].items():
                close(each[part][key], alone, f"{part} {key} on process {rank}", largest(expected[part]))
