"""`make demo`: SmolLM2-135M reads a long text three ways and continues it.

Each way is a child process of its own, so that its peak memory is its own. TOKENS=... in the environment changes how much
is read (default about 64K tokens).
"""
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build/release/sparsek"
BYTES_PER_TOKEN = 3.9  # of this text with SmolLM2's tokenizer; the table states the exact number of tokens
WAYS = [
    ("sparsek", ["--attention", "sparsek"]),
    ("window + sinks", ["--attention", "window"]),
    ("dense, to its 8K", ["--attention", "dense", "--max-tokens", "8192"]),
]


def write_text(path, tokens):
    """The King James Bible as Debian ships it, cut at a line end."""
    text = subprocess.run(["bible", "gen1:1-rev22:21"], check=True, capture_output=True).stdout
    cut = text.rfind(b"\n", 0, int(tokens * BYTES_PER_TOKEN)) + 1
    path.write_bytes(text[:cut])


def perplexity(text, options):
    command = [PROGRAM, "perplexity", text, "--model", "smollm2", "--json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def loss_between(result, begin, end):
    """Mean loss of the targets at positions [begin, end), or None where the run did not read that far."""
    parts = [(bucket["to"] - bucket["from"], bucket["loss"]) for bucket in result["loss_by_position"]
             if begin <= bucket["from"] < end]
    covered = sum(width for width, _ in parts)
    return sum(width * loss for width, loss in parts) / covered if covered else None


def rows(length):
    """[0, 2K), [2K, 4K), [4K, 8K), then doubling."""
    begin, end = 0, 2048
    while begin < length:
        yield begin, end
        begin, end = end, 2 * end


def table(results):
    print(f"\n{'loss (nats per token) at':<26}" + "".join(f"{name:>18}" for name, _ in WAYS))
    for begin, end in rows(max(result["tokens"] for result in results)):
        cells = [loss_between(result, begin, end) for result in results]
        if any(cell is not None for cell in cells):
            row = "".join(f"{'-' if cell is None else format(cell, '.3f'):>18}" for cell in cells)
            print(f"{f'positions {begin // 1024}K-{end // 1024}K':<26}" + row)
    mib = 1 / 2**20
    for label, value in [("tokens read", lambda r: f"{r['tokens']:,}"),
                         ("tokens per second", lambda r: f"{r['tokens_per_second']:,.0f}"),
                         ("state, MiB", lambda r: f"{r['state_bytes'] * mib:.1f}"),
                         ("peak memory, MiB", lambda r: f"{r['peak_rss_bytes'] * mib:.0f}")]:
        print(f"{label:<26}" + "".join(f"{value(result):>18}" for result in results))


def main():
    tokens = int(os.environ.get("TOKENS", 65536))
    text = ROOT / "build/demo/bible.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, tokens)
    print(f"SmolLM2-135M reads {text.stat().st_size:,} bytes of the King James Bible", flush=True)
    start = time.time()
    results = []
    for name, options in WAYS:
        print(f"  {name} ...", flush=True)
        results.append(perplexity(text, options))
    table(results)
    print("\nAnd continues the text (generate reads all of it once more, through a state of the same fixed size):\n", flush=True)
    sys.stdout.write("".join(text.read_text().splitlines(keepends=True)[-3:]) + "→ ")
    sys.stdout.flush()
    subprocess.run([PROGRAM, "generate", "--model", "smollm2", "--file", text, "--max-tokens", "64"], check=True)
    print(f"\ndemo: {time.time() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
