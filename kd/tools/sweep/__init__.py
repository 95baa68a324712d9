"""Sweeps on this machine, without an account: the files that `wandb agent` runs, searched by Optuna."""
