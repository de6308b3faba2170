# Everything is CMake; this file only names the commands. `make demo` and `make test` do their own set-up.
JOBS ?= $(shell nproc)
SECONDS_EACH ?= 60
PYTHON := .venv/bin/python
BUILD := build/release

.PHONY: help setup build cuda demo test bench bench-peers fuzz format format-check tidy wheel bundle clean
help:
	@echo "make demo     set up, build, then SmolLM2 reads a long text with SparseK attention (10 to 17 minutes on 2 cores)"
	@echo "make test     set up, build, then every test (40 to 60 minutes on 2 cores)"
	@echo "make build    the program ($(BUILD)/sparsek) and the Python package's library"
	@echo "make cuda     the CUDA kernels with their check and timing programs, in build/cuda (no GPU needed to build)"
	@echo "make bench    benchmarks into bench/results/ · bench-peers: the same beside llama.cpp (builds it: 10 minutes)"
	@echo "make fuzz     each fuzz target for SECONDS_EACH=60 · make tidy [FILES=...] · make format · make wheel · make setup"
	@echo "make bundle   dist/sparsek-bundle.tar.gz: what a GPU host without network needs (docs/building-on-a-gpu-host.md)"

setup:
	@scripts/setup.sh build demo

$(BUILD)/build.ninja:
	@cmake --preset release > $(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }

build:
	@scripts/setup.sh build
	@mkdir -p build
	@$(MAKE) --no-print-directory $(BUILD)/build.ninja
	@ninja -C $(BUILD) -j $(JOBS)

cuda:
	@scripts/setup.sh cuda
	@mkdir -p build
	@cmake --preset cuda > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	@ninja -C build/cuda -j $(JOBS) bundled

demo:
	@scripts/setup.sh build demo
	@$(MAKE) --no-print-directory build
	@$(PYTHON) scripts/demo.py

test:
	@scripts/setup.sh build demo test cuda
	@$(MAKE) --no-print-directory build
	@scripts/test.sh

bench: build
	@$(PYTHON) bench/run.py

bench-peers: build
	@scripts/setup.sh build test
	@$(PYTHON) bench/run.py --peers

fuzz:
	@scripts/setup.sh build test
	@scripts/fuzz.sh $(SECONDS_EACH)

format:
	@scripts/setup.sh format
	@git ls-files 'src/*.h' 'src/*.cc' 'tests/*.h' 'tests/*.cc' 'bench/*.cc' | xargs clang-format-19 -i
format-check:
	@git ls-files 'src/*.h' 'src/*.cc' 'tests/*.h' 'tests/*.cc' 'bench/*.cc' | xargs clang-format-19 --dry-run --Werror

tidy: build
	@scripts/setup.sh tidy
	@printf '%s\n' $(or $(FILES),$(shell git ls-files 'src/*.cc' | grep -v simd)) | xargs -n 4 clang-tidy-19 -p $(BUILD) --quiet

bundle: cuda
	@scripts/bundle.sh

wheel:
	@scripts/setup.sh build test
	@.venv/bin/pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist
