"""Networks: exact sizes, heads, frozen parts, weights from anywhere, and loading a run."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, SHARED, write_image
from PIL import Image
from torch import nn

import kd
import kd.models.__main__ as list_taps
from kd import keyed
from kd.measure import cost
from kd.models import View, build_classifier, build_network, freeze, load_classifier, state_hash
from kd.models.cifar import CIFAR_NETS, SplitShuffle
from kd.models.cifar10_resnets import CIFAR10_RESNETS
from kd.models.dropout import KeyedDropout
from kd.models.small import SMALL_NETS
from kd.models.taps import tap
from kd.models.torchvision_nets import head_name, names, replace_head
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(2)

CLASSES = [f"class {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("name", "count", "size", "arguments"),
    [
        ("deep_nn", 1_186_986, 32, {}),
        ("deep_nn", 1_186_986, 32, {"dropout": 0.0}),
        ("light_nn", 267_738, 32, {}),
        ("light_nn", 267_738, 32, {"dropout": 0.0}),
        ("deeper_cnn", 13_429_354, 224, {}),
        ("mnist_teacher", 221_962, 28, {}),
        ("mnist_student", 15_562, 28, {}),
    ],
)
def test_small_networks_have_the_published_sizes(name, count, size, arguments):
    network = build_network(name, 10, arguments)
    assert cost.num_params(network) == count
    assert network.image_size == size
    with torch.no_grad():
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 10)
    dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert bool(dropouts) == (name in ("deep_nn", "light_nn") and arguments.get("dropout") != 0.0)


# Parameters with 100 classes, those that the comparison's own code has, and the maps of 32x32 images: channels, side.
CIFAR_SIZES = {
    "resnet8": (83_892, [(16, 32), (32, 16), (64, 8)]),
    "resnet14": (181_108, [(16, 32), (32, 16), (64, 8)]),
    "resnet20": (278_324, [(16, 32), (32, 16), (64, 8)]),
    "resnet32": (472_756, [(16, 32), (32, 16), (64, 8)]),
    "resnet44": (667_188, [(16, 32), (32, 16), (64, 8)]),
    "resnet56": (861_620, [(16, 32), (32, 16), (64, 8)]),
    "resnet110": (1_736_564, [(16, 32), (32, 16), (64, 8)]),
    "resnet8x4": (1_233_540, [(64, 32), (128, 16), (256, 8)]),
    "resnet32x4": (7_433_860, [(64, 32), (128, 16), (256, 8)]),
    "wrn_16_1": (180_916, [(16, 32), (32, 16), (64, 8)]),
    "wrn_16_2": (703_284, [(32, 32), (64, 16), (128, 8)]),
    "wrn_40_1": (569_780, [(16, 32), (32, 16), (64, 8)]),
    "wrn_40_2": (2_255_156, [(32, 32), (64, 16), (128, 8)]),
    "vgg8": (3_965_028, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg13_cifar": (9_462_180, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
    "mobilenet_v2_half": (812_836, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "shufflenet_v1": (949_258, [(240, 16), (480, 8), (960, 4)]),
    "shufflenet_v2_cifar": (1_355_528, [(116, 16), (232, 8), (464, 4)]),
}


def outputs_of(network, names, images):
    """The logits and the outputs of some modules."""
    features = {}
    tap(network, names, features, "network")
    return network(images), features


def unsettle(network):
    """Batch norm as if after some training: no 0, no 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                nn.init.uniform_(value, low, high)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network


def test_every_cifar_network_is_counted_here_and_shadows_none_of_torchvision():
    assert CIFAR_SIZES.keys() == CIFAR_NETS.keys()
    assert not {*CIFAR_NETS, *CIFAR10_RESNETS, *SMALL_NETS} & set(names())
    assert not CIFAR_NETS.keys() & SMALL_NETS.keys()


