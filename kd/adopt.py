"""`python -m kd.adopt`, see `kd.tools.adopt`."""

from kd.util.errors import run_command

if __name__ == "__main__":
    run_command("kd.tools.adopt")
