"""Memory against length: peak resident set and state bytes of reading 32K and 256K tokens, and the state's formula.

    python bench/memory.py    -> bench/results/memory_smollm2.json
"""
import subprocess

from common import ROOT, save, sparsek

LENGTHS = (32 * 1024, 256 * 1024)


def text():
    path = ROOT / "build/texts/bible-256k.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(subprocess.run(["bible", "gen1:1-rev22:21"], check=True, capture_output=True).stdout)
    return path


def formula(layers=30, num_kv_heads=3, head_dim=64, topk=124, window=896, sinks=4, element_bytes=2):
    """docs/math.md section 6, one batch row, far rotary, delayed scores: window_mass and its budget."""
    pool = max(4 * topk, 1024)
    per_head = (head_dim * element_bytes * (2 * (sinks + window + topk) + window)
                + 12 * topk + 4 * pool + 4 * window + 4 * window + 24)
    return layers * (num_kv_heads * per_head + 8)


def main():
    runs = {}
    for length in LENGTHS:
        result = sparsek("perplexity", text(), "--model", "smollm2", "--scorer", "window_mass", "--max-tokens", length)
        if result["state_bytes"] != formula():
            raise RuntimeError(f"expected a state of {formula():,} bytes, found {result['state_bytes']:,}")
        runs[length] = {key: result[key] for key in ("tokens", "loss", "state_bytes", "peak_rss_bytes")}
        print(length, runs[length], flush=True)
    short, long = (runs[length] for length in LENGTHS)
    growth = long["peak_rss_bytes"] - short["peak_rss_bytes"]
    print(f"peak memory grew by {growth / 2**20:.1f} MiB from 32K to 256K; formula {formula():,} bytes")
    save("memory_smollm2", "python bench/memory.py",
         {"runs": runs, "peak_rss_growth_bytes": growth, "state_formula_bytes": formula()})


if __name__ == "__main__":
    main()