@pytest.mark.parametrize("name", CIFAR_SIZES)
def test_cifar_networks_have_the_comparisons_sizes_and_one_set_of_taps(name):
    count, maps = CIFAR_SIZES[name]
    torch.manual_seed(0)
    network = unsettle(build_network(name, 100)).eval()
    assert cost.num_params(network) == count
    stages = [f"stage{i}" for i in range(1, len(maps) + 1)]
    assert not hasattr(network, f"stage{len(maps) + 1}")
    last = ["last"] if hasattr(network, "last") else []
    taps = ["stem", *stages, *(f"{stage}.preact" for stage in stages + last), *last, "pool", "fc"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = outputs_of(network, taps, images)
    assert logits.shape == (2, 100)
    assert torch.equal(features["fc"], logits)
    assert head_name(network) == "fc"
    assert features["stem"].ndim == 4
    for stage, (channels, side) in zip(stages, maps, strict=True):
        assert features[stage].shape == (2, channels, side, side)
    for stage in stages + last:
        before, after = features[f"{stage}.preact"], features[stage]
        linear = name == "mobilenet_v2_half" and stage != "last"  # its blocks end without ReLU
        assert torch.equal(after, before if linear else before.relu())
        assert before.min() < 0 < before.max()
    assert torch.allclose(features["pool"], features[(stages + last)[-1]].mean((2, 3)), atol=1e-5)
    assert torch.allclose(network.fc(features["pool"]), logits)


LONG = {"resnet32", "resnet44", "resnet56", "resnet110", "resnet32x4", "wrn_40_1"}  # as the shorter ones, but slower


@pytest.mark.parametrize("name", [name for name in CIFAR_SIZES if name not in LONG])
def test_cifar_networks_learn_in_every_part_and_take_other_sizes_and_orders_in_memory(name):
    torch.manual_seed(0)
    network = unsettle(build_network(name, 1))
    images = torch.randn(3, 3, 16, 20)
    statistics = {key: value.clone() for key, value in network.named_buffers()}
    network(images).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key.endswith("bias"), key  # batch norm takes away what a bias adds before it
    assert not any(torch.equal(value, statistics[key]) for key, value in network.named_buffers())
    network.eval()
    with torch.no_grad():
        logits = network(images)
        assert torch.equal(network(images), logits)
        assert torch.allclose(network(images.contiguous(memory_format=torch.channels_last)), logits, atol=1e-4)
        assert torch.allclose(network(images[:1]), logits[:1], atol=1e-4)
        assert build_network(name, 1000).eval()(images[:1]).shape == (1, 1000)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8", "mobilenet_v2_half"])
def test_first_weights_are_hes_by_fan_out(name):
    torch.manual_seed(0)
    network = build_network(name, 100)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            expected = (2 / (module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1])) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert module.bias is None or not module.bias.any()
    if name in ("vgg8", "mobilenet_v2_half"):
        assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert network.fc.bias.any() == (name == "resnet8")


def naive_wide_resnet(network, images, depth):
    """The original order: batch norm and ReLU start each block, whose result the shortcut takes if it is no copy."""
    convs = iter([module for module in network.modules() if isinstance(module, nn.Conv2d)])
    norms = iter([module for module in network.modules() if isinstance(module, nn.BatchNorm2d)])
    x = next(convs)(images)
    for stage in range(3):
        for block in range((depth - 4) // 6):
            activated = next(norms)(x).relu()
            first = next(convs)
            inner = next(convs)(next(norms)(first(activated)).relu())
            copied = first.in_channels == first.out_channels
            assert first.stride == ((2, 2) if stage and not block else (1, 1))
            x = inner + (x if copied else next(convs)(activated))
    x = next(norms)(x).relu()
    assert next(convs, None) is next(norms, None) is None
    return network.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("name", "depth"), [("wrn_16_1", 16), ("wrn_16_2", 16), ("wrn_40_2", 40)])
@pytest.mark.parametrize("training", [True, False])
def test_wide_resnets_are_those_of_the_original_order(name, depth, training):
    torch.manual_seed(0)
    network = unsettle(build_network(name, 7)).double().train(training)
    images = torch.randn(4, 3, 16, 16, dtype=torch.double)
    assert torch.allclose(network(images), naive_wide_resnet(network, images, depth), rtol=1e-9)


def test_a_shuffle_block_may_take_its_relu_after_the_shuffle():
    torch.manual_seed(0)
    block = build_network("shufflenet_v2_cifar", 5).eval().stage1[2]
    assert isinstance(block, SplitShuffle)
    x = torch.randn(2, 116, 8, 8).relu()
    past, through = x[:, :58], block.branch(x[:, 58:]).relu()
    expected = torch.stack((past, through), 2).flatten(1, 2)  # 0, 58, 1, 59, ...
    assert torch.equal(block(x).relu(), expected)


