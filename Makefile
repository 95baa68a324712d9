# `make demo` runs the main job on scikit-learn's digits, `make test` the tests; both make the environment first.
# `make test-slurm` runs the files of slurm/ on a private cluster that it starts on this machine; `make soak` kills runs
# and does them other harm for half an hour or more.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $(CORES)
RUNS := runs/digits

# Without byte code each start of Python compiles torch again, which takes longer than the demo.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo cifar10 benchmark test test-slurm soak quick golden lint clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $(PYTHON) is older than Python 3.10; run make PYTHON=python3.12 or another newer one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@touch $@

demo: $(VENV)/.installed
	$(LAUNCH) train_teacher.py --config recipes/digits/teacher.yaml
	$(LAUNCH) train_teacher.py --config recipes/digits/few_labels_alone.yaml
	$(LAUNCH) distill.py --config recipes/digits/few_labels.yaml --teacher $(RUNS)/teacher
	$(BIN)/python evaluate.py $(RUNS)/teacher $(RUNS)/few_labels_alone $(RUNS)/few_labels --report $(RUNS)/report

# The CIFAR-10 tutorial: both teachers, both students alone, the four distilled ones, the comparison. DATA names a source;
# SEEDS="42 43 44" runs all of it three times, and the comparison has means and spreads. Started again it resumes.
DATA ?= cifar10
SEEDS ?= 42
CIFAR10 := teacher teacher_nodropout student student_nodropout kd kd_t10 cosine regressor
cifar10: $(VENV)/.installed
	for seed in $(SEEDS); do run=runs/cifar10/seed_$$seed; for name in $(CIFAR10); do \
		case $$name in \
			teacher*|student*) set -- train_teacher.py ;; \
			kd_t10) set -- distill.py --teacher $$run/teacher_nodropout --init_from $$run/student_nodropout ;; \
			*) set -- distill.py --teacher $$run/teacher ;; esac; \
		$(BIN)/accelerate launch --quiet "$$@" --config recipes/cifar10/$$name.yaml --data.source $(DATA) --seed $$seed \
			--output_dir $$run/$$name $(ARGS) || exit; done; done
	$(BIN)/python evaluate.py $(foreach seed,$(SEEDS),$(addprefix runs/cifar10/seed_$(seed)/,$(CIFAR10))) \
		--report runs/cifar10/report

# Speed, in about 20 minutes on two cores; docs/speed.md says more. PEERS: a Python that has torchdistill and timm.
PHOTOS ?= stl10
TEACHER ?= runs/cifar10/teacher
PEERS ?= $(BIN)/python
benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py --cifar10 $(DATA) --stl10 $(PHOTOS) --teacher $(TEACHER) --peers_python $(PEERS)

# A process per core, at most eight: each of them holds a gigabyte and imports torch.
PYTEST := $(BIN)/python -m pytest --numprocesses $(CORES) --maxprocesses 8 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slurm"

# Where SLURM is not installed or this is not root, the tests are skipped and say what is missing.
test-slurm: $(VENV)/.installed
	$(BIN)/python -m pytest -rs tests/slurm

# KILLS on one process and as many on two and on four, half of them inside a checkpoint; then a table, and status 1 if a run was lost.
KILLS ?= 100
soak: $(VENV)/.installed
	PYTHONPATH=tests/faults $(BIN)/python -m pytest -p soak -o tmp_path_retention_policy=failed \
		tests/faults/test_faults.py --soak $(KILLS)

quick: $(VENV)/.installed
	$(PYTEST) -m "not slow"

# Whether two runs end with the bytes that they had at BASE, a commit: what must hold for a change that only rearranges.
BASE ?= HEAD
golden: $(VENV)/.installed
	$(BIN)/python tests/golden.py $(BASE)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(RUNS)
