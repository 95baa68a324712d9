#!/usr/bin/env python
"""Train a student on what a teacher says and on labels.

accelerate launch distill.py --config recipes/digits/kd.yaml --teacher runs/digits/teacher
"""

from kd.util.errors import run_script, say


def main(argv: list[str] | None = None) -> int:
    """Distil, and return the exit status: 0 when finished, 128 + the signal when a signal stopped it."""
    from kd.run.config import DistillConfig  # all imports that take time are in here, where Ctrl-C is one line
    from kd.run.parse import parse

    config = parse(DistillConfig, argv)

    from kd.data import load_data
    from kd.teachers import load_teacher, other_sizes
    from kd.teachers.precompute import precompute_teacher
    from kd.train.conclude import conclude  # --help and --print_config need none of these
    from kd.train.distiller import Distiller
    from kd.train.fit import fit
    from kd.train.inputs import remember
    from kd.train.setup import announce, build_student, choose_batch_norm, compile_step, make_accelerator, open_run
    from kd.train.trial import try_first_batch

    accelerator = make_accelerator(config)
    with open_run(config, accelerator) as run:
        if run.finished:
            return 0
        data = load_data(config.data)
        teacher = load_teacher(config.teacher, data.classes, config.teacher_mean, accelerator.device, config.trust_code)
        for line in other_sizes(teacher, data.image_shape):
            say(f"note: the teacher {line}")
        student = build_student(data, config, teacher)
        distiller = Distiller(student, config.losses, teacher, data.image_shape, data.train_labels, config.seed)
        remember(run, config, data)
        announce(distiller, data, config, accelerator)
        try_first_batch(distiller, teacher.answer, data, config, accelerator)
        choose_batch_norm(distiller, config, accelerator)
        compile_step(distiller, config, accelerator)
        teacher = precompute_teacher(teacher, distiller.teacher_taps, data, config, accelerator, run)
        fitted = fit(distiller, teacher, data, config, accelerator, run)
        return conclude(fitted, data, config, accelerator, run)


def command() -> None:
    """The console command: `main` on the command line's arguments, an error of the user's in one line."""
    run_script(main)


if __name__ == "__main__":
    command()
