"""The networks that a run keeps: whole copies where their weights are shared out, and the best epoch of each."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor, nn

from kd.data import Split
from kd.measure import metrics
from kd.measure.predict import predict
from kd.students import Learner
from kd.train.checkpoint import Progress
from kd.train.standing import Standing
from kd.train.statistics import ARRIVED, chosen, learning_layers, left_over, put_back, reestimate
from kd.util.errors import say
from kd.util.gathers import copy_whole, share_buffers

Best = dict[str, dict[str, Tensor]]  # weights by network and name


class Kept:
    """The kept networks of a learner, as they are measured and written.

    Args:
        learner: whose networks they are.
        accelerator: whose processes measure them.
        best: the weights that were best on validation so far.
        train: the images for batch norm's statistics where they have not arrived; None: leave them.
        accumulate: forwards per step, each an update of the statistics.

    Attributes:
        networks: by name, the run's own first; with FSDP2 whole copies, which `refresh` fills.
        best: of each network the weights of the epoch that was best on validation; empty without validation.
        left_over: the part of their first statistics that the networks' batch norm had when last measured, where it was
            re-estimated; else 0.
    """

    def __init__(self, learner: Learner, accelerator, best: Best, train: Split | None = None, accumulate: int = 1):
        self._learner, self._accelerator, self.best = learner, accelerator, best
        self._train, self._accumulate, self.left_over, self._said = train, accumulate, 0.0, False
        trained = learner.networks
        self._in_parts = accelerator.is_fsdp2
        self.networks: dict[str, nn.Module] = (
            {name: network.twin() for name, network in trained.items()} if self._in_parts else dict(trained)
        )

    def refresh(self) -> None:
        """Let the networks be what was trained up to now, equal on all processes."""
        share_buffers(self._learner)
        if self._in_parts:
            for name, network in self._learner.networks.items():
                copy_whole(network, self.networks[name].to(self._accelerator.device))

    def settle(self, steps: int) -> None:
        """Re-estimate the statistics of batch norm that cannot have arrived after so many steps, in `networks`."""
        layers = {name: learning_layers(network) for name, network in self._learner.networks.items()}
        updates, device = steps * self._accumulate, self._accelerator.device
        left = {name: left_over(self.networks[name], layers[name], updates) for name in layers}
        self.left_over = max(left.values(), default=0.0)
        if self._train is None or self.left_over <= ARRIVED:
            self.left_over = 0.0
            return
        if not self._said:
            count = sum(map(len, chosen(len(self._train))))
            say(
                f"batch norm: {self.left_over:.0%} of the first statistics are left after {steps} steps; "
                f"they are re-estimated on {count} training images for each evaluation until 1 % is left"
            )
            self._said = True
        for name, network in self.networks.items():
            if left[name] > ARRIVED:
                reestimate(network, layers[name], self._train, device)

    def validate(
        self, split: Split | None, batch_size: int, epoch: int, progress: Progress, standing: Standing
    ) -> dict[str, float]:
        """Accuracy and negative log likelihood of each network, by the names under which they are logged; nothing
        without a split.

        Args:
            progress: its steps are taken; its `best` is brought up to date, as the weights are.
            standing: is shown what each network gives.
        """
        if split is None:
            return {}
        with nullcontext() if self._in_parts else put_back(self.networks.values()):
            self.settle(progress.step)
            row = self._measure(split, batch_size, epoch, progress.best, progress.step, standing)
        self._learner.train()
        return row

    def _measure(self, split, batch_size, epoch, best, steps, standing) -> dict[str, float]:
        row = {}
        for place, (name, network) in enumerate(self.networks.items()):
            logits, labels = predict(network, split, batch_size, self._accelerator)
            prefix = f"val/{name}/" if place else "val/"
            accuracy = row[f"{prefix}accuracy"] = metrics.accuracy(logits, labels)
            row[f"{prefix}nll"] = metrics.negative_log_likelihood(logits, labels)
            standing.look(name, logits, labels, accuracy, steps)
            if accuracy > best.get(name, {}).get("val_accuracy", -1):
                best[name] = {"epoch": epoch, "val_accuracy": accuracy}
                self.best[name] = {k: v.detach().cpu().clone() for k, v in network.network.state_dict().items()}
            if self._in_parts:
                network.to("cpu")
        return row
