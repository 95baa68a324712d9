"""Learners: what is trained, by name. One file each."""

from kd.students.cohort import Cohort
from kd.students.exits import Exits
from kd.students.learner import Learner, Making, Plain
from kd.students.mean_teacher import MeanTeacher
from kd.students.reused_head import ReusedHead

LEARNERS: dict[str, type[Learner]] = {
    learner.__name__: learner for learner in (Cohort, Exits, MeanTeacher, Plain, ReusedHead)
}

__all__ = ["LEARNERS", "Learner", "Making", *LEARNERS]
