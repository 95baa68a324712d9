"""Contrastive Representation Distillation. Tian, Krishnan, Isola. 2019. https://arxiv.org/abs/1910.10699

A critic h tells whether an embedding of the student and one of the teacher are of one image (section 3.1). Embeddings
and student are trained for it to succeed: for each image -log h of its own pair, minus the sum of log(1 - h) over K
pairs with images of other classes. One side of a pair, the anchor, is of this step; the other comes from a memory bank
that holds a moving average of every training image's embedding. Each network is anchor once; the values are added.

h = p / (p + K / M) for M training images, where p = exp(<student, teacher> / temperature) / Z.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import keyed
from kd.losses.base import FeatureLoss, Setting
from kd.outputs import Batch, Outputs
from kd.util.gathers import global_rows

CHUNK = 1 << 23  # scalars that one part of a batch may need at once
# A gathered negative moves about 3 D scalars through memory (read, written, read); a place in a matrix product with the
# whole bank costs D multiplications, which stream. The product is taken for up to so many places a negative.
PRODUCT_GAIN = 32


def draw_negatives(keys: Tensor, labels: Tensor, number: int, order: Tensor, counts: Tensor) -> Tensor:
    """Places (B, number) of images of other classes than `labels` (B,), uniform over them, with replacement.

    Args:
        keys: int64 (B,); the draws are functions of an image's key and the negative's number.
        order: int64 (M,), the places of the training images, sorted by class.
        counts: int64, how many training images each class has.
    """
    own, first = counts[labels][:, None], (counts.cumsum(0) - counts)[labels][:, None]
    keys = keyed.keys(keys, torch.tensor(keyed.Purpose.NEGATIVES))[:, None]
    rank = keyed.integers(keyed.keys(keys, torch.arange(number, device=keys.device)), len(order) - own)
    return order.take(rank + (rank >= first) * own)  # the image's class stands at [first, first + own): passed over


def products(anchors: Tensor, bank: Tensor, places: Tensor, whole: bool) -> Tensor:
    """<anchors[i], bank[places[i, k]]>, (B, P), of anchors (B, D), bank (N, D) and places (B, P).

    `whole`: by one matrix product with the whole bank, from which (B, P) numbers are taken; else the rows are gathered.
    """
    found = []
    for some, at in _chunks(anchors, places, bank, whole):
        found.append((some @ bank.T).gather(1, at) if whole else (_rows(bank, at) @ some[:, :, None])[..., 0])
    return torch.cat(found)


def weighted_sums(weights: Tensor, bank: Tensor, places: Tensor, whole: bool) -> Tensor:
    """The sum over k of weights[i, k] * bank[places[i, k]], (B, D): the adjoint of `products`."""
    found = []
    for some, at in _chunks(weights, places, bank, whole):
        if whole:
            # Equal places of a row have equal weights here, so their sum does not depend on the order, even on a GPU.
            found.append(some.new_zeros(len(some), len(bank)).scatter_add_(1, at, some) @ bank)
        else:
            found.append((some[:, None] @ _rows(bank, at))[:, 0])
    return torch.cat(found)


def _chunks(factors: Tensor, places: Tensor, bank: Tensor, whole: bool):
    """Pairs of parts of factors and places, so many rows at once that they need no more than CHUNK scalars."""
    rows = max(1, CHUNK // (len(bank) if whole else places.shape[1] * bank.shape[1]))
    return zip(factors.split(rows), places.split(rows), strict=True)


def _rows(bank: Tensor, places: Tensor) -> Tensor:
    return bank.index_select(0, places.flatten()).view(*places.shape, -1)


def contrast(logits: Tensor) -> tuple[Tensor, Tensor]:
    """-log h of the positive pair minus the sum of log(1 - h) of the negative ones, the mean over the images, a scalar,
    and its derivative by the critic's logits (B, 1 + K), in which the positive pair is first."""
    value = -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()
    slope = logits.sigmoid()
    slope[:, 0] -= 1
    return value, slope / len(logits)


