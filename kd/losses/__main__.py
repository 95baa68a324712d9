"""List the losses, each with its paper: `python -m kd.losses`; `distill.py --losses.help NAME` explains one."""

import inspect

from kd.losses import LOSSES, paper
from kd.util.errors import run_script


def main() -> int:
    """Print each loss's name, what it is in one line, and its paper, the first paragraph of its file with an address.

    [global batch] marks those that compare the images of a batch with each other: of all processes, with gradients.
    """
    width = max(map(len, LOSSES))
    for name, loss in LOSSES.items():
        what = inspect.getdoc(loss).splitlines()[0]
        print(f"{name:{width}}  {what}{' [global batch]' if loss.sees_batch else ''}")
        if source := paper(loss):
            print(f"{'':{width}}  {source}")
    return 0


if __name__ == "__main__":
    run_script(main)
