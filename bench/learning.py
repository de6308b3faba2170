"""What training runs measured, as one result file: of each run its configuration (what differs from the defaults), validation
by step, tokens/s and peak memory.

    python3 bench/learning.py NAME RUN_FOLDER... [--device "NVIDIA H200"] [--note TEXT]     -> bench/results/NAME.json
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tomllib

import common


def flat(table):
    return {f"{section}.{key}": value for section, values in table.items() for key, value in values.items()}


def defaults(program):
    shown = subprocess.run([program, "train", "--print-config", "data.task=recall"], check=True, capture_output=True, text=True)
    return flat(tomllib.loads(shown.stdout)) | {"data.task": "shards"}


def run(folder, usual):
    config = flat(tomllib.loads((folder / "config.toml").read_text()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{folder}: expected metrics of a run, found an empty metrics.jsonl")
    validations = [row for row in rows if "validation_loss" in row]
    # Of a row that validated, the rate has the validation's time in it.
    rates = [row["tokens_per_second"] for row in rows if "validation_loss" not in row and "tokens_per_second" in row]
    return {
        "config": {key: value for key, value in config.items() if value != usual.get(key) and key != "run.folder"},
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "skipped_steps": rows[-1]["skipped_steps"],
        "validation": [{"step": row["step"], "loss": row["validation_loss"], "right": row["validation_accuracy"]} for row in validations],
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_memory_bytes": max(row["memory_bytes"] for row in rows),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result, below bench/results")
    parser.add_argument("folders", nargs="+", type=pathlib.Path, metavar="RUN_FOLDER")
    parser.add_argument("--device", default="", help="what the runs were computed on")
    parser.add_argument("--note", default="", help="what a reader has to know, e.g. runs that shared the device")
    parser.add_argument("--program", type=pathlib.Path, default=common.PROGRAM)
    options = parser.parse_args()
    names = [folder.name for folder in options.folders]
    if len(set(names)) < len(names):
        raise SystemExit(f"expected folders of different names, found {names}")
    usual = defaults(options.program)
    runs = {folder.name: run(folder, usual) for folder in options.folders}
    command = "sparsek train, one run a folder; collected by bench/learning.py (environment: of the machine that collected)"
    common.save(options.name, command, {"device": options.device, "note": options.note, "runs": runs})


if __name__ == "__main__":
    main()
