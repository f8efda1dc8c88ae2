# Two commands on a fresh machine with Python and nothing else: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
ELSEWHERE := build/elsewhere

.PHONY: demo test check nano clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed  ## Fine-tune the packaged model on the packaged data, talk to it, merge it.
	rm -rf runs/demo runs/demo-merged
	$(BIN)/hymba-tune sft --config demo --out runs/demo
	$(BIN)/hymba-tune chat runs/demo --temperature 0 --prompt "How long does the ferry to Little Cross take?"
	$(BIN)/hymba-tune merge runs/demo --out runs/demo-merged

test: .venv/installed  ## The whole suite.
	$(BIN)/python -m pytest

check: .venv/installed  ## Lint, format, types, and the wheel: built, installed elsewhere, its command run.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/wheel build/lib $(ELSEWHERE)
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(PYTHON) -m venv $(ELSEWHERE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ELSEWHERE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(ELSEWHERE)/bin/pip install --quiet --no-deps build/wheel/*.whl
	cd $(ELSEWHERE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --python-executable bin/python
	cd $(ELSEWHERE) && bin/hymba-tune --version && \
		bin/hymba-tune sft --model hymba-nano --data demo --steps 2 --eval-max-rows 8 --out run && \
		bin/hymba-tune chat run --prompt "Hello" --max-new-tokens 8

nano: .venv/installed  ## Train the packaged model anew: about an hour on 2 cores.
	rm -rf runs/nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano
	$(BIN)/hymba-tune sft --config pretrain_nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano --install runs/nano

clean:
	rm -rf build dist runs *.egg-info