def test_the_modules_of_a_cifar_network_are_listed(capsys):
    list_taps.main(["resnet20", "--num_classes", "100"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet20: 278,324 parameters, images 3x32x32"
    rows = [line.split() for line in lines]
    assert ["stage2.preact", "Identity", "32x16x16"] in rows
    assert ["pool", "Sequential", "64"] in rows


def test_the_help_names_the_command_that_names_every_network_of_this_project(capsys):
    import distill
    import train_teacher

    for script in (distill, train_teacher):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        assert "python -m kd.models" in capsys.readouterr().out
    list_taps.main([])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {*CIFAR_NETS, *CIFAR10_RESNETS, *SMALL_NETS} <= words


@pytest.mark.slow
def test_deeper_cnn_is_not_cheaper_than_resnet18():
    costs = {}
    for name in ("deeper_cnn", "resnet18"):
        classifier = build_classifier(name, CLASSES, View(resize=256, crop=224))
        costs[name] = cost.multiply_adds(classifier, (3, 96, 96))
    assert costs["deeper_cnn"] == 2_137_098_752
    assert costs["resnet18"] == 1_813_566_464


def test_deeper_cnn_second_block_has_the_shape_of_layer1():
    network = build_network("deeper_cnn", 10)
    with torch.no_grad():
        assert network.features[:10](torch.zeros(1, 3, 224, 224)).shape == (1, 64, 56, 56)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("squeezenet1_1", 64),
        ("mobilenet_v3_small", 64),
        ("vgg11", 64),
        ("googlenet", 64),
        ("inception_v3", 96),
        ("densenet121", 64),
        ("shufflenet_v2_x0_5", 64),
        ("vit_b_16", 224),
    ],
)
def test_torchvision_classifiers_take_a_new_head_and_a_frozen_backbone(tmp_path, name, size):
    torch.manual_seed(0)
    trained = build_network(name, 7)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "w.safetensors")
    view = View(resize=size, crop=size)
    classifier = build_classifier(name, CLASSES, view, weights=str(tmp_path / "w.safetensors"), freeze_backbone=True)
    head = head_name(classifier.network)
    before = {key: value.clone() for key, value in classifier.network.state_dict().items()}
    trainable = {key for key, value in classifier.network.named_parameters() if value.requires_grad}
    assert trainable == {f"{head}.weight", f"{head}.bias"}
    classifier.train()
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=0.1)
    logits = classifier(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    optimizer.step()
    after = classifier.network.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert changed <= trainable
    for key, value in trained.state_dict().items():
        assert head in key or torch.equal(before[key], value)


@pytest.mark.slow
def test_every_torchvision_classifier_has_a_head_that_is_found_and_replaced():
    regnets = 0
    for name in names():
        if name.startswith("regnet"):  # cannot be built without memory: one stands for all
            regnets += 1
            if regnets > 1:
                continue
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            network = build_network(name, 7)
            head = head_name(network)
            assert network.get_submodule(head).weight.shape[0] == 7, name
            replace_head(network, 5)
            assert network.get_submodule(head).weight.shape[0] == 5, name
    assert len(names()) >= 80


def test_frozen_survives_every_train_and_eval():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)))
    parent = nn.ModuleDict({"frozen": freeze(module), "trained": nn.BatchNorm2d(3)})
    before = state_hash(module)
    for mode in (True, False, True):
        parent.train(mode)
        module.train(mode)
        module[2][0].train()
        module(torch.randn(8, 3, 6, 6) * 7 + 3)
        assert not any(part.training for part in module.modules())
        assert parent["trained"].training == mode
    assert state_hash(module) == before
    copied = copy.deepcopy(parent).train()
    copied["frozen"](torch.randn(8, 3, 6, 6))
    assert state_hash(copied["frozen"]) == before


def test_state_hash_sees_parameters_and_buffers():
    module = nn.BatchNorm1d(3)
    before = state_hash(module)
    module(torch.randn(4, 3))
    moved = state_hash(module)
    assert moved != before
    module.weight.data[1] += 1e-6
    assert state_hash(module) != moved


