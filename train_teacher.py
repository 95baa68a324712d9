#!/usr/bin/env python
"""Train one network on labels: a teacher, or a student alone.

python train_teacher.py --config recipes/digits/teacher.yaml
"""

from kd.util.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit status: 0 when finished, 128 + the signal when a signal stopped it."""
    from kd.run.config import TeacherConfig  # all imports that take time are in here, where Ctrl-C is one line
    from kd.run.parse import parse

    config = parse(TeacherConfig, argv)

    from kd.data import load_data  # --help and --print_config need none of these
    from kd.teachers.precompute import precompute_backbone
    from kd.train import setup
    from kd.train.conclude import conclude
    from kd.train.fit import fit
    from kd.train.inputs import remember
    from kd.train.trial import try_first_batch

    accelerator = setup.make_accelerator(config)
    with setup.open_run(config, accelerator) as run:
        if run.finished:
            return 0
        data = load_data(config.data)
        network = setup.build_trained(config.model, data, config)
        learner = setup.build_learner(network, None, data, config)
        distiller = setup.build_distiller(learner, None, data, config)
        remember(run, config, data)
        setup.announce(distiller, data, config, accelerator)
        try_first_batch(distiller, None, data, config, accelerator)
        setup.choose_batch_norm(distiller, config, accelerator)
        setup.compile_step(distiller, config, accelerator)
        tabled = precompute_backbone(data, learner, config, accelerator, run)
        fitted = fit(distiller, None, tabled, config, accelerator, run)
        return conclude(fitted, data, config, accelerator, run)


def command() -> None:
    """The console command: `main` on the command line's arguments, an error of the user's in one line."""
    run_script(main)


if __name__ == "__main__":
    command()
