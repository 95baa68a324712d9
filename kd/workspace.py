"""`python -m kd.workspace`, see `kd.track.workspace`."""

from kd.util.errors import run_command

if __name__ == "__main__":
    run_command("kd.track.workspace")
