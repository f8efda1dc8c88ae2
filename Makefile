# Two commands on a fresh machine with Python and nothing else: `make demo` and `make test`.
#   make demo PYTHON=python3.12    with another Python
#   make demo TORCH_INDEX=         PyTorch from the index that pip is set to
PYTHON ?= python3
BIN := .venv/bin
PIP = PIP_USER=0 $(BIN)/python -m pip install -qq
TESTED := --constraint constraints.txt
ELSEWHERE := build/elsewhere
# For Linux, PyPI has PyTorch with gigabytes of CUDA libraries; PyTorch's own index has a small one for the CPU.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,$(CPU_INDEX))

.PHONY: demo test end-to-end check docs nano clean

.venv/torch: constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.14. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	"$(PYTHON)" -m venv .venv
	@echo "Installing PyTorch from $(or $(TORCH_INDEX),the index that pip is set to) ..."
	@$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) --timeout 20 --retries 2 $(TESTED) torch ||) \
		$(PIP) $(TESTED) torch || \
		{ echo "The tested PyTorch is not available here. Installing another version ..."; $(PIP) torch; }
	touch $@

.venv/installed: .venv/torch pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/developing: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/documenting: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

demo: .venv/installed  ## Fine-tune the packaged model on the packaged data, talk to it, merge it.
	$(BIN)/hymba-tune sft --config demo --out runs/demo --overwrite
	$(BIN)/hymba-tune chat runs/demo --temperature 0 --prompt "How long does the ferry to Little Cross take?"
	$(BIN)/hymba-tune merge runs/demo --out runs/demo-merged --overwrite

test: .venv/developing  ## The suite without whole runs, in two processes.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

end-to-end: .venv/developing  ## Whole runs: the README line by line, the demo, several processes, benchmarks.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'end_to_end and not slow'

check: .venv/developing  ## Lint, format, types, and the wheel: built, installed elsewhere, its command run.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/wheel build/lib $(ELSEWHERE)
	$(BIN)/python -m build --wheel --outdir build/wheel .
	"$(PYTHON)" -m venv $(ELSEWHERE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ELSEWHERE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	PIP_USER=0 $(ELSEWHERE)/bin/python -m pip install -qq --no-deps build/wheel/*.whl
	cd $(ELSEWHERE) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --python-executable bin/python
	cd $(ELSEWHERE) && bin/hymba-tune --version && \
		bin/hymba-tune sft --model hymba-nano --data demo --steps 2 --eval-max-rows 8 --out run && \
		bin/hymba-tune chat run --prompt "Hello" --max-new-tokens 8

docs: .venv/documenting  ## The documentation site, in build/site; open build/site/index.html. Any warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

nano: .venv/installed  ## Train the packaged model anew: about an hour on 2 cores.
	rm -rf runs/nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano
	$(BIN)/hymba-tune sft --config pretrain_nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano --install runs/nano

clean:
	rm -rf build dist runs/demo runs/demo-merged runs/nano *.egg-info
