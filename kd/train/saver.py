"""What a run saves of its state while it trains, and from where it resumes."""

from __future__ import annotations

import torch

from kd.run.folder import Run
from kd.train.checkpoint import Progress, frozen_tensors, load_newest, save_checkpoint
from kd.train.distiller import Distiller
from kd.train.engine import Engine
from kd.train.kept import Best
from kd.train.recorder import Recorder
from kd.util.errors import UserError, say
from kd.util.gathers import all_finite


class Saver:
    """The checkpoints of a run.

    Args:
        distiller: with the first weights, before an engine shares them out.

    Raises:
        UserError: the run is finished and would be extended, and no whole checkpoint is left to resume from.
    """

    def __init__(self, run: Run, distiller: Distiller, config):
        self._run, self._config, self._folder = run, config, run.folder / "checkpoints"
        self._first, self._found = frozen_tensors(distiller), None
        self._frozen = frozenset(self._first)
        if run.extends:  # before it counts as unfinished
            self.find()

    def find(self) -> None:
        """Load the newest whole checkpoint where there is one; called before an engine shares the networks out."""
        self._found = self._found or load_newest(self._folder, self._first)
        if self._found is None and self._run.extends:
            raise UserError(
                f"run {str(self._run.folder)!r} is finished and holds no whole checkpoint from which a later end could "
                f"be reached; name another output_dir, or pass --overwrite true to start it again"
            )

    def resume(self, engine: Engine) -> tuple[Progress, Best]:
        """Where the run is, 0 steps without a checkpoint, and the best weights so far; the engine gets the newest.

        Raises:
            UserError: the processes see different checkpoints.
        """
        found, self._found, self._first, accelerator = self._found, None, {}, engine.accelerator
        progress, tensors = found or (Progress(), {})
        steps = accelerator.gather(torch.tensor([progress.step], device=accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"the processes see different checkpoints in {self._run.folder} (steps {steps}); "
                f"put output_dir on a disk that all nodes share"
            )
        if tensors:
            try:
                engine.load(tensors)
            except (RuntimeError, LookupError, ValueError) as error:
                raise UserError(
                    f"the newest checkpoint in {self._folder} does not fit what is trained "
                    f"({' '.join(str(error).split())[:200]}); delete it, or pass --overwrite true to start again"
                ) from None
            if progress.scaler is not None and accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(progress.scaler)
            say(f"resuming after step {progress.step}")
        best: Best = {}
        for key, value in tensors.get("best", {}).items():
            name, _, key = key.partition(".")
            best.setdefault(name, {})[key] = value
        return progress, best

    def save(self, engine: Engine, progress: Progress, recorder: Recorder, best: Best) -> None:
        """Write a checkpoint; all processes must call it.

        Raises:
            UserError: the loss or the weights are not finite, or the run's folder was deleted.
        """
        self._run.require()
        accelerator, meter = engine.accelerator, recorder.meter
        meter.check()  # what is not finite must never be kept
        with meter.aside():
            if not all_finite(list(engine.distiller.state_dict().values()), accelerator):
                raise meter.not_finite("the weights are", progress.step)
            progress.sums, progress.seconds = meter.state(), recorder.seconds
            progress.metrics_bytes = recorder.tracker.num_bytes
            progress.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            tensors = engine.tensors()
            if best:
                weights = {f"{name}.{key}": value for name, state in best.items() for key, value in state.items()}
                tensors["best"] = weights
            if accelerator.is_main_process:
                save_checkpoint(self._folder, progress, tensors, self._frozen, self._config.keep_checkpoints)
        meter.saved_step = progress.step
