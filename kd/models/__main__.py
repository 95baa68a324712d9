"""List what can be tapped in a network: `python -m kd.models light_nn`, `python -m kd.models resnet18 --size 96`."""

from __future__ import annotations

import argparse

from kd.models import build_network
from kd.models.taps import tap_shapes
from kd.util.errors import UserError, run_script


def main(argv: list[str] | None = None) -> int:
    """Print each module's dotted name, kind and output shape (without the batch axis)."""
    parser = argparse.ArgumentParser(prog="python -m kd.models", description=__doc__)
    parser.add_argument("name", help="a network by name or import path")
    parser.add_argument("--size", type=int, help="side of the images in pixels; default the network's usual, or 224")
    parser.add_argument("--num_classes", type=int, default=10)
    arguments = parser.parse_args(argv)
    network = build_network(arguments.name, arguments.num_classes, trust=True)
    size = arguments.size or getattr(network, "image_size", None) or getattr(network, "usual_size", 224)
    try:
        shapes = tap_shapes(network, (3, size, size))
    except RuntimeError as error:
        raise UserError(f"{arguments.name} does not take images of {size}x{size}: {error}") from None
    modules = dict(network.named_modules())
    width = max(map(len, shapes))
    print(f"{arguments.name}: {sum(p.numel() for p in network.parameters()):,} parameters, images 3x{size}x{size}")
    for name, shape in shapes.items():
        print(f"{name:{width}}  {type(modules[name]).__name__:18}  {'x'.join(map(str, shape))}")
    return 0


if __name__ == "__main__":
    run_script(main)
