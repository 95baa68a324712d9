"""What jsonargparse refuses, in one plain line that names the value, what is known and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from kd.losses import LOSSES
from kd.run.objective import arguments_of
from kd.students import LEARNERS
from kd.util.errors import UserError, unknown

# What a field is called elsewhere: in the other script, in transformers, timm, Lightning.
_OTHER_NAMES = {
    "model": "student",
    "student": "model",
    "learning_rate": "optimizer.lr",
    "opt": "optimizer.name",
    "sched": "optimizer.schedule",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "accumulate",
    "dataset": "data.source",
    "data_dir": "data.source",
    "workers": "data.num_workers",
    "pretrained": "weights",
    "resume": "output_dir",
    "resume_from_checkpoint": "output_dir",
    "optim": "optimizer.name",
    "optim_args": "optimizer.args",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_epochs",
    "clip_grad": "optimizer.clip_norm",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clip_val": "optimizer.clip_norm",
    "accumulate_grad_batches": "accumulate",
    "grad_accum_steps": "accumulate",
    "model_ema": "learner",
    "aa": "data.rand_augment",
    "reprob": "data.random_erasing",
    "early_stopping_patience": "patience",
    "load_best_model_at_end": "select",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "amp": "mixed_precision",
    "precision": "mixed_precision",
    "sync_bn": "sync_batch_norm",
    "sync_batchnorm": "sync_batch_norm",
}

# What jsonargparse says of a field that takes a learner or null: what is wrong with the learner is its first error.
_OR_NULL = re.compile(
    r"(?:Parser key \"learner\": )?Does not validate against any of the Union subtypes Subtypes: "
    r"\[<class 'kd\.students\.learner\.Learner'>.*?Errors: - (.*) - Expected a <class 'NoneType'>.*"
)
_LIMITS = {">=": "at least ", "<=": "at most ", ">": "above ", "<": "below "}


def unknown_field(name: str, fields: Iterable[str]) -> UserError:
    """The error for a field that does not exist: ours of the same meaning, or the nearest three."""
    plain = name.replace("-", "_")
    same = [f for f in fields if plain.rpartition(".")[2] in (f, f.rpartition(".")[2])]
    same += [_OTHER_NAMES[plain]] if _OTHER_NAMES.get(plain) in fields else []
    leaves = {f.rpartition(".")[2]: f for f in fields}
    near = difflib.get_close_matches(plain, fields) + [leaves[n] for n in difflib.get_close_matches(plain, leaves)]
    found = list(dict.fromkeys(same or near))[:3]
    guess = f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
    return UserError(f"unknown field {name!r}{guess}; --help lists all")


def explain(message: str) -> str:
    """jsonargparse's message in one plain line, with the known names and the nearest one."""
    message = _OR_NULL.sub(r'Parser key "learner": \1', " ".join(message.split()))
    if "Problem with given class_path" in message and "not accepted" in message:
        path, argument = message.split("'")[1:4:2]
        name = path.rpartition(".")[2]
        if path == "kd.students.Learner":
            return f"learner.{argument}: there is no learner yet; give --learner NAME first, of {', '.join(LEARNERS)}"
        remedy = f"see --losses.help {name}" if 'key "losses"' in message else ""
        return str(unknown(f"argument of {name}", argument, list(arguments_of(path)), remedy))
    for field, kind, known in (("losses", "loss", LOSSES), ("learner", "learner", LEARNERS)):
        if message.startswith(f'Parser key "{field}"') and "dot import path" in message:
            bad = message.rpartition(":")[2].strip()
            own = f"or the import path of your own, as my_package.My{kind.capitalize()}"
            return str(unknown(kind, bad, known, own))
    path, keys = re.search(r"class_path '([\w.]+)'", message), re.findall(r'Parser key "([\w.]+)":', message)
    if not keys:
        return _short(message)
    name = f"{path[1].rpartition('.')[2]}: {keys[-1]}" if path and len(keys) > 1 else keys[-1]
    rest = message.rpartition(f'Parser key "{keys[-1]}":')[2].strip()
    value = re.search(r"(?:Got|Given) value: (.*)|Not of type \w+: (.*) does not conform|: '(.*)'$", rest)
    value = next(filter(None, value.groups()), "") if value else ""
    limits = re.search(r"conform to restriction ((?:v[<>=]+\S+(?: and )?)+)", rest)
    text = (rest.partition("Errors:")[2] or rest).partition("Given value type")[0]
    kinds = re.findall(r"<class '(\w+)'>|(Literal\[.*?\])|literal for (int)|string to (float)", text)
    kinds = ["".join(kind).replace("NoneType", "null").replace("Literal", "one of ") for kind in kinds]
    if limits:
        words = limits[1].replace("v>-inf and v<inf", "finite").replace("v<inf", "finite")
        words = re.sub("v(>=|<=|>|<)", lambda sign: _LIMITS[sign[1]], words.strip())
        trained = "; a network that is trained already becomes a run by python -m kd.adopt" if name == "epochs" else ""
        return f"{name} {_short(value)} must be {' or '.join([words, *kinds])}{trained}"
    if kinds:
        return f"{name}: {_short(value)!r} is of the wrong type; it takes {' or '.join(dict.fromkeys(kinds))}"
    return f"{name}: {_short(rest)}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
