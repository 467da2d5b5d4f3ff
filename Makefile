# `make demo` and `make test` are all a newcomer needs; both build the environment first.
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean

$(VENV)/.ok: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/.ok
	$(PY) -m trap2 demo $(DEMO_FLAGS)

test: $(VENV)/.ok
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest --cov=trap2 --cov-report=term --cov-fail-under=90

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .coverage
