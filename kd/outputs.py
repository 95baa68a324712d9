"""The two things that pass through the loop: a batch of inputs, and what a network gives for it.

Shapes in this project: B batch, K classes, C channels, H and W height and width, N images of a split.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass
class Batch:
    """This process's part of one global batch, or a micro-batch of it.

    inputs: columns by name. `image` is uint8 (B, C, H, W), augmented but neither resized nor normalised: each network
        does that for itself. A column `NAME.logits` or `NAME.features.TAP` was computed before by the frozen network of
        that name, see `kd.teachers.precompute`.
    labels: int64 (B,), index into the class names, -1 where unknown; of mixed images float32 (B, K), the classes'
        shares, which torch's cross entropy takes as well.
    index: int64 (B,), the images' places in the training set, by which everything random is keyed.
    keys: int64 (B,), one key per image for what is random inside the network (dropout); None outside training.
    step, epoch: counted from 0.
    counts: how many images of the global batch each process has, which may be 0; None where there is one process.
    whole: whether that is all of the global batch, and not one of its micro-batches.
    turn: which of the learner's turns this step is, see `kd.students.Learner.turn`.
    labelled: int64, the positions of the images whose label is known; None where all are.
    labelled_share: the factor that makes the processes' means over those, weighted by their images, the mean over
        those of the global batch.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    keys: Tensor | None = None
    epoch: int = 0
    counts: list[int] | None = None
    whole: bool = True
    step: int = 0
    turn: str | None = None
    labelled: Tensor | None = None
    labelled_share: float = 1.0

    def rows(self, where: Tensor) -> Batch:
        """The same batch of some of its images only; what relates images across processes cannot be computed on it."""
        keys = None if self.keys is None else self.keys[where]
        inputs = {name: column[where] for name, column in self.inputs.items()}
        return replace(
            self, inputs=inputs, labels=self.labels[where], index=self.index[where], keys=keys, labelled=None
        )


@dataclass
class Outputs:
    """What a network gives for a batch.

    logits: (B, K), or None for a network without a class head.
    features: by tap name.
    classes: int64 (K',), which of the learner's classes the columns of `logits` are; None for all, in order.
    """

    logits: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)
    classes: Tensor | None = None

    def float(self) -> Outputs:
        """In float32."""
        return self._each(lambda tensor: tensor.float())

    def detach(self) -> Outputs:
        """Without gradients."""
        return self._each(lambda tensor: tensor.detach())

    def rows(self, where: Tensor) -> Outputs:
        """Of some of the images only."""
        return self._each(lambda tensor: tensor[where])

    def of_classes(self, classes: Tensor | None) -> Outputs:
        """With the logits of some classes only, for a teacher that knows fewer; `None` for all."""
        return self if classes is None else replace(self, logits=self.logits[:, classes])

    def _each(self, function) -> Outputs:
        logits = None if self.logits is None else function(self.logits)
        return Outputs(logits, {name: function(feature) for name, feature in self.features.items()}, self.classes)
