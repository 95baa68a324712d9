"""`python -m kd.predict`, see `kd.tools.predict`."""

from kd.util.errors import run_command

if __name__ == "__main__":
    run_command("kd.tools.predict")
