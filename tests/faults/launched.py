"""`train_teacher.py` with a pause at each step, for a launcher."""

from job import Slowly

import train_teacher
from kd.util.errors import run_script

if __name__ == "__main__":
    Slowly(0.2)()
    run_script(train_teacher.main)
