"""Deep Mutual Learning. Zhang, Xiang, Hospedales, Lu. 2017. https://arxiv.org/abs/1706.00384

Several networks are trained on the same images, each on the labels and on what the others give for them (equations 1
to 5). Without terms between them it is several students for one pass of a teacher.

Differs from the paper: all networks are updated at once, from predictions of one moment; the paper updates one after
the other and predicts again in between.
"""

from typing import Any

import torch
from torch import nn

from kd import keyed
from kd.outputs import Batch, Outputs
from kd.students.learner import Learner, Making
from kd.util.errors import UserError


class Cohort(Learner):
    """Networks `peer1`, `peer2`, ... that learn side by side, and `mean`, the mean of their logits, as a teacher.

    `peer1` is the run's own network, trained as it would be alone. Each other one has first weights and dropout of its
    own. The paper's objective is a term CrossEntropy for `peer*` and a term KL at temperature 1 for `peer*` from
    `peer*`; `mean` holds each peer's own logits too.

    Args:
        size: how many networks.
        others: names of the networks after the first, size - 1 of them; none for the run's own, with its arguments.
        others_args: keyword arguments of those; with `others` only.
    """

    untrained = ("mean",)

    def __init__(self, size: int = 2, others: list[str] | None = None, others_args: dict[str, Any] | None = None):
        super().__init__()
        if size < 1:
            raise ValueError(f"Cohort: size {size} must be 1 or more")
        if others and len(others) != size - 1:
            raise ValueError(f"Cohort: others names {len(others)} networks; of size {size} it must name {size - 1}")
        if others_args and not others:
            raise ValueError("Cohort: others_args without others; the run's model_args are those of all peers")
        self.size, self.others, self.others_args = size, others, others_args

    def setup(self, student: nn.Module, making: Making) -> None:
        self.names = (*(f"peer{number}" for number in range(1, self.size + 1)), "mean")
        others, arguments = self.others, self.others_args or {}
        if not others:
            others, arguments = [student.recipe["model"]] * (self.size - 1), student.recipe["model_args"]
        made = (making.make(other, arguments, number) for number, other in enumerate(others, 2))
        self.peers = nn.ModuleList([student, *made])

    @property
    def networks(self) -> dict[str, nn.Module]:
        return dict(zip(self.names, self.peers, strict=False))

    def tap(self, output: str, names) -> None:
        if output != "mean":
            super().tap(output, names)
        elif names:
            raise UserError(f"Cohort: the mean of the peers has no features ({', '.join(names)}); tap a peer")

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        outputs = {}
        for number, (name, peer) in enumerate(self.networks.items()):
            keys = batch.keys
            if number > 0 and keys is not None:
                keys = keyed.keys(keyed.key(keyed.Purpose.MEMBER, number), keys)
            outputs[name] = peer.outputs(batch.inputs, keys)
        if "mean" in self.used:
            outputs["mean"] = Outputs(torch.stack([part.logits.detach() for part in outputs.values()]).mean(0))
        return outputs
