"""`python -m kd.export`, see `kd.tools.export.command`."""

from kd.tools.export.command import main
from kd.util.errors import run_script

if __name__ == "__main__":
    run_script(main)
