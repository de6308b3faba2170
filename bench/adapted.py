"""What an adapter makes of a model, beside its dense attention, window and sinks of as many keys, and SparseK without training:
loss on held-out text, the same targets after 8K and 64K of context, and needles by depth (docs/adapting.md).

    python3 bench/adapted.py --text build/text --adapter run/scorer/model/adapter.safetensors [--device cuda] [--program build/cuda/sparsek]

--text is what scripts/training_text.py writes; `manuals` and `other` in it were held out. -> bench/results/adapted_NAME.json
"""
import argparse
import pathlib
import statistics
import tempfile

import common
from common import loss_from

LENGTH, FROM = 8192, 1536
TARGETS, LONG = 2048, 65536


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--program", type=pathlib.Path, default=common.PROGRAM)
    parser.add_argument("--name", default="smollm2", help="of the result: bench/results/adapted_NAME.json")
    parser.add_argument("--output", help="write the result there instead")
    parser.add_argument("--parts", default="loss,context,needles")
    parser.add_argument("--samples", type=int, default=10, help="needle questions for each depth")
    parser.add_argument("--keys", type=int, default=1024, help="visible keys of the adapter, its sinks included: the window's, for comparison")
    return parser.parse_args()


def kinds(options):
    """Options of each kind of attention that is compared."""
    topk = 124 if options.keys == 1024 else options.keys // 2  # 124: the program's own split of 1,024 untrained keys
    return {
        "dense": ["--attention", "dense"],
        "window": ["--attention", "window", "--sinks", 4, "--window", options.keys - 4],
        "untrained": ["--attention", "sparsek", "--scorer", "window_mass", "--topk", topk, "--window", options.keys - topk - 4],
        "adapter": ["--attention", "sparsek", "--scorer", options.adapter],
    }


class Program:
    def __init__(self, options):
        self.program = options.program
        self.shared = ["--model", options.model, "--device", options.device,
                       "--chunk", 512 if options.device == "cpu" else 4096]

    def __call__(self, command, path, *more):
        return common.sparsek(command, path, *self.shared, *more, program=self.program)


def losses(program, options, keep):
    rows = {}
    found = {"tokens": LENGTH, "from_position": FROM, "texts": rows}
    for path in [*sorted((options.text / "manuals").glob("*.txt")), *sorted((options.text / "other").glob("*.txt"))]:
        row = {}
        for name, flags in kinds(options).items():
            result = program("perplexity", path, *flags, "--max-tokens", LENGTH)
            if result["tokens"] == LENGTH:
                row[name] = loss_from(result, FROM)
        if row:
            rows[f"{path.parent.name}/{path.stem}"] = row
            keep(found)
            print(path.stem, {name: round(value, 4) for name, value in row.items()}, flush=True)
    if not rows:
        raise SystemExit(f"{options.text}: expected .txt files of {LENGTH} tokens and more in manuals or other, found none")
    parts = {part: [row for key, row in rows.items() if key.startswith(part)] for part in ("manuals", "other")}
    means = {part: {name: statistics.mean(row[name] for row in of_part) for name in kinds(options)} for part, of_part in parts.items() if of_part}
    print("means", means)
    return found | {"mean": means}


def long_texts(options, folder):
    """The held-out documents of a source behind each other, where they are long enough."""
    groups = {}
    for path in sorted((options.text / "manuals").glob("*.txt")) + sorted((options.text / "other").glob("*.txt")):
        groups.setdefault(path.stem.rpartition("-")[0], []).append(path)
    for name, paths in groups.items():
        text = "\n\n".join(path.read_text() for path in paths)
        if len(text) > 5 * (LONG + TARGETS):
            path = pathlib.Path(folder) / f"{name}.txt"
            path.write_text(text)
            yield name, path


def context(program, options, keep):
    """The same 2,048 target tokens after 8K and after 64K of context; dense, whose positions end at 8K, is not asked."""
    rows = {}
    found = {"targets": TARGETS, "texts": rows}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in long_texts(options, folder):
            row = {}
            for kind in ("window", "untrained", "adapter"):
                for before in (LENGTH, LONG):
                    result = program("perplexity", path, *kinds(options)[kind], "--skip-tokens", LONG - before,
                                     "--max-tokens", before + TARGETS)
                    row[f"{kind} after {before}"] = loss_from(result, before)
            rows[name] = row
            keep(found)
            print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    if not rows:
        raise SystemExit(f"{options.text}: expected documents that hold {LONG + TARGETS} tokens together in manuals or other, found none; --parts loss,needles leaves this out")
    return found | {"mean": {key: statistics.mean(row[key] for row in rows.values()) for key in next(iter(rows.values()))}}


def needles(program, options, keep):
    rows = {}
    found = {"samples": options.samples, "found": rows}
    essays = sorted((options.text / "other").glob("essays-*.txt"))
    if not essays:
        raise SystemExit(f"{options.text}: expected other/essays-*.txt to put needles into, found none; --parts loss,context leaves this out")
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "haystack.txt"
        text.write_text("\n\n".join(path.read_text() for path in essays))
        for task in ("passkey", "keys"):
            for tokens in (LENGTH, 2 * LENGTH, LONG):
                for kind, flags in kinds(options).items():
                    if kind == "dense" and tokens > LENGTH:
                        continue  # beyond its positions
                    result = program("needles", text, *flags, "--task", task, "--tokens", tokens, "--samples", options.samples)
                    key = f"{task} {tokens} {kind}"
                    rows[key] = {name: result[name] for name in ("accuracy", "token_accuracy", "token_accuracy_by_place", "depths")}
                    keep(found)
                    print(f"{key:<26} {result['accuracy']:.3f}, tokens {result['token_accuracy']:.3f}, right by depth",
                          [depth["right"] for depth in result["depths"]], flush=True)
    return found


PARTS = {"loss": losses, "context": context, "needles": needles}


def main():
    options = arguments()
    program = Program(options)
    results = {"device": options.device, "adapter": options.adapter, "keys": options.keys}

    def keep(part, value):
        results[part] = value
        common.save(f"adapted_{options.name}", "python3 bench/adapted.py", results, options.output, quiet=True)

    for part in options.parts.split(","):  # each says what it has as it goes: a run that is ended keeps it
        keep(part, PARTS[part](program, options, lambda value, part=part: keep(part, value)))


if __name__ == "__main__":
    main()
