"""One optimizer step on all processes: forward, backward, update, and the optimizer's state as whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd.outputs import Batch, Outputs
from kd.students import Learner
from kd.train import zero
from kd.train.checkpoint import load_optimizer_tensors, optimizer_tensors
from kd.train.distiller import Distiller
from kd.train.optim import make_optimizer
from kd.util.gathers import gradient_norm, share_buffers, share_out, whole
from kd.util.tensors import buffers_put_back


class Engine:
    """The step on one process, with DistributedDataParallel or with FSDP2, whichever Accelerate was launched for.

    Attributes:
        model, optimizer: the distiller and its optimizer, prepared.
        settled: whether `settle` need not be called.
    """

    _optimizer_tensors = staticmethod(optimizer_tensors)
    _load_optimizer_tensors = staticmethod(load_optimizer_tensors)

    def __init__(self, distiller: Distiller, config, accelerator: Accelerator):
        self.distiller, self.accelerator, self.clip_norm = distiller, accelerator, config.optimizer.clip_norm
        self._prepare(make_optimizer(config.optimizer, distiller, accelerator.device, accelerator.is_fsdp2), config)
        self.settled = not isinstance(self.model, DistributedDataParallel)
        self._shared: list[nn.Module] = []  # whose buffers are shared here; DistributedDataParallel does it itself
        if self.settled and accelerator.num_processes > 1:
            averages = type(distiller.learner).after_step is not Learner.after_step  # of buffers, for example
            self._shared = [*distiller.losses.values(), *([distiller.learner] if averages else [])]

    def _prepare(self, optimizer: torch.optim.Optimizer, config) -> None:
        self.model, prepared = self.accelerator.prepare(self.distiller, optimizer)
        # Accelerate's wrapper looks for packages at each step; only a scaler of gradients needs it.
        self.optimizer = prepared if self.accelerator.scaler is not None else prepared.optimizer

    def forward_backward(
        self, batch: Batch, teachers: dict[str, Outputs], share: float, last: bool
    ) -> dict[str, Tensor]:
        """The terms of a micro-batch; their gradients are added to those of the step's micro-batches before.

        Args:
            share: weighs the mean over these images so that all together are the mean over the global batch.
            last: whether the step has no further one: gradients are averaged over the processes once a step.
        """
        for module in self._shared:
            share_buffers(module)
        with self._accumulating(last):
            with self.accelerator.autocast():  # Accelerate's own wrapper does this too, but not under FSDP2
                terms = self.model(batch, teachers)
            loss = sum(terms.values())
            self._backward(loss if share == 1 else loss * share)
        return terms

    def _accumulating(self, last: bool):
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _backward(self, loss: Tensor) -> None:
        if self.accelerator.scaler is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def settle(self, forward_backward: Callable[[], object]) -> None:
        """Before the first step of a start: let DistributedDataParallel choose its buckets as in all later steps.

        It starts with one bucket of all gradients and, after the first backward, has several in the order in which
        gradients come. Three or more summands are rounded according to their place in a bucket, so the first step
        after a restart would differ in the last bits from the same step of a run that was not stopped. The gradients of
        this pass are dropped, and buffers are put back.
        """
        with buffers_put_back(self.distiller):
            forward_backward()
        self.optimizer.zero_grad()
        self.settled = True

    def update(self, wants_norm: bool, still: Iterable[nn.Parameter] = ()) -> Tensor | None:
        """Clip the gradients, step, drop them; the parameters in `still` do not move. Returns the gradients' norm where
        it is wanted, a scalar on the device."""
        norm = None
        for parameter in still:
            parameter.grad = None
        if self.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.clip_norm)
        elif wants_norm:
            norm = gradient_norm(self.distiller, self.accelerator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that is learned and the optimizer's state, by file and name, whole; on the main process alone, though all
        must call it."""
        named = {"distiller": self.distiller.state_dict(), "optimizer": self._optimizer_tensors(self.optimizer)}
        return {name: whole(part, keep=self.accelerator.is_main_process) for name, part in named.items()}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Resume from what `tensors` gave, on this or another number of processes and by this or another engine."""
        own = self.distiller.state_dict()
        saved = {name: share_out(value, own.get(name, value)) for name, value in tensors["distiller"].items()}
        self.distiller.load_state_dict(saved)
        self._load_optimizer_tensors(self.optimizer, tensors["optimizer"])


class ZeroEngine(Engine):
    """The step with DeepSpeed's ZeRO: each process keeps and updates a part of the optimizer's state.

    ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, https://arxiv.org/abs/1910.02054.
    """

    _optimizer_tensors = staticmethod(zero.optimizer_tensors)
    _load_optimizer_tensors = staticmethod(zero.load_optimizer_tensors)

    def _prepare(self, optimizer: torch.optim.Optimizer, config) -> None:
        self.model, self.optimizer = zero.initialize(self.distiller, optimizer, config, self.accelerator)

    def _accumulating(self, last: bool):
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self, wants_norm: bool, still: Iterable[nn.Parameter] = ()) -> Tensor | None:
        self.model.step()  # clips too, see `zero.initialize`
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(norm) if wants_norm or self.clip_norm is not None else None
