#!/usr/bin/env bash
# A teacher, then an array of students over recipes and seeds, then their comparison; each starts when the one before it
# has ended well. Prints the jobs' numbers. Run again after a failure it resumes: what is finished ends at once.
#
#   slurm/pipeline.sh -t recipes/stl10/teacher.yaml -a recipes/stl10/student.yaml -d recipes/stl10/kd.yaml \
#     -d "recipes/stl10/kd.yaml --losses+=CosineEmbedding ..." -s "0 1 2" -o runs/pipeline [-- FLAGS FOR EVERY RUN]
#
#   -t RECIPE   of the teacher
#   -d RECIPE   a distilled student; may be given again, and flags may follow inside the quotes, as in a shell: a recipe
#               whose name has spaces is -d "'my recipe.yaml' --seed 1"
#   -a RECIPE   a student alone, for the comparison; likewise
#   -s SEEDS    of the students; 0
#   -o FOLDER   gets teacher/, NAME_sSEED/ of each student, report/ and logs/; the name is the recipe's file's
#   -m NUMBER   students at the same time
#   -n          say what would be submitted, and submit nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  sed -n '2,/^set/{s/^# \{0,1\}//p}' slurm/pipeline.sh >&2
  exit 2
}

teacher_recipe="" students=() seeds=0 folder="" at_once="" dry=0
while getopts t:d:a:s:o:m:n option; do
  case $option in
    t) teacher_recipe=$OPTARG ;;
    d) students+=("distill.py $OPTARG") ;;
    a) students+=("train_teacher.py $OPTARG") ;;
    s) seeds=$OPTARG ;;
    o) folder=${OPTARG%/} ;;
    m) at_once=%$OPTARG ;;
    n) dry=1 ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ -n $teacher_recipe && ${#students[@]} -gt 0 && -n $folder ]] || usage

submit() { # prints the job's number
  if [[ $dry == 1 ]]; then
    printf 'slurm/submit.sh%s\n' "$(printf ' %q' "$@")" >&2
    echo NUMBER
  else
    local job
    job=$(slurm/submit.sh --parsable "$@")
    echo "${job%%;*}"
  fi
}

mkdir -p "$folder/logs"
quoted() { # words as `xargs` of sweep.sbatch reads them back; %q of printf is bash's own for what is not ASCII
  local word
  for word in "$@"; do printf " '%s'" "${word//\'/\'\\\'\'}"; done
}

commands=$folder/students.txt runs=()
declare -A count=()
: >"$commands"
for student in "${students[@]}"; do
  mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$student") # script, recipe, flags
  name=$(basename "${words[1]}" .yaml)
  count[$name]=$((${count[$name]:-0} + 1))
  [[ ${count[$name]} == 1 ]] || name+=_${count[$name]}
  for seed in $seeds; do
    run=$folder/${name}_s$seed
    runs+=("$run")
    teacher=()
    [[ ${words[0]} == train_teacher.py ]] || teacher=(--teacher "$folder/teacher")
    line=$(quoted "${words[0]}" --config "${words[@]:1}" "$@" "${teacher[@]}" --seed "$seed" --output_dir "$run")
    echo "${line# }" >>"$commands"
  done
done

chain=(--kill-on-invalid-dep=yes) # what can never start does not stay in the queue
teacher_job=$(submit --job-name=kd-teacher --output="$folder/logs/%x-%j.out" \
  slurm/train.sbatch train_teacher.py --config "$teacher_recipe" "$@" --output_dir "$folder/teacher")
students_job=$(submit "${chain[@]}" --dependency="afterok:$teacher_job" --array="1-${#runs[@]}$at_once" \
  --job-name=kd-students --output="$folder/logs/%x-%A_%a.out" slurm/sweep.sbatch "$commands")
report_job=$(KD_PROCESSES_PER_NODE=1 submit "${chain[@]}" --dependency="afterok:$students_job" --nodes=1 \
  --job-name=kd-report --output="$folder/logs/%x-%j.out" \
  slurm/train.sbatch evaluate.py "$folder/teacher" "${runs[@]}" --report "$folder/report")
echo "teacher $teacher_job"
echo "students $students_job (an array of ${#runs[@]}, $commands)"
echo "report $report_job"
