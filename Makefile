.PHONY: test
VENV := .venv
$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -e '.[dev]'
	touch $@
test: $(VENV)/.ready
	$(VENV)/bin/ruff check bridge bridge_ref tests
	$(VENV)/bin/python -m pytest -q tests
