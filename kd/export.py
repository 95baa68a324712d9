"""`python -m kd.export`, see `kd.tools.export.command`."""

from kd.util.errors import run_command

if __name__ == "__main__":
    run_command("kd.tools.export.command")
