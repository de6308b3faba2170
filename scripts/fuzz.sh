#!/usr/bin/env bash
# Runs each fuzz target, a minute by default: scripts/fuzz.sh [SECONDS [TARGET...]]. Inputs that fail stay in build/fuzz/found.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
targets=("${@:2}")
((${#targets[@]})) || targets=(gguf safetensors tokenizer_json bpe shard json_line)
build=build/fuzz

mkdir -p build
cmake --preset fuzz > build/fuzz.log 2>&1 || { cat build/fuzz.log; exit 1; }
ninja -C $build -j "${JOBS:-$(nproc)}" fuzz
.venv/bin/python tests/fuzz/make_corpus.py $build/seeds
mkdir -p $build/found
failed=0
for target in "${targets[@]}"; do
  mkdir -p "$build/corpus/$target"
  echo "== fuzz $target, $seconds s"
  if "$build/tests/fuzz/fuzz_$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=65536 \
      -artifact_prefix="$build/found/$target-" -print_final_stats=1 "$build/corpus/$target" "$build/seeds/$target" \
      > "$build/$target.log" 2>&1; then
    grep -E 'number_of_executed_units|peak_rss' "$build/$target.log"
  else
    failed=1
    grep -E 'ERROR|SUMMARY|runtime error|Test unit written' "$build/$target.log" || tail -20 "$build/$target.log"
  fi
done
exit $failed
