"""`python -m kd.models`: names by their source, a network with arguments, and one line for what it cannot build."""

from __future__ import annotations

import pytest
from conftest import assert_one_line

pytestmark = pytest.mark.first_tier(1)

MODULE = "kd.models.__main__"


def test_names_by_source(call):
    result = call(MODULE)
    assert result.status == 0
    heads = ("ours, small:", "comparison:", "CIFAR-10:", "torchvision's:")
    small, cifar, resnets, others = (result.out.split(head)[1] for head in heads)
    assert "light_nn" in small.split("ours, of")[0]
    assert "wrn_16_1" in cifar.split("ours, of")[0]
    assert "cifar10_resnet56" in resnets.split("torchvision's")[0]
    assert "mobilenet_v3_small" in others
    assert max(map(len, result.out.splitlines())) <= 80


def test_arguments_of_a_network(call):
    plain, wide = (
        call(MODULE, "resnet50", "--size", 32, *more) for more in ((), ("--model_args", "{width_per_group: 32}"))
    )
    assert (plain.status, wide.status) == (0, 0)
    assert plain.out.split("parameters")[0] != wide.out.split("parameters")[0]


def test_a_name_with_its_source(call):
    assert call(MODULE, "torchvision:alexnet").out.startswith("torchvision:alexnet: 57,044,810 parameters")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("timm:resnet18",), ["unknown source of networks 'timm'", "known: torchvision"]),
        (("torchvision:resnt18",), ["did you mean 'resnet18'"]),
        (("resnt18",), ["unknown model 'resnt18'", "did you mean 'resnet18'"]),
        (("nowhere.Net",), ["nowhere.Net"]),
        (("resnet18", "--model_args", "3"), ["--model_args '3'", "{width: 2}"]),
        (("resnet18", "--model_args", "{a"), ["--model_args '{a'", "{width: 2}"]),
        (("resnet18", "--model_args", "{1: 2}"), ["--model_args '{1: 2}'", "{width: 2}"]),
        (("resnet18", "--model_args", "{groups: x}"), ["resnet18", "groups"]),
        (("resnet18", "--model_args", "{groups: 3}"), ["resnet18", "groups"]),
        (("resnet18", "--model_args", "{depth: 3}"), ["resnet18", "depth"]),
        (("light_nn", "--model_args", "{depth: 3}"), ["argument of light_nn 'depth'"]),
        (("light_nn", "--size", "0"), ["--size 0", "1 or more"]),
        (("light_nn", "--num_classes", "-2"), ["--num_classes -2", "1 or more"]),
        (("light_nn", "--num_classes", "x"), ["--num_classes", "'x'"]),
        (("vgg8", "--size", "7"), ["vgg8", "7x7"]),
    ],
)
def test_what_it_cannot_build(call, arguments, words):
    assert_one_line(call(MODULE, *arguments), *words)
