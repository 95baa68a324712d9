"""`python -m kd.sweep`, see `kd.tools.sweep.command`."""

from kd.tools.sweep.command import main
from kd.util.errors import run_script

if __name__ == "__main__":
    run_script(main)
