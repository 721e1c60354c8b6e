# A newcomer needs python3 (3.11 or newer, with venv and pip), npm and make. Every target sets up .venv first.
PYTHON ?= python3
ARGS ?=
SHELL = /bin/sh
VENV = .venv
STAMP = $(VENV)/longscope.stamp
RUN = $(VENV)/bin/python -m

.PHONY: help venv tour test bench demo lint clean

help: ## show this list
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS=\"--options of the command\"]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

# The stamp is written last: an interrupted installation leaves none, and the next call goes on where it stopped.
# A moved or copied .venv still runs the programs of its old place, so it is built anew.
venv: ## build or refresh .venv (the other targets do it themselves)
	@if [ -f $(STAMP) ] && [ -z "$$(find pyproject.toml -newer $(STAMP))" ] && $(VENV)/bin/python -I -c \
	    'import longscope, os, sys; sys.exit(not os.path.samefile(longscope.__file__, "longscope.py"))' \
	    2>/dev/null; then exit 0; fi; \
	set -e; \
	rm -f $(STAMP) $(VENV)/pip.exit; \
	if [ -d $(VENV) ] && ! { grep -qF -e '-m venv $(CURDIR)/$(VENV)' $(VENV)/pyvenv.cfg \
	    && $(RUN) pip --version; } >/dev/null 2>&1; then \
	    echo "$(VENV) is broken or belongs to another folder: building it anew"; rm -rf $(VENV); fi; \
	if [ ! -d $(VENV) ]; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	        echo "longscope needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1);" \
	            "try: make PYTHON=python3.12" >&2; exit 2; }; \
	    $(PYTHON) -m venv $(VENV); fi; \
	echo "installing longscope and what it needs into $(VENV) (about 6 GB, minutes the first time)"; \
	{ code=0; $(RUN) pip install --disable-pip-version-check --progress-bar off -e '.[dev]' 2>&1 || code=$$?; \
	    echo $$code > $(VENV)/pip.exit; } \
	    | awk '!/^ *(Requirement already|Looking in|Collecting|Obtaining|Using cached)/ \
	        { print "  " substr($$0, 1, 400); fflush() }'; \
	[ "$$(cat $(VENV)/pip.exit)" = 0 ] || { \
	    echo "the installation failed (see above); the next make tries again" >&2; exit 1; }; \
	touch $(STAMP)

tour: venv ## every system's main job once, on real models and data; writes out/tour/index.html
	@$(VENV)/bin/longscope tour $(ARGS)

test: venv ## lint, types and all tests that need no GPU
	@$(VENV)/bin/python tests/run.py $(ARGS)

bench: venv ## attention side by side with torch's own and transformers'
	@$(RUN) bench.flashcore $(ARGS)

demo: venv ## the workbench in a browser, on 127.0.0.1
	@$(VENV)/bin/longscope demo $(ARGS)

lint: venv ## ruff and mypy alone
	@$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy

clean: ## remove build products and caches (not .venv, out/ or downloads)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name $(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
