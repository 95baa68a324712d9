"""Tells a user whose network has not learned what validation measures: one class for every image, or no movement."""

from __future__ import annotations

from torch import Tensor

from kd.util.errors import say

PATIENCE = 5  # epochs without any movement


def one_class(logits: Tensor, labels: Tensor) -> bool:
    """Whether all images get the same class, though their labels (N,) differ; logits (N, K)."""
    return len(labels.unique()) > 1 and len(logits.argmax(1).unique()) == 1


class Standing:
    """Watches the validation of each epoch and warns once where it stands still.

    Args:
        seen: `{network: {"first", "epochs", "one_class", "said"}}` up to now, part of a checkpoint; brought up to date.
    """

    def __init__(self, config, seen: dict[str, dict]):
        self._config, self._seen = config, seen

    def look(self, name: str, logits: Tensor, labels: Tensor, accuracy: float, steps: int) -> None:
        """Take one network's validation: logits (N, K), labels (N,), accuracy in percent, after so many steps."""
        seen = self._seen.setdefault(name, {"first": accuracy, "epochs": 0, "one_class": 0, "said": False})
        still = accuracy == seen["first"] < 100
        seen["epochs"] = seen["epochs"] + 1 if still else 0
        seen["first"] = seen["first"] if still else None  # it has moved
        seen["one_class"] = seen["one_class"] + 1 if one_class(logits, labels) else 0
        if seen["one_class"] == 2 and not seen["said"]:  # once may happen on the way
            seen["said"] = self._warn(f"{name} gives all {len(labels)} validation images the same class", steps)
        elif seen["epochs"] == PATIENCE and not seen["said"]:
            what = f"validation accuracy of {name} has stood at {accuracy:.2f} % for {PATIENCE} epochs"
            seen["said"] = self._warn(what, steps)

    def conclude(self, name: str, logits: Tensor, labels: Tensor, steps: int) -> None:
        """Warn at the end of a run of what is still so on test: logits (N, K), labels (N,)."""
        seen = self._seen.get(name, {})
        if one_class(logits, labels):
            self._warn(f"{name} gives all {len(labels)} test images the same class", steps)
        elif seen.get("epochs", 0) >= PATIENCE:
            self._warn(f"validation accuracy of {name} never moved from {seen['first']:.2f} %", steps)

    def _warn(self, what: str, steps: int) -> bool:
        """Print it with what most often lies behind it, and what to try."""
        lr, scratch = self._config.optimizer.lr, not self._config.weights and not self._config.init_from
        cause = f"the learning rate ({lr:g}) may be too high; try {lr / 10:g}, and look at the labels of the images"
        if not steps:
            cause = "its preprocessing or order of classes may be another than the one it was trained with"
        elif scratch and steps < 1000:
            cause = f"{steps} steps from random weights are few; try more epochs, or first weights (--weights)"
        say(f"warning: {what}: {cause}")
        return True
