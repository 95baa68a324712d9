"""The networks that a run keeps: whole copies where their weights are shared out, and the best epoch of each."""

from __future__ import annotations

from torch import Tensor, nn

from kd.data import Split
from kd.measure import metrics
from kd.measure.predict import predict
from kd.students import Learner
from kd.util.gathers import copy_whole, share_buffers

Best = dict[str, dict[str, Tensor]]  # weights by network and name


class Kept:
    """The kept networks of a learner, as they are measured and written.

    Args:
        learner: whose networks they are.
        accelerator: whose processes measure them.
        best: the weights that were best on validation so far.

    Attributes:
        networks: by name, the run's own first; with FSDP2 whole copies, which `refresh` fills.
        best: of each network the weights of the epoch that was best on validation; empty without validation.
    """

    def __init__(self, learner: Learner, accelerator, best: Best):
        self._learner, self._accelerator, self.best = learner, accelerator, best
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

    def validate(self, split: Split | None, batch_size: int, epoch: int, best: dict[str, dict]) -> dict[str, float]:
        """Accuracy and negative log likelihood of each network, by the names under which they are logged; nothing
        without a split.

        Args:
            best: of each network `epoch` and `val_accuracy` of its best epoch; brought up to date, as the weights are.
        """
        row = {}
        for place, (name, network) in enumerate(self.networks.items() if split is not None else ()):
            logits, labels = predict(network, split, batch_size, self._accelerator)
            prefix = f"val/{name}/" if place else "val/"
            accuracy = row[f"{prefix}accuracy"] = metrics.accuracy(logits, labels)
            row[f"{prefix}nll"] = metrics.negative_log_likelihood(logits, labels)
            if accuracy > best.get(name, {}).get("val_accuracy", -1):
                best[name] = {"epoch": epoch, "val_accuracy": accuracy}
                self.best[name] = {k: v.detach().cpu().clone() for k, v in network.network.state_dict().items()}
            if self._in_parts:
                network.to("cpu")
        self._learner.train()
        return row
