"""Knowledge Distillation with the Reused Teacher Classifier (SimKD). Chen et al. 2022. https://arxiv.org/abs/2203.14001

The student keeps its own layers up to its last feature map, a projector gives that map the teacher's channels, and the
average of the result goes through the teacher's head, which stays as it is. So the better the map resembles the
teacher's, the more the student answers like it; the paper trains on nothing but their mean squared difference.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kd.models.cifar import conv_norm
from kd.models.cut import cut, last_map, noise, up_to
from kd.models.frozen import freeze
from kd.models.taps import watched
from kd.models.torchvision_nets import head_name
from kd.util.errors import UserError


def reused_head(
    num_classes: int,
    student: str,
    student_args: dict,
    student_tap: str,
    student_map: list[int],
    teacher_map: list[int],
    factor: int = 2,
    trust: bool = False,
) -> nn.Sequential:
    """A student's `body`, the `projector` behind it, `pool`, and a frozen head `fc`; float images to logits (B, K).

    Where the student's map is larger than the teacher's, `align` averages it down to that size first, as the authors'
    code does; where it is smaller the loss must do so to the teacher's.

    Args:
        num_classes, trust: see `build_network`.
        student, student_args: the student's name, as `build_network` takes it, and its arguments.
        student_tap, student_map: dotted name of the module that gives its last feature map, and the shape (C, H, W).
        teacher_map: the shape of the map whose average the teacher's head takes.
        factor: the projector's inner convolution has the teacher's channels divided by this; of 2, 4 and 8, for which
            the authors report results, 2 is the best.
    """
    from kd.models import build_network  # which knows this function

    (mine, *sides), (theirs, *wanted) = student_map, teacher_map
    inner = max(1, theirs // factor)
    layers = [*conv_norm(mine, inner, 1), *conv_norm(inner, inner, 3), *conv_norm(inner, theirs, 1)]
    body = up_to(build_network(student, num_classes, student_args, trust), student_tap)
    align = _align(sides, [min(pair) for pair in zip(sides, wanted, strict=True)])
    pool, fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), freeze(nn.Linear(theirs, num_classes))
    return nn.Sequential(OrderedDict(body=body, align=align, projector=nn.Sequential(*layers), pool=pool, fc=fc))


def _align(sides: list[int], wanted: list[int]) -> nn.Module:
    if sides == wanted:
        return nn.Identity()
    if any(side % size for side, size in zip(sides, wanted, strict=True)):
        return nn.AdaptiveAvgPool2d(wanted)  # its gradient on a GPU is not deterministic; that of the next is
    return nn.AvgPool2d([side // size for side, size in zip(sides, wanted, strict=True)])


@torch.no_grad()
def averaged_map(teacher, image_shape: tuple[int, int, int]) -> list[int]:
    """The shape (C, H, W) of the map whose average a classifier's head takes, found with images of noise.

    Raises:
        UserError: the head is no linear layer, or takes something else.
    """
    head, maps, taken = head_name(teacher.network), [], []

    def note(name: str, inputs: tuple, output: Tensor) -> None:
        if output.ndim == 4:
            maps.append((list(output.shape[1:]), output.mean((2, 3))))
        if name == head:
            taken.append(inputs[0])

    with watched(teacher.network, note):
        teacher.eval()(noise(image_shape).to(teacher.preprocess.scale.device))
    for shape, mean in maps if taken and isinstance(teacher.network.get_submodule(head), nn.Linear) else []:
        if mean.shape == taken[0].shape and torch.allclose(mean, taken[0], 1e-3, 1e-5):
            return shape
    raise UserError(
        f"ReusedHead: the head of the teacher, a {teacher.recipe['model']}, is not one linear layer on the average "
        f"of a feature map; use a teacher that ends so, such as a ResNet"
    )


@torch.no_grad()
def reuse_head(student, teacher, image_shape: tuple[int, int, int], tap: str | None = None):
    """A classifier made of a student's body with its weights, a new projector and the teacher's head.

    Args:
        student, teacher: `Classifier`s of the same classes, in any order; the teacher may know more.
        image_shape: (C, H, W) of the stored images.
        tap: the module of the student that gives its last feature map; found where it is None.

    Raises:
        UserError: the student's last map is not known or cannot be cut out, or the teacher's head does not suit.
    """
    from kd.models import Classifier, build_network

    teacher_map, name = averaged_map(teacher, image_shape), student.recipe["model"]
    tap = tap or last_map(student.network)
    if tap is None:
        raise UserError(
            f"ReusedHead: the last feature map of {name} is not known; name its module in tap "
            f"(python -m kd.models {name} lists them)"
        )
    body, student_map = cut(student, tap, image_shape, "ReusedHead")
    model_args = {
        "student": name,
        "student_args": student.recipe["model_args"],
        "student_tap": tap,
        "student_map": student_map,
        "teacher_map": teacher_map,
    }
    network = build_network("reused_head", len(student.classes), model_args, trust=True)
    network.body.load_state_dict(body.state_dict())
    head = teacher.network.get_submodule(head_name(teacher.network))
    rows = [teacher.classes.index(known) for known in student.classes]
    network.fc.weight.copy_(head.weight[rows])
    network.fc.bias.copy_(0 if head.bias is None else head.bias[rows])
    recipe = {"model": "reused_head", "model_args": model_args}
    return Classifier(network, student.preprocess.view, student.classes, recipe).train()
