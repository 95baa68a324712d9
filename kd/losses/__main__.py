"""List the losses, each with its paper: `python -m kd.losses`; `distill.py --losses.help NAME` explains one."""

from __future__ import annotations

import inspect
import sys

from kd.losses import LOSSES


def main() -> int:
    """Print each loss's name, what it is in one line, and its paper, the first paragraph of its file with an address.

    [global batch] marks those that compare the images of a batch with each other: of all processes, with gradients.
    """
    width = max(map(len, LOSSES))
    for name, loss in LOSSES.items():
        what = inspect.getdoc(loss).splitlines()[0]
        paragraphs = inspect.getdoc(sys.modules[loss.__module__]).split("\n\n")
        paper = next((" ".join(paragraph.split()) for paragraph in paragraphs if "http" in paragraph), "")
        print(f"{name:{width}}  {what}{' [global batch]' if loss.sees_batch else ''}")
        if paper:
            print(f"{'':{width}}  {paper}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
