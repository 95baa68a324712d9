"""List the networks by their source, or what can be tapped in one of them, with shapes.

python -m kd.models
python -m kd.models light_nn
python -m kd.models resnet50 --size 96 --model_args '{width_per_group: 32}'
"""

from __future__ import annotations

import textwrap

import yaml

from kd.models import bare, build_network, torchvision_nets
from kd.models.cifar import CIFAR_NETS
from kd.models.cifar10_resnets import CIFAR10_RESNETS
from kd.models.small import SMALL_NETS
from kd.models.taps import tap_shapes
from kd.util.errors import CommandParser, UserError, run_script


def main(argv: list[str] | None = None) -> int:
    """Print the names, or each module's dotted name, kind and output shape (without the batch axis)."""
    parser = CommandParser("models", __doc__)
    parser.add_argument("name", nargs="?", help="a network by name or import path; without it all names are listed")
    parser.add_argument("--size", type=int, help="side of the images in pixels; default the network's usual, or 224")
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--model_args", default="{}", help="further arguments of the network, as {width: 2}")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        sources = {
            "ours, small": SMALL_NETS,
            "ours, of the CIFAR-100 comparison": CIFAR_NETS,
            "ours, of He et al. for CIFAR-10": CIFAR10_RESNETS,
            "torchvision's": torchvision_nets.names(),
        }
        for source, names in sources.items():
            print(f"{source}:")
            print(textwrap.fill(", ".join(names), 80, initial_indent="  ", subsequent_indent="  "))
        return 0
    for flag in ("size", "num_classes"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} must be 1 or more")
    network = build_network(bare(arguments.name), arguments.num_classes, _mapping(arguments.model_args), trust=True)
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


def _mapping(text: str) -> dict:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UserError(f"--model_args {text!r} must be names and values, such as '{{width: 2}}'")
    return given


if __name__ == "__main__":
    run_script(main)