def test_weights_keep_a_head_of_the_right_size_only(tmp_path):
    network = build_network("resnet18", 10)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    kept = build_classifier("resnet18", CLASSES, View(), weights=str(tmp_path / "w.pth"))
    assert torch.equal(kept.network.fc.weight, network.fc.weight)
    new = build_classifier("resnet18", CLASSES[:4], View(), weights=str(tmp_path / "w.pth"))
    assert new.network.fc.weight.shape == (4, 512)
    assert torch.equal(new.network.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


@pytest.mark.slow
def test_the_new_head_depends_on_the_seed_only(tmp_path):
    torch.save(build_network("resnet18", 10).state_dict(), tmp_path / "w.pth")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(
            build_classifier("resnet18", CLASSES[:4], View(), weights=str(tmp_path / "w.pth")).network.fc.weight
        )
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    torch.save({"weight": Harm()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read"):
        build_classifier("resnet18", CLASSES, View(), weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "harmed").exists()


def test_your_own_network_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef tiny(num_classes, width=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 36, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = build_network("my_nets.tiny", 5, {"width": 4}, trust=True)
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(UserError, match=r"unknown argument of my_nets.tiny 'wdth' \(did you mean 'width'"):
        build_network("my_nets.tiny", 5, {"wdth": 4}, trust=True)


def test_keyed_dropout_is_a_function_of_the_key():
    layer = KeyedDropout(0.3, layer=0).train()
    x = torch.ones(64, 5, 40)
    layer.keys = keyed.keys(3, torch.arange(64))
    whole = layer(x)
    assert torch.equal(layer(x), whole)
    assert torch.allclose(whole.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (whole == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    layer.keys = layer.keys[10:20]
    assert torch.equal(layer(x[10:20]), whole[10:20])  # an image's mask does not depend on its neighbours
    other = KeyedDropout(0.3, layer=1).train()
    other.keys = layer.keys
    assert not torch.equal(other(x[10:20]), whole[10:20])
    assert torch.equal(layer.eval()(x), x)


def test_load_gives_the_network_its_classes_and_its_preprocessing(teacher_run, tmp_path):
    network = kd.load(teacher_run)
    assert network.classes == [str(digit) for digit in range(10)]
    assert not network.training
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    with torch.no_grad():
        predicted = network(torch.from_numpy(images[:200, None])).argmax(1).numpy()
    assert (predicted == digits.target[:200]).mean() > 0.5
    files = []
    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    results = network.predict(files, top=10)
    assert [pairs[0][0] for pairs in results] == [str(label) for label in predicted[:3]]
    assert sum(probability for _, probability in results[0]) == pytest.approx(1, abs=1e-5)
    write_image(tmp_path / "big.jpg", (200, 10, 10), size=(640, 480))  # any size and colour
    assert len(network.predict([tmp_path / "big.jpg", Image.new("L", (5, 9))])) == 2


@pytest.mark.slow
def test_a_small_network_of_ours_is_loaded_and_predicts_without_torchvision_and_without_a_warning(teacher_run):
    code = (
        "import sys, kd, numpy\n"
        "print(kd.load(sys.argv[1]).predict([numpy.zeros((9, 7, 3), numpy.uint8)]))\n"
        "assert 'torchvision' not in sys.modules"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(teacher_run)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_loading_needs_no_pickle_and_leaves_the_generator_alone(teacher_run):
    assert {path.suffix for path in teacher_run.iterdir() if path.is_file() and path.name[0] != "."} == {
        ".json",
        ".jsonl",
        ".yaml",
        ".safetensors",
    }
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_classifier(teacher_run)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="needs pretrained weights in ../shared/torch_home")
def test_pretrained_weights_from_torchs_cache(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch_home"))
    torch.manual_seed(0)
    one = build_classifier("resnet18", CLASSES, View(), weights="imagenet", freeze_backbone=True)
    torch.manual_seed(0)
    other = build_classifier("resnet18", CLASSES, View(), weights="IMAGENET1K_V1")
    assert state_hash(one.network) == state_hash(other.network)
    assert build_classifier("squeezenet1_1", CLASSES, View(), weights="imagenet").network(
        torch.zeros(1, 3, 64, 64)
    ).shape == (1, 10)


def test_known_networks_get_channels_last_images_and_a_users_own_may_use_view():
    from kd.models import Classifier

    class Own(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.fc = torch.nn.Linear(3 * 8 * 8, num_classes)

        def forward(self, images):
            return self.fc(images.view(len(images), -1))

    images, seen = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), []
    known = build_classifier("light_nn", ["a", "b"], View())
    known.network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = known.eval()(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    plain = known.network(known.preprocess(images))
    assert torch.allclose(logits, plain, atol=1e-5)
    own = Classifier(Own(2), View(resize=8), ["a", "b"], {"model": "my.Own", "model_args": {}})
    assert own(images).shape == (2, 2)


def test_floats_are_refused_with_the_remedy():
    network = build_classifier("mnist_student", CLASSES, View(channels=1, mean=(0.5,), std=(0.5,)))
    for images in (torch.rand(2, 1, 28, 28), torch.rand(2, 28 * 28)):
        with pytest.raises(TypeError, match=r"images are uint8 .*float32; .*\(255 \* images\)\.round\(\)"):
            network(images)
