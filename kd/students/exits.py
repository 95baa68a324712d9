"""Be Your Own Teacher. Zhang, Song, Gao, Chen, Bao, Ma. 2019. https://arxiv.org/abs/1905.08094

Heads at early maps of a network learn from its last one (section 3). Each exit is kept as a network of its own, cheaper
than the whole one.
"""

from torch import nn

from kd.outputs import Batch, Outputs
from kd.students.learner import Learner, Making
from kd.util.errors import UserError


class Exits(Learner):
    """The run's own network `student` with heads behind early maps, `exit1`, `exit2`, ... in the order of `taps`.

    Every output has the feature `map`: of an exit its bottleneck's map, of the student its last one, of equal shapes
    where sizes divide. The paper's objective is a term CrossEntropy for each output, a term KL for `exit*` from
    `student`, and a squared distance of `map` for `exit*` from `student`.

    Args:
        taps: dotted names of the modules whose maps the exits take; `python -m kd.models NAME` lists them.
        last_tap: the module that gives the student's last map; null where it is known, as in ResNets.
    """

    def __init__(self, taps: list[str], last_tap: str | None = None):
        super().__init__()
        if not taps:
            raise ValueError("Exits: taps is empty; name the modules behind which exits stand")
        self.taps, self.last_tap = list(taps), last_tap

    def setup(self, student: nn.Module, making: Making) -> None:
        from kd.models import Classifier
        from kd.models.cut import cut, last_map, map_of_noise
        from kd.models.exits import ExitHead, ExitNetwork

        shape, recipe = making.image_shape, student.recipe
        self.last_tap = self.last_tap or last_map(student.network)
        if self.last_tap is None:
            raise UserError(f"Exits: the last map of {recipe['model']} is not known; name its module in last_tap")
        self.student, self.heads = student, nn.ModuleList()
        last, kept = list(map_of_noise(student, self.last_tap, shape, "Exits").shape[1:]), {"student": student}
        for number, tap in enumerate(self.taps, 1):
            body, mine = cut(student, tap, shape, "Exits")
            self.heads.append(ExitHead(mine, last, len(student.classes)))
            arguments = {"student": recipe["model"], "student_args": recipe["model_args"], "tap": tap}
            network = ExitNetwork(body, self.heads[-1])
            whole = {"model": "exit", "model_args": {**arguments, "shape": mine, "last": last}}
            kept[f"exit{number}"] = Classifier(network, student.preprocess.view, student.classes, whole)
        student.train()
        self.names = tuple(kept)
        self._kept = kept  # a dict, whose modules are not registered: they are the student's and the heads'

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self._kept

    def tap(self, output: str, names) -> None:
        own = [name for name in names if name != "map"]
        if output == "student":
            self.student.tap(own)
        elif own:
            raise UserError(f"Exits: {output} has the feature 'map' alone, not {', '.join(own)}")

    def forward(self, batch: Batch) -> dict[str, Outputs]:
        whole = self.student.outputs(batch.inputs, batch.keys)
        outputs = {"student": Outputs(whole.logits, {**whole.features, "map": whole.features[self.last_tap]})}
        for number, (tap, head) in enumerate(zip(self.taps, self.heads, strict=True), 1):
            logits, maps = head(whole.features[tap])
            outputs[f"exit{number}"] = Outputs(logits, {"map": maps})
        return outputs
