"""Loss of SmolLM2-135M on texts of several kinds: SparseK with the adapter that comes with it and without any training,
window and sinks of the same 1,024 keys, and dense. Also the same target tokens after 8K and after 16K of context.

    python bench/quality.py            8K of every text, positions 1,536 and later -> bench/results/quality_smollm2.json
    python bench/quality.py --sweep    splits of 1,024 keys between selection and window -> ..._sweep.json
    python bench/quality.py --slopes   position slopes of window_mass, at 8K and in the middle of 32K -> ..._slopes.json
    python bench/quality.py --context  8K against 16K of context -> ..._context.json
"""
import statistics
import sys

import texts
from common import ROOT, loss_from, save, sparsek

LENGTH, FROM = 8192, 1536
KEYS, SINKS = 1024, 4
ADAPTER = ROOT / "adapters/smollm2-135m.safetensors"


def loss(path, *options):
    return loss_from(sparsek("perplexity", path, "--model", "smollm2", "--max-tokens", LENGTH, *options), FROM)


def compare():
    rows = {}
    for name, (kind, path) in texts.prepare().items():
        rows[name] = {
            "kind": kind,
            "dense": loss(path, "--attention", "dense"),
            "window": loss(path, "--attention", "window"),
            "adapter": loss(path, "--attention", "sparsek", "--scorer", ADAPTER),
            "window_mass": loss(path, "--attention", "sparsek", "--scorer", "window_mass"),
            "key_norm": loss(path, "--attention", "sparsek", "--scorer", "key_norm"),
        }
        row = rows[name]
        print(f"{name:<14} dense {row['dense']:.4f}  window {row['window']:.4f}  adapter {row['adapter']:.4f}  "
              f"window_mass {row['window_mass']:.4f}  key_norm {row['key_norm']:.4f}", flush=True)
    mean = {key: statistics.mean(row[key] for row in rows.values()) for key in ("dense", "window", "adapter", "window_mass", "key_norm")}
    print("mean          ", mean)
    worst = {key: max(row[key] - row["window"] for row in rows.values()) for key in ("adapter", "window_mass")}
    save("quality_smollm2", "python bench/quality.py",
         {"tokens": LENGTH, "from_position": FROM, "texts": rows, "mean": mean, "worst_minus_window": worst})


def sweep():
    made = texts.prepare()
    rows = {}
    for topk in (64, 124, 252, 380, 508):
        window = KEYS - SINKS - topk
        losses = {name: loss(path, "--attention", "sparsek", "--scorer", "window_mass", "--topk", topk, "--window", window)
                  for name, (_, path) in made.items()}
        rows[f"{topk}/{window}/{SINKS}"] = {"mean": statistics.mean(losses.values()), "texts": losses}
        print(f"topk {topk} window {window}: {statistics.mean(losses.values()):.4f}", flush=True)
    save("quality_smollm2_sweep", "python bench/quality.py --sweep", {"tokens": LENGTH, "from_position": FROM, "splits": rows})


def slopes():
    """window_mass with several position slopes, and the window alone: 8K of text, and positions 16K to 32K of longer ones."""
    made = texts.prepare()
    reads = {"8K, from 1,536": (LENGTH, FROM, (0, 1, 2)), "32K, from 16,384": (32768, 16384, (0, 2))}
    results = {}
    for read, (tokens, begin, tried) in reads.items():
        long_enough = {name: path for name, (_, path) in made.items() if path.stat().st_size > 5 * tokens or tokens == LENGTH}
        rows = {}
        for label, options in [("window", ["--attention", "window"])] + [(f"slope {x:g}", ["--scorer", "window_mass", "--slope", x]) for x in tried]:
            losses = {name: loss_from(sparsek("perplexity", path, "--model", "smollm2", "--max-tokens", tokens, *options), begin)
                      for name, path in long_enough.items()}
            rows[label] = {"mean": statistics.mean(losses.values()), "texts": losses}
            print(f"{read}: {label} {rows[label]['mean']:.4f}", flush=True)
        results[read] = rows
    save("quality_smollm2_slopes", "python bench/quality.py --slopes", {"reads": results})


def context():
    """The same 2,048 target tokens of each text, after 8,192 and after 16,384 tokens of it; dense, which is slow and breaks
    down on every text alike, on three of them."""
    targets, rows = 2048, {}
    kinds = {"sparsek": ["--scorer", "window_mass"], "adapter": ["--scorer", ADAPTER], "window": ["--attention", "window"], "dense": ["--attention", "dense"]}
    for name, (kind, path) in texts.prepare().items():
        row = {}
        for attention, flags in kinds.items():
            if attention == "dense" and len(rows) >= 3:
                continue
            for before in (8192, 16384):
                result = sparsek("perplexity", path, "--model", "smollm2", *flags,
                                 "--skip-tokens", 16384 - before, "--max-tokens", before + targets)
                if result["tokens"] < before + targets:
                    break
                row[f"{attention} after {before}"] = loss_from(result, before)
        if "sparsek after 16384" in row:  # else the text is too short
            rows[name] = row
            print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    mean = {key: statistics.mean(row[key] for row in rows.values() if key in row) for key in next(iter(rows.values()))}
    print("mean", mean)
    save("quality_smollm2_context", "python bench/quality.py --context", {"targets": targets, "texts": rows, "mean": mean})


if __name__ == "__main__":
    {"": compare, "--sweep": sweep, "--slopes": slopes, "--context": context}["".join(sys.argv[1:2])]()
