"""Training steps of SmolLM2-135M's shape on one GPU: SparseK attention beside torch's fastest dense attention. Writes
bench/results/h200/train_speed.json, or the file after --output. About 50 s on an H200.

    python3 bench/train_speed.py [--output FILE] [--seqlen 16384,32768,65536,131072] [--program build/cuda/sparsek]
"""
import argparse
import json
import pathlib

from common import ROOT, save, sparsek
from gpu import device

# "sparsek": as the paper has it. "sparsek-all": with everything `sparsek train` turns on by itself (two-layer scorer,
# delayed scores, far rotary, 4 sinks). "window": as many visible keys.
SPARSEK = ["attention.far_distance=0", "scorer.hidden=0", "scorer.delayed=false"]
KINDS = {
    "sparsek": ["attention.kind=sparsek", *SPARSEK],
    "sparsek-all": ["attention.kind=sparsek", "attention.window_size=508", "attention.num_sinks=4"],
    "window": ["attention.kind=window", "attention.window_size=1024", "attention.far_distance=0"],
    "dense": ["attention.kind=dense"],
}


def measure(program: pathlib.Path, kind: str, options: list[str], seqlens: str, recompute: bool) -> dict:
    flag = f"trainable.recompute={str(recompute).lower()}"
    found = sparsek("bench", "train", "--seqlen", seqlens, "run.device=cuda", flag, *KINDS[kind], *options, program=program)
    for row in found["results"]:
        said = f"{row['tokens_per_second']['median']:,.0f} tokens/s" if "error" not in row else row["error"][:80]
        print(f"{kind:>13} {row['seqlen']:>7} {row.get('backend', ''):>9}  {said}", flush=True)
    return found


def rate(runs: dict, kind: str, seqlen: int) -> tuple[float, str]:
    rows = [row for row in runs[kind]["results"] if row["seqlen"] == seqlen and "error" not in row]
    best = max(rows, key=lambda row: row["tokens_per_second"]["median"], default=None)
    return (best["tokens_per_second"]["median"], best.get("backend", "")) if best else (0.0, "")


def summary(runs: dict, seqlens: list[int]) -> dict:
    """SparseK's rate over that of dense attention's fastest backend, and over its own at the shortest length."""
    lines = {}
    for seqlen in seqlens:
        ours, (dense, backend) = rate(runs, "sparsek", seqlen)[0], rate(runs, "dense", seqlen)
        first = rate(runs, "sparsek", seqlens[0])[0]
        lines[seqlen] = {
            "sparsek_over_dense": ours / dense if dense else None,
            "dense_backend": backend,
            "sparsek_over_its_shortest": ours / first if first else None,
        }
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="a file other than bench/results/h200/train_speed.json")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "build/cuda/sparsek")
    parser.add_argument("--seqlen", default="16384,32768,65536,131072")
    parser.add_argument("--kinds", default="sparsek,dense", help="of " + ", ".join(KINDS))
    parser.add_argument("--recompute", action="store_true", help="layers are computed again in the backward pass")
    parser.add_argument("options", nargs="*", help="key=value for every run")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    runs = {}
    for kind in kinds:
        runs[kind] = measure(arguments.program, kind, arguments.options, arguments.seqlen, arguments.recompute)
    results = {"device": device(), "runs": runs}
    if {"sparsek", "dense"} <= set(runs):
        results["summary"] = summary(runs, sorted(map(int, arguments.seqlen.split(","))))
        print(json.dumps(results["summary"], indent=1))
    save("h200/train_speed", "python bench/train_speed.py", results, arguments.output)


if __name__ == "__main__":
    main()
