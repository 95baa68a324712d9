"""What the processes gather from each other and share out: rows of a global batch, buffers, the parts of a tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd.outputs import Batch
from kd.util.errors import UserError


def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers: batch norm's running statistics, which each has of its own images.

    Those that a loss keeps equal itself, its `replicated`, are left out.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for name, buffer in module.named_buffers():
            if name not in getattr(module, "replicated", ()):
                dist.broadcast(buffer, 0)


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows of all processes, one process after another; each gave `counts[rank]` of them."""
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def global_rows(rows: Tensor, batch: Batch) -> Tensor:
    """The rows (B, ...) that all processes have for the images of one global batch, in its order.

    Gradients flow back to each process's own rows: a loss that is computed from global rows, equal on all processes,
    has the gradient that one process with the whole batch would have.

    Raises:
        UserError: the batch is a micro-batch.
    """
    if not batch.whole:
        raise UserError("a loss compares the images of a whole batch and would see a part of it; set accumulate 1")
    if batch.counts is None:
        return rows
    return _GlobalRows.apply(rows, batch.counts)


class _GlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts):
        ctx.counts, ctx.num_rows = counts, len(rows)
        return gather_rows(rows[: counts[dist.get_rank()]].contiguous(), counts)

    @staticmethod
    def backward(ctx, gradient):
        # The true adjoint: every process's loss depends on these rows, so their gradients are summed.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start, count = sum(ctx.counts[:rank]), ctx.counts[rank]
        mine = gradient.new_zeros(ctx.num_rows, *gradient.shape[1:])  # a process without images has one of weight 0
        mine[:count] = gradient[start : start + count]
        return mine, None


def global_sum(value: Tensor, batch: Batch) -> Tensor:
    """The sum over the processes of a value that needs no gradient."""
    value = value.detach().clone()
    if batch.counts is not None:
        dist.all_reduce(value)
    return value


def whole(named: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Named tensors, those that FSDP2 shares out among the processes made whole on the CPU.

    All processes must call it; one that does not `keep` the result gets an empty one.
    """
    result = {}
    for name, tensor in named.items():
        if is_shared_out(tensor):
            tensor = tensor.full_tensor().cpu()  # one at a time: together they may not fit into a GPU
        if keep:
            result[name] = tensor
    return result


def share_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have whole, shared out as `like` is; itself where `like` is whole."""
    if not is_shared_out(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes time, and few need it

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gradient_norm(module: nn.Module, accelerator) -> Tensor:
    """2-norm of all gradients together, fp16's loss scale taken out: a scalar on the device, nothing waits for it."""
    accelerator.unscale_gradients()
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def is_shared_out(tensor: Tensor) -> bool:
    """Whether FSDP2 has left only a part of this tensor on this process."""
    return hasattr(tensor, "full_tensor")


def all_finite(tensors: list[Tensor], accelerator) -> bool:
    """Whether all values are finite on all processes."""
    local = (tensor.to_local() if is_shared_out(tensor) else tensor for tensor in tensors)
    finite = torch.tensor([all(bool(tensor.isfinite().all()) for tensor in local)], device=accelerator.device)
    return bool(accelerator.gather(finite).all())
