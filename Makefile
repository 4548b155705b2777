# Every target is a line or two that could be typed. VENV=... uses another virtual environment than .venv;
# `make diff A=5 B=9` compares other lessons than 3 and 4; `make test L=7` runs the tests of lesson 7 only.
VENV ?= .venv
A ?= 3
B ?= 4
PYTHON ?= python3
BIN = $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin

LESSONS = lesson-03 lesson-04 lesson-05 lesson-07 lesson-09

.PHONY: train $(LESSONS) test lint smoke bench diff figures

train: lesson-04

$(LESSONS): lesson-%: $(VENV)/installed
	cd lesson_$*_* && "$(BIN)/python" train_mnist.py

test: $(VENV)/installed-dev lint
	"$(BIN)/python" -m pytest -n 2 --dist loadfile $(if $(L),-k "lesson_0$(L) or lesson_$(L)")

lint: $(VENV)/installed-dev
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

smoke: $(VENV)/installed
	for lesson in lesson_*; do \
	  (cd $$lesson && "$(BIN)/python" train_mnist.py --smoke --overwrite --output output/smoke) || exit 1; done

bench: $(VENV)/installed
	"$(BIN)/python" -m common.bench

diff:
	diff -r -u0 -x 'output*' -x __pycache__ -x README.md -x '*.pt' --color=always lesson_0$(A)_* lesson_0$(B)_* | less -R

figures: $(VENV)/installed
	for script in figures figures_ddpm figures_sde; do "$(BIN)/python" docs/$$script.py || exit 1; done

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	"$(BIN)/python" -m pip install -r requirements-dev.txt
	touch $@
