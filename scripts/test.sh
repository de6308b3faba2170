#!/usr/bin/env bash
# Every test: layout and format, C++ (release), Python, CUDA (compiled and read; run where there is a GPU), C++ under the sanitizers. Called by `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
say() { printf '\n== %s\n' "$*"; }

say "layers and format"
.venv/bin/python tests/layers/check_layers.py
make --no-print-directory format-check

say "C++ tests (release)"
ninja -C build/release -j "$jobs" tests
ctest --test-dir build/release --output-on-failure -j 1

say "CUDA kernels (their tests skip themselves without a GPU)"
cmake --preset cuda > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
ninja -C build/cuda -j "$jobs" bundled cuda_shared_memory_test
.venv/bin/python tests/kernels/cuda/check_machine_code.py build/cuda
ctest --test-dir build/cuda --output-on-failure -j 1 -R "^cuda_"

say "Python tests"
SPARSEK_BUILD_DIR="$PWD/build/release" .venv/bin/python -m pytest -q -x tests/python

say "C++ tests under the address and undefined-behaviour sanitizers"
cmake --preset asan > build/asan.log 2>&1 || { cat build/asan.log; exit 1; }
ninja -C build/asan -j "$jobs" tests
ASAN_OPTIONS=detect_leaks=1 LSAN_OPTIONS="suppressions=$PWD/tests/lsan.supp:print_suppressions=0" UBSAN_OPTIONS=print_stacktrace=1 ctest --test-dir build/asan --output-on-failure -j 1 -LE slow
