"""The networks that a run keeps: whole copies where their weights are shared out, and the best epoch of each."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from kd.data import Split
from kd.measure import metrics
from kd.measure.predict import predict
from kd.students import Learner
from kd.train.checkpoint import Progress
from kd.train.standing import Standing
from kd.train.statistics import ARRIVED, chosen, learning_layers, left_over, reestimate
from kd.util.errors import say
from kd.util.gathers import share_buffers, whole
from kd.util.tensors import buffers_put_back

Best = dict[str, dict[str, Tensor]]  # weights by network and name


class Kept:
    """The kept networks of a learner, as they are measured and written.

    Args:
        train: the images for batch norm's statistics where they have not arrived; None: leave them.
        accumulate: forwards per step, each an update of the statistics.

    Attributes:
        networks: by name, the run's own first; with FSDP2 whole copies, which `refresh` fills.
        best: of each network the weights of the epoch that was best on validation so far; empty without validation.
        left_over: the part of their first statistics that the networks' batch norm had when last measured, where it was
            re-estimated; else 0.
    """

    def __init__(self, learner: Learner, accelerator, best: Best, train: Split | None = None, accumulate: int = 1):
        self._learner, self._accelerator, self.best = learner, accelerator, best
        self._train, self._accumulate, self.left_over, self._said = train, accumulate, 0.0, False
        self._in_parts, self.networks = accelerator.is_fsdp2, dict(learner.networks)
        if self._in_parts:
            self.networks = {name: network.twin() for name, network in self.networks.items()}

    def refresh(self) -> None:
        """Let the networks be what was trained up to now, equal on all processes."""
        share_buffers(self._learner)
        if self._in_parts:
            for name, network in self._learner.networks.items():
                self.networks[name].to(self._accelerator.device).load_state_dict(whole(network.state_dict()))

    def settle(self, steps: int) -> None:
        """Re-estimate the statistics of batch norm that cannot have arrived after so many steps, in `networks`."""
        self.left_over = 0.0
        if self._train is None:
            return
        layers = {name: learning_layers(network) for name, network in self._learner.networks.items()}
        for name, network in self.networks.items():
            if (left := left_over(network, layers[name], steps * self._accumulate)) > ARRIVED:
                self.left_over = max(self.left_over, left)
                reestimate(network, layers[name], self._train, self._accelerator.device)
        if self.left_over and not self._said:
            count = sum(map(len, chosen(len(self._train))))
            say(
                f"batch norm: {self.left_over:.0%} of the first statistics are left after {steps} steps; "
                f"they are re-estimated on {count} training images for each evaluation until 1 % is left"
            )
            self._said = True

    def validate(
        self, split: Split | None, batch_size: int, epoch: int, progress: Progress, standing: Standing
    ) -> dict[str, float]:
        """Accuracy and negative log likelihood of each network, by the names under which they are logged; nothing
        without a split. Brings `progress.best` and the best weights up to date.
        """
        row: dict[str, float] = {}
        if split is None:
            return row
        # training continues with its own statistics
        with nullcontext() if self._in_parts else buffers_put_back(*self.networks.values()):
            self.settle(progress.step)
            for name, network in self.networks.items():
                logits, labels = predict(network, split, batch_size, self._accelerator)
                prefix = f"val/{name}/" if row else "val/"
                accuracy = row[f"{prefix}accuracy"] = metrics.accuracy(logits, labels)
                row[f"{prefix}nll"] = metrics.negative_log_likelihood(logits, labels)
                standing.look(name, logits, labels, accuracy, progress.step)
                if accuracy > progress.best.get(name, {}).get("val_accuracy", -1):
                    progress.best[name] = {"epoch": epoch, "val_accuracy": accuracy}
                    self.best[name] = {k: v.detach().cpu().clone() for k, v in network.network.state_dict().items()}
                if self._in_parts:
                    network.to("cpu")
        self._learner.train()
        return row
