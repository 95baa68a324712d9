"""The images of a run that its export is tried on; noise where its data is not on this disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.data import Split, load_data
from kd.data.identity import changes, identity
from kd.data.split import balanced_order
from kd.models import Classifier
from kd.run.recorded import recorded_data
from kd.util.contents import read_config, read_inputs
from kd.util.errors import UserError


class RunImages:
    """Images as the run's network takes them, uint8 (N, C, H, W), and their labels in the order of its classes.

    Nothing is downloaded; `folders` are `cache_dir` and `download_dir`, where they are not the default. `absent` is why
    there is only noise, None where the run's images are there.
    """

    def __init__(self, run: Path, classifier: Classifier, **folders: str | None):
        self.classifier, self.view = classifier, classifier.preprocess.view
        self.data = self.absent = None
        try:
            self.data = _open(run, classifier, folders)
        except UserError as error:
            self.absent = str(error)
        size = self.view.source_size or (self.data.image_shape[1:] if self.data else None)
        if size is None:
            raise UserError(f"run {str(run)!r} does not say its images' size, and its data is absent: {self.absent}")
        self.shape = (self.view.channels, *size)

    def some(self, split: str, count: int) -> Tensor:
        """At most `count` images of a split, of all classes alike, or as many of noise."""
        if self.data is None:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(0, 256, (count, *self.shape), generator=generator, dtype=torch.uint8)
        part = getattr(self.data, split)
        return self._read(part, np.sort(balanced_order(part.labels, 0)[:count]))

    def batches(self, split: str, size: int = 64):
        """All images and labels of a split of the run's data, in batches."""
        part = getattr(self.data, split)
        places = [self.classifier.classes.index(name) for name in self.data.classes]
        for start in range(0, len(part), size):
            where = np.arange(start, min(start + size, len(part)))
            yield self._read(part, where), torch.tensor([places[label] for label in part.labels[where]])

    def _read(self, part: Split, where: np.ndarray) -> Tensor:
        images = part.read(where, torch.device("cpu"))[0]["image"]
        if self.view.channels == 1 and images.shape[1] == 3:  # luminance, as `Preprocess` has it
            weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
            return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
        return images.expand(-1, self.view.channels, -1, -1).contiguous()  # grey is repeated


def _open(run: Path, classifier: Classifier, folders: dict[str, str | None]):
    if not (run / "config.yaml").is_file():
        raise UserError("it has no config.yaml")
    settings = read_config(run)["data"]
    data, source = load_data(recorded_data(settings, str(run), **folders), download=False), settings["source"]
    if set(data.classes) != set(classifier.classes):
        raise UserError(f"{source} has other classes than the run")
    if data.image_shape[1:] != (classifier.preprocess.view.source_size or data.image_shape[1:]):
        raise UserError(f"{source} holds images of another size than the run was trained with")
    before = (read_inputs(run) or {}).get("data")
    if before and (other := changes(before, identity(data))[0]):
        raise UserError(f"{source} has changed since the run was trained: its {', '.join(other)} split differs")
    return data
