"""`python -m kd.predict`, see `kd.tools.predict`."""

from kd.tools.predict import main
from kd.util.errors import run_script

if __name__ == "__main__":
    run_script(main)
