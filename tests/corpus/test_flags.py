"""Flags and recipes that are wrong, odd or hostile: one line each, and what is meant is taken."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import yaml
from conftest import assert_one_line

from kd.losses import LOSSES
from kd.run.config import DistillConfig, EvaluateConfig, TeacherConfig
from kd.run.objective import explain_loss
from kd.run.parse import parse
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1)

FLAGS = [
    (("--seed", 2**70), "seed 1180591620717411303424 must be at least 0 and below 9223372036854775808"),
    (("--seed", "9" * 5000), "seed: Exceeds the limit (4300 digits)"),
    (("",), "unexpected argument ''"),
    (("--losses.CrossEntropy.weight", "[1"), "--losses.CrossEntropy.weight: '[1' cannot be read as YAML"),
    (("--losses", "[{class_path: CrossEntropy"), "is of the wrong type; it takes list"),
    (("--losses", "[math.pi]"), "losses: Import path math.pi does not correspond to a subclass of Loss"),
    (("--losses", "[{class_path: CrossEntropy, init_args: {weight: a}}]"), "CrossEntropy: weight: 'a' is of the wrong"),
    (("--data.source", "~nouser/x"), "data.source '~nouser/x': there is no user of this name here"),
    (("--data.cache_dir", "~nouser/x"), "data.cache_dir '~nouser/x': there is no user of this name here"),
    (("--data.source", ""), "data.source is empty"),
    (("--output_dir", "~nouser/x"), "output_dir '~nouser/x': there is no user of this name here"),
    (("--config", "~nouser/x"), "~nouser/x cannot be read"),
    (("--num_threads", 10**9), "num_threads 1000000000 must be at least 1 and at most 1024 or null"),
    (("--peer_timeout", 10**12), "peer_timeout 1000000000000 must be at least 1 and at most 10000000"),
    (("--data.pad_crop", 100000), "data.pad_crop 100000 must be at least 0 and at most 1024"),
    (("--data.std", "[.inf]"), "data.std inf must be above 0 and finite"),
    (("--data.mean", "[.nan]"), "data.mean nan must be finite"),
    (("--optimizer.milestones", "[-1]"), "optimizer.milestones -1 must be above 0"),
    (("--optimizer.gamma", -1), "optimizer.gamma -1 must be above 0 and finite"),
    (("--model_args", "[" * 3000), "it takes dict"),
    (("--model_args", "&m {a: *m}"), "nested too deeply, or holds itself"),
    (("--output_dir", "a$"), "output_dir 'a$'", "a dollar itself is written $$"),
    (("--overwrite", "maybe"), "overwrite: 'maybe' is of the wrong type; it takes bool"),
    (("--epochs", "--seed", 3), "--epochs has no value"),
    (("--lr", 1), "did you mean 'optimizer.lr'?"),
    (("--learning_rate", 1), "did you mean 'optimizer.lr'?"),
    (("--batch-size", 1), "did you mean 'data.batch_size'?"),
    (("--student", "light_nn"), "did you mean 'model'?"),
    (("--sead", 1), "unknown field 'sead' (did you mean 'seed'?); --help lists all"),
    (("--qqq", 1), "unknown field 'qqq'; --help lists all"),
    (("--config", "recipes/digits/kd.yaml"), "is a recipe of distill.py", "'student'"),
    (("--losses.help", "KLX"), "unknown loss 'KLX' (did you mean 'KL'?)"),
    (("--learner", "ReusedHed"), "unknown learner 'ReusedHed' (did you mean 'ReusedHead'?)", "my_package.MyLearner"),
    (("--learner", "Cohort", "--learner.sise", 3), "unknown argument of Cohort 'sise' (did you mean 'size'?)"),
    (("--learner", "{class_path: Cohort, init_args: {size: many}}"), "Cohort: size: 'many' is of the wrong type"),
    (("--learner", "Cohort", "--learner.size", 0), "learner: Cohort: size 0 must be 1 or more"),
    (("--learner.size", 3), "learner.size: there is no learner yet; give --learner NAME first"),
]


@pytest.mark.parametrize(("arguments", "words"), [(row[0], row[1:]) for row in FLAGS], ids=lambda v: str(v)[:40])
def test_flag(call, arguments, words):
    result = call("train_teacher", *arguments)
    assert_one_line(result, *words)
    assert len(result.err) < 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "x"), "did you mean 'student'?"),
        (("--config", "recipes/digits/teacher.yaml"), "is a recipe of train_teacher.py, which alone has the field 'mo"),
        (("--teacher", "x", "--losses.DKD.beta", 1), "these are the objective's"),
    ],
)
def test_flag_of_distill(call, arguments, words):
    assert_one_line(call("distill", *arguments), words)


RECIPES = {
    "seed: 1\nseed: 2\n": "the key 'seed' stands twice",
    "data: {source: digits, source: mnist}\n": "the key 'source' stands twice",
    "model_args: &m {a: *m}\n": "recursive",
    "model_args: " + "[" * 3000 + "]" * 3000: "cannot be read",
    "seed: " + "9" * 5000: "Exceeds the limit (4300 digits)",
    "notes: 2020-13-41\n": "cannot be read",
    "data: null\n": "data is empty; leave it out for the defaults",
    "losses: null\n": "losses is empty; leave it out for the defaults",
    "losses: [{class_path: CrossEntropy, init_args: }]\n": "CrossEntropy: init_args is empty",
    "losses: [CrossEntropy: ]\n": "is neither a name nor class_path and init_args",
    "losses: [null]\n": "None is neither a name nor class_path and init_args",
    "losses: 3\n": "losses: 3 is no list",
    "optimizer: {lr: .nan}\n": "optimizer.lr nan must be above 0 and finite",
    "1: 2\n": "unknown field '1'",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: text[:30])
def test_recipe(call, tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = call("train_teacher", "--config", tmp_path / "recipe.yaml")
    assert_one_line(result, RECIPES[recipe])
    assert len(result.err) < 500


def test_a_pipe_is_not_waited_for(call, tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    assert_one_line(call("train_teacher", "--config", tmp_path / "config.yaml"), "is no file")
    assert_one_line(call("train_teacher", "--config", tmp_path), "is no file")


def test_anchors_that_end_are_taken(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: &d {source: mnist, flip: true}\nmodel_args: {<<: *d, flip: false}\n")
    config = parse(TeacherConfig, ["--config", str(tmp_path / "recipe.yaml")])
    assert config.model_args == {"source": "mnist", "flip": False}


def test_what_can_be_true_may_stand_alone():
    config = parse(TeacherConfig, ["--overwrite", "--compile", "--data.flip", "--seed", "3", "--deterministic"])
    assert (config.overwrite, config.compile, config.data.flip, config.deterministic) == (True, True, True, True)
    assert parse(TeacherConfig, ["--log_media", "false"]).log_media is False
    config = parse(DistillConfig, ["--teacher", "t", "--losses.KL.standardize", "--seed", "3"])
    assert (config.losses[0].standardize, config.seed) == (True, 3)
    with pytest.raises(UserError, match=r"--losses\.KL\.temperature has no value"):
        parse(DistillConfig, ["--teacher", "t", "--losses.KL.temperature"])
    evaluated = parse(EvaluateConfig, ["--trust_code", "runs/a", "--latency", "false", "runs/b"], positional="runs")
    assert (evaluated.trust_code, evaluated.latency, evaluated.runs) == (True, False, ["runs/a", "runs/b"])


def test_a_dollar_can_be_written_and_is_kept_by_the_runs_own_config(tmp_path):
    config = parse(TeacherConfig, ["--output_dir", str(tmp_path / "a$$b")])
    assert config.output_dir == str(tmp_path / "a$b")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved))
    assert parse(TeacherConfig, ["--config", str(tmp_path / "config.yaml")]).output_dir == config.output_dir


def test_what_is_printed_is_what_runs(capsys):
    flags = ["--config", "recipes/digits/kd.yaml", "--losses.KL.temperature", "8", "--teacher", "t", "--seed=5"]
    with pytest.raises(SystemExit) as end:
        parse(DistillConfig, [*flags, "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == parse(DistillConfig, flags).resolved
    assert printed["losses"][0]["init_args"]["temperature"] == 8.0


def test_a_flag_changes_the_loss_inside_a_term(capsys):
    recipe = ["--config", "recipes/digits/mutual.yaml"]
    config = parse(DistillConfig, [*recipe, "--losses.KL.temperature", "3", "--losses.Term.student", "peer1"])
    assert [term.student for term in config.losses] == ["peer1", "peer1"]
    assert config.losses[1].loss.temperature == 3.0
    assert config.resolved["losses"][1]["init_args"]["loss"]["init_args"]["temperature"] == 3.0
    with pytest.raises(UserError, match=r"unknown loss in --losses\.DKD\.beta 'DKD'; known: CrossEntropy, KL, Term"):
        parse(DistillConfig, [*recipe, "--losses.DKD.beta", "3"])


@pytest.mark.parametrize(
    ("config_class", "flags", "message"),
    [
        (TeacherConfig, ["--epochs", "0"], "epochs 0"),
        (TeacherConfig, ["--losses", "[KL]"], "KL needs a teacher"),
        (TeacherConfig, ["--losses", "[]"], "no loss is given"),
        (DistillConfig, [], "teacher is not given"),
        (DistillConfig, ["--teacher", "t", "--losses.KL.temperature", "-1"], "temperature"),
    ],
)
def test_what_is_refused_is_not_printed(config_class, flags, message, capsys):
    with pytest.raises(UserError, match=message):
        parse(config_class, [*flags, "--print_config"])
    assert capsys.readouterr().out == ""


def test_the_help_of_a_loss_names_flags_that_work(capsys):
    recipe = ["--config", "recipes/digits/kd.yaml"]
    with pytest.raises(SystemExit):
        parse(DistillConfig, [*recipe, "--losses.help", "KL"])
    text = capsys.readouterr().out
    assert "softened probabilities" in text
    flags = [line.split() for line in text.splitlines() if line.strip().startswith("--losses.")]
    assert [flag for flag, _ in flags] == [f"--losses.KL.{name}" for name in ("temperature", "standardize", "weight")]
    parse(DistillConfig, [*recipe, *(word for pair in flags for word in pair)])


@pytest.mark.parametrize("name", LOSSES)
def test_the_help_of_a_loss_explains_every_argument_that_it_shows(capsys, name):
    explain_loss(name)
    text, _, flags = capsys.readouterr().out.partition("\nAdd it to a recipe:")
    shown = re.findall(rf"--losses\.{name}\.(\w+)", flags)
    explained = [one for entry in re.findall(r"^    (\w+(?:, \w+)*): \S", text, re.M) for one in entry.split(", ")]
    assert sorted(explained) == sorted(shown) == sorted(inspect.signature(LOSSES[name]).parameters)


@pytest.mark.parametrize(("script", "first"), [("distill", ["student", "teacher"]), ("train_teacher", ["model"])])
def test_the_networks_come_first_in_the_help(call, script, first):
    words = [word[2:] for word in call(script, "--help").out.split() if word.startswith("--")]
    words = [word for word in dict.fromkeys(words) if word not in ("help", "config", "print_config", "FIELD")]
    assert words[: len(first)] == first


LAUNCH = ["python", "/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bash"], []),
        (["python", "train_teacher.py"], []),
        ([*LAUNCH, "--num_processes", "1", "train_teacher.py", "--accumulate", "2"], []),
        ([*LAUNCH, "--num_processes=1", "--gradient_accumulation_steps", "2", "t.py"], []),
        (
            [*LAUNCH, "--num_processes=1", "--gradient-accumulation-steps=4", "t.py"],
            ["steps 4 is not used; --accumulate 2"],
        ),
        ([*LAUNCH, "--cpu", "--num-processes", "2", "t.py"], ["given num_processes 2 and has started 1", "cpu_2proc"]),
        ([*LAUNCH, "t.py", "--seed", "1"], ["has no config and started 1 process,"]),
        (["python", "-m", "accelerate.commands.launch", "t.py"], ["has no config"]),
    ],
)
def test_what_the_launcher_was_given(command, words, monkeypatch):
    from kd.train import launched

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launched, "default_config_file", "/nowhere.yaml")
    notes = launched.launcher_notes(command, accumulate=2)
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in words)
