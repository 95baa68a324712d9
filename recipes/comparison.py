#!/usr/bin/env python
"""Write the recipes of the usual CIFAR comparison: every method for every pair, from the tables below.

    python recipes/comparison.py                         # recipes/cifar100/TEACHER_STUDENT/METHOD.yaml
    python recipes/comparison.py cifar10 --epochs 24     # the same for CIFAR-10, everything ten times shorter

The schedule and the methods' weights are those of Tian, Krishnan, Isola 2020, Contrastive Representation Distillation
(https://arxiv.org/abs/1910.10699), which later papers keep: 240 epochs, batch 64, SGD 0.05 (0.01 for the mobile
networks), momentum 0.9, weight decay 5e-4, times 0.1 after epochs 150, 180 and 210, crops of 4 pixels and flips.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

# Published top-1 of CIFAR-100, percent, of the last epoch: the teacher and the student trained alone, then distilled.
PUBLISHED = """
teacher      student             teacher student kd    fitnet at    sp    cc    vid   rkd   pkt   ab    ft    nst   crd   dkd   dist  kd_standardized
wrn_40_2     wrn_16_2            75.61   73.26   74.92 73.58 74.08 73.83 73.56 74.11 73.35 74.54 72.50 73.25 73.68 75.48 76.24 -     76.11
wrn_40_2     wrn_40_1            75.61   71.98   73.54 72.24 72.77 72.43 72.21 73.30 72.22 73.45 72.38 71.59 72.24 74.14 74.81 74.43 74.37
resnet56     resnet20            72.34   69.06   70.66 69.21 70.55 69.67 69.63 70.38 69.61 70.34 69.47 69.84 69.60 71.16 71.97 71.75 71.43
resnet110    resnet32            74.31   71.14   73.08 71.06 72.31 72.69 71.48 72.61 71.82 72.61 70.98 72.37 71.96 73.48 74.11 -     74.17
resnet32x4   resnet8x4           79.42   72.50   73.33 73.50 73.44 72.94 72.97 73.09 71.90 73.64 73.17 72.86 73.30 75.51 76.32 76.31 76.62
vgg13_cifar  vgg8                74.64   70.36   72.98 71.02 71.43 72.68 70.71 71.23 71.48 72.88 70.94 70.58 71.53 73.94 74.68 -     74.36
resnet32x4   shufflenet_v2_cifar 79.42   71.82   74.45 73.54 72.73 74.56 71.29 73.40 73.21 74.69 74.31 72.50 74.68 75.65 77.07 77.35 75.56
vgg13_cifar  mobilenet_v2_half   74.64   64.60   67.37 64.14 59.40 66.30 64.86 65.56 64.52 67.13 66.06 61.78 58.16 69.73 69.71 -     68.61
resnet20     resnet8             -       -       -     -     -     -     -     -     -     -     -     -     -     -     -     -     -
"""

# The side in pixels of each stage's map, for images of 32 pixels. Features are compared where both networks have a map
# of that side; the published comparison counts stages instead, and pools where sides differ. For the ResNets and WRNs
# that is the same.
STAGES = {
    "resnet": {32: "stage1", 16: "stage2", 8: "stage3"},
    "wrn": {32: "stage1", 16: "stage2", 8: "stage3"},
    "vgg": {32: "stage1", 16: "stage2", 8: "stage3", 4: "stage5"},
    "shufflenet": {16: "stage1", 8: "stage2", 4: "stage3"},
    "mobilenet": {16: "stage1", 8: "stage2", 4: "stage3", 2: "stage4"},
}
MOBILE = ("shufflenet", "mobilenet")
OTHER_WIDTH = ("wrn_40_1", "resnet8x4", "shufflenet_v2_cifar", "mobilenet_v2_half")  # students that FSP cannot compare
DKD_BETA = {  # 8 for all other pairs (https://arxiv.org/abs/2203.08679, the published configurations)
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("vgg13_cifar", "vgg8"): 6.0,
    ("vgg13_cifar", "mobilenet_v2_half"): 6.0,
}

# alpha and beta, 1 and 8 for all other pairs (https://arxiv.org/abs/2305.13948, the published configurations)
IKL_WEIGHTS = {
    ("wrn_40_2", "wrn_16_2"): (3.0, 12.0),
    ("resnet56", "resnet20"): (1.0, 4.0),
    ("resnet110", "resnet32"): (1.0, 12.0),
    ("vgg13_cifar", "vgg8"): (1.0, 12.0),
    ("resnet32x4", "shufflenet_v2_cifar"): (3.0, 12.0),
    ("vgg13_cifar", "mobilenet_v2_half"): (4.0, 12.0),
}

# 5 for all other pairs (https://arxiv.org/abs/2104.09044, the published script)
REVIEW_WEIGHT = {
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("resnet32x4", "shufflenet_v2_cifar"): 8.0,
}

CE, LITTLE_CE = ("CrossEntropy", {}), ("CrossEntropy", {"weight": 0.1})
# Method: which features it compares, and its terms; arguments that are not named here have the paper's defaults.
METHODS = {
    "kd": (None, [("KL", {"temperature": 4.0, "weight": 0.9}), LITTLE_CE]),
    "kd_standardized": (None, [("KL", {"temperature": 2.0, "standardize": True, "weight": 9.0}), LITTLE_CE]),
    "dkd": (None, [("DKD", {}), CE]),
    "dist": (None, [("DIST", {}), CE]),
    "nkd": (None, [("NKD", {}), CE]),
    "mlkd": (None, [("MLKD", {}), LITTLE_CE]),
    "ctkd": (None, [("CTKD", {}), LITTLE_CE]),
    "ikl": (None, [("IKL", {}), CE]),
    "rld": (None, [("RLD", {}), CE]),
    "fitnet": ("middle", [("FitNet", {}), CE]),
    "at": ("stages", [("AT", {}), CE]),
    "nst": ("stages", [("NST", {}), CE]),
    "fsp": ("stages", [("FSP", {}), CE]),
    "ft": ("last", [("FT", {}), CE]),
    "ab": ("preact", [("AB", {}), CE]),
    "ofd": ("preact", [("OFD", {}), CE]),
    "vid": ("stages", [("VID", {}), CE]),
    "reviewkd": ("review", [("ReviewKD", {}), CE]),
    "mgd": ("last", [("MGD", {}), CE]),
    "cwd": ("last", [("CWD", {}), CE]),
    "ickd": ("last", [("ICKD", {}), CE]),
    "simkd": ("projector", [("SimKD", {})]),
    "rkd": ("pool", [("RKD", {}), CE]),
    "sp": ("last", [("SP", {}), CE]),
    "cc": ("pool", [("CC", {}), CE]),
    "pkt": ("pool", [("PKT", {}), CE]),
    "crd": ("pool", [("CRD", {}), CE]),
    "cka": ("pool", [("CKA", {}), CE]),
    "irg": ("stages", [("IRG", {}), CE]),
}


def published() -> dict[tuple[str, str], dict[str, float]]:
    """(teacher, student) to the published percent by method."""
    names, *rows = (line.split() for line in PUBLISHED.strip().splitlines())
    return {
        (row[0], row[1]): {name: float(n) for name, n in zip(names[2:], row[2:], strict=True) if n != "-"}
        for row in rows
    }


def taps(kind: str, teacher: str, student: str) -> dict:
    """The loss's taps for a pair of networks.

    Args:
        kind: pool, projector, middle, last, stages, preact (before the last ReLU) or review (stages and pool, the
            teacher's before the ReLU).
    """
    if kind == "pool":
        return {"student_tap": "pool", "teacher_tap": "pool"}
    mine, theirs = (next(STAGES[kind] for kind in STAGES if name.startswith(kind)) for name in (student, teacher))
    sides = sorted(mine.keys() & theirs.keys(), reverse=True)
    if kind == "projector":
        return {"student_tap": "projector", "teacher_tap": list(theirs.values())[-1]}
    if kind in ("middle", "last"):
        side = sides[len(sides) // 2] if kind == "middle" else sides[-1]
        return {"student_tap": mine[side], "teacher_tap": theirs[side]}
    ends = {"preact": (".preact", ".preact"), "review": ("", ".preact")}.get(kind, ("", ""))
    pool = ["pool"] if kind == "review" else []
    return {
        "student_taps": [mine[side] + ends[0] for side in sides] + pool,
        "teacher_taps": [theirs[side] + ends[1] for side in sides] + pool,
    }


def schedule(data: str, network: str, epochs: int) -> dict:
    """What all recipes share; the learning rate falls at 5/8, 6/8 and 7/8 of the epochs."""
    settings = {"source": data, "batch_size": 64, "val_fraction": 0, "flip": True, "pad_crop": 4}
    settings |= {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}
    optimizer = {"name": "sgd", "lr": 0.01 if network.startswith(MOBILE) else 0.05, "momentum": 0.9}
    optimizer |= {
        "weight_decay": 5e-4,
        "schedule": "multistep",
        "milestones": [epochs * part // 8 for part in (5, 6, 7)],
        "gamma": 0.1,
    }
    return {"data": settings, "optimizer": optimizer, "epochs": epochs}


def recipe(path: Path, title: str, number: float | None, script: str, arguments: str, content: dict) -> None:
    """Write one recipe with its head."""
    place = "/".join(path.parts[-3:]) if path.parent.name != "networks" else f"{path.parts[-3]}/networks/{path.name}"
    said = (
        f"Published: {number:.2f} % test accuracy of CIFAR-100. " if number else "No published number is known here. "
    )
    head = [f"# {title}", "#", f"# {said}Not yet reproduced here.", "#"]
    head += [f"#   accelerate launch {script} --config recipes/{place}{arguments}"]
    content = {**content, "output_dir": f"runs/{place.removesuffix('.yaml')}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(head) + "\n" + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    )


def write(data: str, folder: Path, epochs: int = 240) -> list[Path]:
    """Write all recipes for one data set; returns their paths."""
    shorter = {"warmup_epochs": 20 * epochs // 240} if epochs != 240 else {}
    paths = []
    for (teacher, student), numbers in published().items():
        for name, number in ((teacher, numbers.get("teacher")), (student, numbers.get("student"))):
            paths.append(folder / data / "networks" / f"{name}.yaml")
            content = {"model": name, "losses": [{"class_path": "CrossEntropy"}], **schedule(data, name, epochs)}
            recipe(paths[-1], f"{name} trained alone.", number, "train_teacher.py", "", content)
        for method, (kind, terms) in METHODS.items():
            if method == "fsp" and student in OTHER_WIDTH:
                continue
            losses = []
            for name, arguments in terms:
                given = taps(kind, teacher, student) if kind and name != "CrossEntropy" else {}
                given |= {"beta": DKD_BETA.get((teacher, student), 8.0)} if name == "DKD" else {}
                if name == "IKL":
                    given["alpha"], given["beta"] = IKL_WEIGHTS.get((teacher, student), (1.0, 8.0))
                given |= {"weight": REVIEW_WEIGHT.get((teacher, student), 5.0)} if name == "ReviewKD" else {}
                given |= shorter if name in ("DKD", "IKL", "RLD", "ReviewKD") else {}
                losses.append(
                    {"class_path": name, "init_args": {**given, **arguments}}
                    if given or arguments
                    else {"class_path": name}
                )
            run = f"runs/{data}/networks/{teacher}"
            content = {"student": student, "teacher": run, "losses": losses, **schedule(data, student, epochs)}
            if method == "simkd":
                content["learner"] = {"class_path": "ReusedHead"}
            paths.append(folder / data / f"{teacher}_{student}" / f"{method}.yaml")
            title = f"{student} distilled from {teacher}: {' + '.join(name for name, _ in terms)}."
            recipe(paths[-1], title, numbers.get(method), "distill.py", f" --teacher {run}", content)
    return sorted(set(paths))


def main(argv: list[str] | None = None) -> None:
    """Write the recipes and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="cifar100", choices=("cifar100", "cifar10"))
    parser.add_argument("--epochs", type=int, default=240, help="at least 8; warm-up and schedule shrink with it")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 8:
        parser.error(f"--epochs {arguments.epochs} must be 8 or more")
    written = write(arguments.data, Path(__file__).parent, arguments.epochs)
    print(f"wrote {len(written)} recipes under {written[0].parent.parent}")


if __name__ == "__main__":
    main()
