"""Teachers: frozen classifiers by name, which give logits in the student's class order."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.models import Classifier, freeze
from kd.outputs import Batch, Outputs
from kd.util.errors import UserError


class Teachers(nn.Module):
    """One or several frozen classifiers. Each prepares the images in its own way; all see the same augmented images.

    Args:
        members: the classifiers by name; frozen here. Of several, `teacher` is their mean.
        classes: the student's class names, which the logits are ordered by. A member may know fewer of them: its
            outputs then say which.
        mean: of several members, the mean of their logits (a geometric mean of probabilities) or of `probabilities`
            (arithmetic; the result is the logarithm of the mean, so a temperature softens the mean).

    Attributes:
        names: of the outputs.
    """

    def __init__(self, members: Mapping[str, Classifier], classes: Sequence[str], mean: str = "logits"):
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.mean, self.classes = mean, list(classes)
        self.names = (*self.members, "teacher") if len(self.members) > 1 else tuple(self.members)
        for name, member in self.members.items():
            known = [i for i, one in enumerate(classes) if one in member.classes]
            order = torch.tensor([member.classes.index(classes[i]) for i in known])
            self.register_buffer(f"order_{name}", order, persistent=False)
            fewer = torch.tensor(known) if len(known) < len(classes) else None
            self.register_buffer(f"known_{name}", fewer, persistent=False)
        freeze(self)
        self._taps: dict[str, set[str]] = {}
        self._folded: dict[str, Classifier] = {}  # with batch norm folded, from the first batch on

    def tap(self, name: str, taps: Iterable[str]) -> None:
        """Let `outputs` have this name, with the features of these modules, by dotted name.

        Raises:
            UserError: features of the mean of several members, or no such module.
        """
        self._taps.setdefault(name, set()).update(taps)
        if name in self.members:
            self.members[name].tap(taps)
        elif taps:
            words = f"losses on features ({', '.join(taps)}) need one teacher, not the mean"
            raise UserError(f"{words}; name one of {', '.join(self.members)}")
        self._folded = {}

    @property
    def used(self) -> list[str]:
        """The names that have been tapped; where none has, the first of all or their mean."""
        return [name for name in self.names if name in self._taps] or [self.names[-1]]

    @property
    def taps(self) -> dict[str, list[str]]:
        """The modules whose features `outputs` gives, by each used name."""
        return {name: sorted(self._taps.get(name, ())) for name in self.used}

    def _apply(self, *arguments, **named):
        self._folded = {}  # the weights move to another place
        return super()._apply(*arguments, **named)

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Outputs]:
        """Logits (B, K), float32, and tapped features for the columns of a `Batch`, by name."""
        if not self._folded:
            self._folded = {name: member.folded() for name, member in self.members.items()}
        used = self.used
        wanted = [name for name in self.members if name in used or "teacher" in used]
        outputs = {name: self._of(name, inputs) for name in wanted}
        if "teacher" not in self.members and "teacher" in used:
            outputs["teacher"] = self._mean([outputs[name].logits for name in self.members])
        return {name: outputs[name] for name in used}

    def _of(self, name: str, inputs: dict[str, Tensor]) -> Outputs:
        with torch.inference_mode():
            given = self._folded[name].outputs(inputs)
        # copies: what is made in inference mode cannot be kept for a backward pass
        logits = given.logits[:, getattr(self, f"order_{name}")].float()
        features = {tap: feature.to(torch.float32, copy=True) for tap, feature in given.features.items()}
        return Outputs(logits, features, getattr(self, f"known_{name}"))

    def _mean(self, logits: list[Tensor]) -> Outputs:
        if self.mean == "logits":
            return Outputs(torch.stack(logits).mean(0))
        log_probabilities = torch.stack(logits).log_softmax(-1)
        return Outputs(log_probabilities.logsumexp(0) - math.log(len(logits)))

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        """What `outputs` gives for a batch; looked up where the batch has the columns `NAME.logits` already."""
        if f"{self.used[0]}.logits" not in batch.inputs:
            return self.outputs(batch.inputs)
        outputs = {}
        for name in self.used:
            prefix = f"{name}.features."
            features = {key[len(prefix) :]: column for key, column in batch.inputs.items() if key.startswith(prefix)}
            outputs[name] = Outputs(batch.inputs[f"{name}.logits"], features, getattr(self, f"known_{name}", None))
        return outputs

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, K) of the only member, or of the mean of all."""
        return self.outputs(inputs)[self.names[-1]].logits


def columns(outputs: dict[str, Outputs]) -> dict[str, Tensor]:
    """Outputs by name as the columns of a batch that `Teachers.forward` looks for."""
    found = {}
    for name, part in outputs.items():
        found[f"{name}.logits"] = part.logits
        found |= {f"{name}.features.{tap}": feature for tap, feature in part.features.items()}
    return found
