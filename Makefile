# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# XLA on the CPU frees and maps again hundreds of megabytes per step; huge pages halve that cost.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test fuzz audit parity parity-table aot aot-in lint clean

demo: $(VENV)/.ready-base
	$(RUN) main.py --config configs/tiny_w4a4.py

test: $(VENV)/.ready-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist worksteal --ignore=tests/parity --ignore=tests/aot $(PYTEST_ARGS)

# More inputs than `make test` tries: QVGEN_FUZZ times as many; QVGEN_FUZZ_SEED draws others.
QVGEN_FUZZ ?= 5
fuzz: $(VENV)/.ready-test
	QVGEN_FUZZ=$(QVGEN_FUZZ) $(RUN) -m pytest -n 2 --dist worksteal tests/fuzz $(PYTEST_ARGS)

# Known holes in what constraints.txt pins; asks a service over the network, and fails where that does
# not answer for a package. In an environment of its own: what it needs is not what we need.
audit: $(VENV)-audit/.ready
	$(VENV)-audit/bin/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict \
	  --progress-spinner off $(AUDIT_ARGS)

$(VENV)-audit/.ready:
	$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV)-audit,$(PYTHON) -m venv $(VENV)-audit)
	$(if $(UV),$(UV) pip install --quiet --python $(VENV)-audit/bin/python,$(VENV)-audit/bin/python \
	  -m pip install --quiet --disable-pip-version-check) 'pip-audit>=2.9'
	touch $@

# Numbers against PyTorch diffusers and transformers (installs torch).
parity: $(VENV)/.ready-parity
	$(RUN) -m pytest -n 2 --dist worksteal tests/parity $(PYTEST_ARGS)

# The same, one test after the other and the slow ones too, and docs/parity_table.md from it.
parity-table: $(VENV)/.ready-parity
	$(RUN) -m pytest tests/parity -m "slow or not slow" --parity-table docs/parity_table.md

# Kernels compiled for chips that are not here, and the interpreters that need jax 0.11: installs the
# compilers of TPU and CUDA (gigabytes), so it has an environment of its own. They compile as for users,
# not as quickly as tests do.
AOT_PYTHON ?= python3.12
aot:
	$(MAKE) --no-print-directory aot-in PYTHON=$(AOT_PYTHON) VENV=$(VENV)312

aot-in: $(VENV)/.ready-aot
	QVGEN_AOT=1 XLA_FLAGS= JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal tests/aot $(PYTEST_ARGS)

lint: $(VENV)/.ready-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"{sys.executable} is Python {v[0]}.{v[1]}; qvgen-jax needs 3.11 or newer: make PYTHON=python3.12 ...")'
	$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

pip = $(if $(UV),$(UV) pip install --quiet --python $(RUN),$(RUN) -m pip install --quiet --disable-pip-version-check)
install = $(pip) --constraint constraints.txt --editable

$(VENV)/.ready-base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(install) .
	touch $@

$(VENV)/.ready-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(install) '.[test]'
	touch $@ $(VENV)/.ready-base

$(VENV)/.ready-parity: $(VENV)/bin/python pyproject.toml constraints.txt Makefile
	$(install) '.[test,parity,buckets,serve]'
	$(pip) --no-deps vbench==0.1.5 vbench2==0.1.1  # For their prompts; what their scorers want, ours do not.
	touch $@ $(VENV)/.ready-base $(VENV)/.ready-test

$(VENV)/.ready-aot: $(VENV)/bin/python pyproject.toml constraints.txt constraints-aot.txt
	$(install) '.[test,aot]' --constraint constraints-aot.txt
	touch $@ $(VENV)/.ready-base $(VENV)/.ready-test

clean:
	rm -rf $(VENV) $(VENV)-audit build *.egg-info
