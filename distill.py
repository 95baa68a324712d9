#!/usr/bin/env python
"""Train a student on what a teacher gives and on labels.

python distill.py --config recipes/digits/kd.yaml --teacher runs/digits/teacher
"""

from kd.util.errors import run_script, say


def main(argv: list[str] | None = None) -> int:
    """Distil, and return the exit status: 0 when finished, 128 + the signal when a signal stopped it."""
    from kd.run.config import DistillConfig  # all imports that take time are in here, where Ctrl-C is one line
    from kd.run.parse import parse

    config = parse(DistillConfig, argv)

    from kd.data import load_data  # --help and --print_config need none of these
    from kd.teachers.load import load_teachers, other_sizes, settle_stored
    from kd.teachers.precompute import precompute_teachers
    from kd.train import setup
    from kd.train.conclude import conclude
    from kd.train.fit import fit
    from kd.train.inputs import remember
    from kd.train.trial import try_first_batch

    accelerator = setup.make_accelerator(config)
    settle_stored(config)
    with setup.open_run(config, accelerator) as run:
        if run.finished:
            return 0
        data = load_data(config.data)
        mean, device, trust = config.teacher_mean, accelerator.device, config.trust_code
        teachers = load_teachers(config.teacher, data.classes, mean, device, trust)
        for line in other_sizes(teachers, data.image_shape):
            say(f"note: the teacher {line}")
        network = setup.build_trained(config.student, data, config)
        learner = setup.build_learner(network, teachers, data, config)
        distiller = setup.build_distiller(learner, teachers, data, config)
        teachers = teachers if distiller.needs_teacher else None  # what no term compares with is not computed
        remember(run, config, data)
        setup.announce(distiller, data, config, accelerator)
        try_first_batch(distiller, teachers, data, config, accelerator)
        setup.choose_batch_norm(distiller, config, accelerator)
        setup.compile_step(distiller, config, accelerator)
        data = precompute_teachers(data, teachers, config, accelerator, run)
        fitted = fit(distiller, teachers, data, config, accelerator, run)
        return conclude(fitted, data, config, accelerator, run)


def command() -> None:
    """The console command: `main` on the command line's arguments, an error of the user's in one line."""
    run_script(main)


if __name__ == "__main__":
    command()
