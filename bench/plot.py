"""Draws bench/results/h200/attention.json: time against length, forward and forward + backward, into an SVG beside it.

    scripts/setup.sh bench && .venv/bin/python bench/plot.py
"""
import json
import pathlib
import sys

import matplotlib

from common import RESULTS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "sparsek"  # the same bytes for the same figures
import matplotlib.pyplot as plt  # noqa: E402

KINDS = {"forward": "forward", "forward_backward": "forward + backward"}


def main():
    source = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "h200/attention.json"
    data = json.loads(source.read_text())
    rows = [row for row in data["results"] if row.get("heads") == "16/16" and "forward" in row]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for axis, (kind, title) in zip(axes, KINDS.items()):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = sorted((row["seqlen"], row[kind]["median_ms"]) for row in rows if row["contender"] == name and kind in row)
            ours = name.startswith("SparseK")
            axis.plot(*zip(*points), marker="o", linewidth=2.6 if ours else 1.3, label=name, color="black" if ours else None)
        lengths = sorted({row["seqlen"] for row in rows})
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="ms", xticks=lengths)
        axis.set_xticklabels([f"{length // 1024}K" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{data['device']['name']}, bf16, causal, batch 1, 16 heads, head_dim 128 (commit {data['environment']['commit']})", fontsize=10)
    figure.tight_layout()
    target = source.with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
