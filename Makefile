# Two commands on a fresh machine with Python and nothing else: `make demo` and `make test`.
#   make demo PYTHON=python3.12    with another Python
#   make demo TORCH_INDEX=         PyTorch from the index that pip is set to, and no other is asked
PYTHON ?= python3
BIN := .venv/bin
PIP = PIP_USER=0 $(BIN)/python -m pip install -qq
TESTED := --constraint constraints.txt
ELSEWHERE := build/elsewhere
RUNTIME := build/runtime
# For Linux, PyPI has PyTorch with gigabytes of CUDA libraries; PyTorch's own index has a small one for the CPU.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,$(CPU_INDEX))
SMALL := $(PIP) --no-deps --index-url $(TORCH_INDEX) --timeout 15 --retries 1 $(TESTED) torch 2>/dev/null

.PHONY: demo test end-to-end check docs release lock address nano clean

.venv/torch: constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.14. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	"$(PYTHON)" -m venv .venv
	@$(if $(TORCH_INDEX),{ echo "Installing PyTorch from $(TORCH_INDEX): 0.2 GB to download ..."; $(SMALL); } ||) \
		{ echo "Installing PyTorch from the index that pip is set to: 0.2 GB to download, or 2.6 GB with CUDA ..."; \
			$(PIP) $(TESTED) torch; } || \
		{ echo "The tested PyTorch is not available here. Installing another version ..."; $(PIP) torch; }
	touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "Installing hymba-tune and its libraries: 0.2 GB to download ..."
	$(PIP) --editable .
	touch $@

.venv/developing: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/releasing: .venv/developing
	$(PIP) --editable '.[release]'
	touch $@

.venv/documenting: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

demo: .venv/installed  ## Fine-tune the packaged model on the packaged data, talk to it, merge it.
	$(BIN)/hymba-tune demo

test: .venv/developing  ## The suite without whole runs, in two processes.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

end-to-end: .venv/developing  ## Whole runs: the README line by line, the demo, several processes, benchmarks.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'end_to_end and not slow'

check: .venv/developing  ## Lint, format, types, and the distributions: built, installed elsewhere, run and tested there.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	rm -rf build/dist build/wheel build/lib build/unpacked $(ELSEWHERE)
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(BIN)/python -m release.distributions build/dist build/wheel
	"$(PYTHON)" -m venv $(ELSEWHERE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ELSEWHERE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	PIP_USER=0 $(ELSEWHERE)/bin/python -m pip install -qq --no-deps build/dist/*.whl
	cd $(ELSEWHERE) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --python-executable bin/python
	cd $(ELSEWHERE) && bin/hymba-tune --version && \
		bin/hymba-tune sft --model hymba-nano --data demo --steps 2 --eval-max-rows 8 --out run && \
		bin/hymba-tune chat run --prompt "Hello" --max-new-tokens 8
	mkdir build/unpacked && tar -xzf build/dist/*.tar.gz -C build/unpacked --strip-components 1
	cd build/unpacked && "$(CURDIR)/$(ELSEWHERE)/bin/python" -P -m pytest --import-mode append tests/config tests/test_house.py

docs: .venv/documenting  ## The documentation site, in build/site; open build/site/index.html. Any warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

release: .venv/releasing  ## What is published for a tag: make release TAG=v0.1.0, after make check.
	rm -rf build/release $(RUNTIME)
	mkdir -p build/release
	$(BIN)/python -m release.notes "$(TAG)" > build/release/notes.md
	$(BIN)/hadolint Containerfile
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/twine check --strict build/dist/*
	cp -r build/dist build/release/dist
	"$(PYTHON)" -m venv $(RUNTIME)
	$(if $(TORCH_INDEX),$(RUNTIME)/bin/pip install -qq --no-deps --index-url $(TORCH_INDEX) $(TESTED) torch ||) true
	$(RUNTIME)/bin/pip install -qq --constraint constraints-full.txt build/dist/*.whl
	sed 's/^dynamic = .*/version = "$(TAG:v%=%)"/' pyproject.toml > build/pyproject.toml
	$(BIN)/cyclonedx-py environment $(RUNTIME)/bin/python --pyproject build/pyproject.toml --output-reproducible \
		--output-file build/release/sbom.cdx.json

lock: .venv/developing .venv/documenting  ## Write the versions of this environment, with which the tests ran, to constraints-full.txt.
	mkdir -p build
	{ sed -n 1p constraints-full.txt; $(BIN)/python -m pip freeze --exclude-editable | \
		grep -viE '^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==' | LC_ALL=C sort -f; } > build/constraints-full.txt
	mv build/constraints-full.txt constraints-full.txt

address:  ## Set the project's address everywhere: make address PROJECT=https://github.com/me/hymba-tune
	"$(PYTHON)" -m release.address "$(PROJECT)"

nano: .venv/installed  ## Train the packaged model anew: about an hour on 2 cores.
	rm -rf runs/nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano
	$(BIN)/hymba-tune sft --config pretrain_nano
	$(BIN)/python -m hymba_tune.assets.build_nano --out build/nano --install runs/nano

clean:
	rm -rf build dist runs/demo runs/demo-merged runs/nano *.egg-info