class CRD(FeatureLoss):
    """Noise-contrastive estimation between learned embeddings of the student's and the teacher's vectors.

    The constants Z are those of the published code: M times the mean of exp(<., .> / temperature) over the first step's
    pairs, one constant an anchor; M cancels in h. An image that no step has seen yet is remembered as a random vector.

    Differs from the paper: the exponentials are divided by Z, as in the published code.
    Differs from the published code: negatives are drawn with replacement (the paper's are independent), and nothing is
    added to h's denominator.

    Args:
        student_tap, teacher_tap: dotted module names of the last vectors before the classifiers; maps are flattened.
        negatives: K, how many images of other classes each image is compared with.
        temperature: divides the products of the embeddings, above 0 (the published code's value).
        momentum: the share of its old value that a memory keeps when its image is seen, in [0, 1).
        dimensions: D, length of the embeddings.
    """

    sees_batch = True  # the bank learns from a whole batch after it
    hard_labels = True
    replicated = ("student_bank", "teacher_bank", "log_means", "started", "order", "counts")

    def __init__(
        self,
        *taps,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        dimensions: int = 128,
        weight: float = 0.8,
        **kwargs,
    ):
        super().__init__(*taps, weight=weight, **kwargs)
        self.require(negatives > 0, f"negatives {negatives} must be above 0")
        self.keep_positive(temperature=temperature)
        self.require(0 <= momentum < 1, f"momentum {momentum} must be in [0, 1)")
        self.require(dimensions > 0, f"dimensions {dimensions} must be above 0")
        self.negatives, self.momentum, self.dimensions = negatives, momentum, dimensions

    def setup(self, setting: Setting) -> None:
        labels = setting.labels
        self.require(labels is not None, "needs the training images' labels, to draw negatives by class")
        counts = torch.bincount(labels[labels >= 0], minlength=setting.num_classes or 0)
        self.require((counts > 0).sum() > 1, "the training images are of one class; negatives are images of another")
        self.student_embedding, self.teacher_embedding = (
            nn.Linear(math.prod(shape), self.dimensions) for shape in self.shapes(setting)
        )
        for number, name in enumerate(("student_bank", "teacher_bank")):
            base = keyed.key(torch.initial_seed(), keyed.Purpose.NEGATIVES, number)
            self.register_buffer(name, self._first_values(len(labels), base))
        self.register_buffer("log_means", torch.zeros(2))  # log(Z / M) where student and teacher are the anchors
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("order", labels.argsort(stable=True)[len(labels) - int(counts.sum()) :], persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.whole = len(labels) < PRODUCT_GAIN * self.negatives

    def _first_values(self, number: int, base: int) -> Tensor:
        """Uniform in +-sqrt(3 / D), so that a row's expected square length is 1."""
        column = torch.arange(self.dimensions)
        parts = (keyed.keys(keyed.keys(base, rows)[:, None], column) for rows in torch.arange(number).split(1 << 16))
        return torch.cat([2 * keyed.uniform(part) - 1 for part in parts]) * math.sqrt(3 / self.dimensions)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        mine, theirs = (feature.flatten(1) for feature in self.features(student, teacher))
        anchors = F.normalize(self.student_embedding(mine)), F.normalize(self.teacher_embedding(theirs))
        with torch.no_grad():
            value, gradients = self._step([anchor.detach() for anchor in anchors], batch)
        # The gradient is found before the banks change, without a graph: the sum is 0 and has this gradient.
        for anchor, gradient in zip(anchors, gradients, strict=True):
            value = value + (gradient * (anchor - anchor.detach())).sum()
        return value

    def _step(self, anchors: list[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The value and its gradients by the anchors; then the banks learn the anchors of all processes."""
        negatives = draw_negatives(batch.keys, batch.labels, self.negatives, self.order, self.counts)
        places = torch.cat([batch.index[:, None], negatives], 1)
        banks = self.student_bank, self.teacher_bank
        opposite = zip(anchors, reversed(banks), strict=True)
        logits = [products(anchor, bank, places, self.whole) / self.temperature for anchor, bank in opposite]
        means = torch.stack([each.logsumexp(1) - math.log(places.shape[1]) for each in logits], 1)
        rows, index = global_rows(torch.cat([*anchors, means], 1), batch), global_rows(batch.index, batch)
        estimate = rows[:, -2:].logsumexp(0) - math.log(len(rows))
        self.log_means.copy_(torch.where(self.started, self.log_means, estimate))
        self.started.fill_(True)
        value, gradients = 0.0, []
        for each, log_mean, bank in zip(logits, self.log_means, reversed(banks), strict=True):
            part, slope = contrast(each - log_mean - math.log(self.negatives))
            value = value + part
            gradients.append(weighted_sums(slope, bank, places, self.whole) / self.temperature)
        for bank, seen in zip(banks, rows[:, :-2].split(self.dimensions, 1), strict=True):
            bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * seen)
        return value, gradients
