"""`python -m kd.workspace`, see `kd.track.workspace`."""

from kd.track.workspace import main
from kd.util.errors import run_script

if __name__ == "__main__":
    run_script(main)
