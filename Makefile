# make demo   prunes resnet20 to an eighth on images of handwritten digits, exports it, measures it, writes the page
# make test   lint, types, tests
# make network   what can be checked against the wheels of others: the API of TensorRT, CUDA, ONNX Runtime
# make slow   the tests that take minutes each
# make zoo    142 networks of timm through the commands, Torch-Pruning beside them, in an environment of its own (6 GB)
# make bench-gpu   mixed against regular against dense on an NVIDIA GPU; says so where there is none
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
ZOO := .venv-zoo
ARTIFACT := $(RUN)/artifacts/onnx-fp32
# workers of pytest; 0 runs everything in one process
JOBS ?= 2

.PHONY: demo test network slow lint types zoo bench-gpu clean

demo: .venv/installed
	rm -rf $(RUN)
	$(BIN)/bar-edge prune --model resnet20 --data digits --budget 8x --max-drop 1 --epochs dense=30,prune=60,tune=60 \
		--batch 32 --set train.lr_dense=0.05 --set train.precision=fp32 --set train.threads=1 --out $(RUN)
	$(BIN)/bar-edge export $(RUN) --target onnx --choice-seconds 30
	$(BIN)/bar-edge bench $(ARTIFACT)
	$(BIN)/bar-edge verify $(ARTIFACT)
	$(BIN)/bar-edge report $(RUN)

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not network"

network: .venv/tested
	$(BIN)/python -m pytest -n $(JOBS) -m network

slow: .venv/tested
	$(BIN)/python -m pytest -n $(JOBS) -m slow

lint: .venv/tested
	$(BIN)/ruff check .

types: .venv/tested
	$(BIN)/mypy

zoo: $(ZOO)/installed
	$(ZOO)/bin/python benchmarks/zoo.py --beside

bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

# The stamps keep a second `make` from installing again until the metadata or the pins change.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[test]
	touch $@

# timm does not work beside the torch that the tests are pinned to
$(ZOO)/installed: pyproject.toml
	test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 torch-pruning==1.6.1 -e .
	touch $@

clean:
	rm -rf .venv $(ZOO) runs build dist *.egg-info
