#!/usr/bin/env bash
# sbatch with the options of site.sh; what is given here wins over them.
#
#   slurm/submit.sh slurm/train.sbatch distill.py --config recipes/stl10/kd.yaml --teacher runs/stl10/teacher
#   slurm/submit.sh --nodes 4 --time 24:00:00 slurm/train.sbatch train_teacher.py --config ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh
exec sbatch "${kd_options[@]}" "$@"
