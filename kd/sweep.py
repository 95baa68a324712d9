"""`python -m kd.sweep`, see `kd.tools.sweep`."""

from kd.util.errors import run_command

if __name__ == "__main__":
    run_command("kd.tools.sweep")
