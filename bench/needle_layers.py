"""Which layers of a model numbers are found with: needles where one layer after the other sees everything, the others keep their budgets
(docs/adapting.md). Layers are counted from 0, as in attention.layers.

    python3 bench/needle_layers.py TEXT --model smollm2 --adapter run/long/model/adapter.safetensors [--device cuda] [--program build/cuda/sparsek]

TEXT is what numbers are put into, as for `sparsek needles`: 40,000 tokens or more, so that questions differ. Depths within reach of the largest
window are left out. `dense` is the model without any selection: it means something to the length that the model was trained on.
-> bench/results/needle_layers_NAME.json
"""
import argparse
import concurrent.futures
import pathlib
import re
import tempfile

import adapter_file
import common


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", type=pathlib.Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--program", type=pathlib.Path, default=common.PROGRAM)
    parser.add_argument("--layers", help="the layers to open one after the other, as 20,23 or 20-29,3; all of them without it; 20+21+22: together")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--samples", type=int, default=5, help="questions for each of the ten depths")
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--task", default="keys", choices=("keys", "passkey"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; a GPU takes 10, at some GB of memory each")
    parser.add_argument("--name", default="smollm2", help="of the result: bench/results/needle_layers_NAME.json")
    parser.add_argument("--output", help="write the result there instead")
    return parser.parse_args()


def cases_of(spans, own, tokens):
    """Budgets by name: `own` with one layer after the other open, or with those of a + b together."""
    count = len(own)
    sets = [[layer] for layer in range(count)] if not spans else []
    for span in spans.split(",") if spans else []:
        match = re.fullmatch(r"(\d+)-(\d+)|(\d+(?:\+\d+)*)", span)
        if not match or (match[1] and int(match[1]) > int(match[2])):
            raise SystemExit(f"--layers {spans}: expected numbers, spans and sums as 20,23 or 20-29 or 20+21, found {span}")
        sets += [[layer] for layer in range(int(match[1]), int(match[2]) + 1)] if match[1] else [[int(layer) for layer in span.split("+")]]
    for layers in sets:
        if max(layers) >= count:
            raise SystemExit(f"--layers {spans}: expected layers of 0 to {count - 1}, found {max(layers)}")
    opened = lambda layers: [(tokens, window) if layer in layers else (topk, window) for layer, (topk, window) in enumerate(own)]
    return {f"layer {'+'.join(map(str, layers))}": opened(layers) for layers in sets}


def needles(options, reach, *attention):
    result = common.sparsek("needles", options.text, "--model", options.model, *attention, "--task", options.task, "--digits", options.digits,
                            "--tokens", options.tokens, "--samples", options.samples, "--device", options.device,
                            "--chunk", 512 if options.device == "cpu" else 8192, program=options.program)
    far = [depth for depth in result["depths"] if depth["distance"] > reach]
    if not far:
        raise SystemExit(f"--tokens {options.tokens}: expected more, so that numbers lie beyond the largest window {reach}")
    asked = sum(depth["asked"] for depth in far)
    mean = lambda key: sum(depth[key] * depth["asked"] for depth in far) / asked
    return {"asked": asked, "right": sum(depth["right"] for depth in far), "digits": mean("token_accuracy"), "answer_loss": mean("answer_loss")}


def main():
    options = arguments()
    if options.jobs < 1:
        raise SystemExit(f"--jobs: expected 1 or more, found {options.jobs}")
    header, metadata, tensors = adapter_file.read(options.adapter)
    own = adapter_file.budgets(metadata)
    reach = max(window for _, window in own)
    cases = {"as they are": own, "dense": None} | cases_of(options.layers, own, options.tokens)
    # The adapter's distance for all: a layer that sees everything would ask for another, and the difference should be of keys alone.
    distance = "off" if metadata["far_distance"] == "0" else metadata["far_distance"]
    found = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:

        def measured(case):
            if cases[case] is None:
                return needles(options, reach, "--attention", "dense")
            path = pathlib.Path(folder) / f"{case.replace(' ', '-')}.safetensors"
            adapter_file.write(path, cases[case], header, metadata, tensors)
            return needles(options, reach, "--scorer", path, "--far-distance", distance)

        for case, row in zip(cases, pool.map(measured, cases)):
            found[case] = row
            print(f"{case:<12} whole {row['right']:>4} of {row['asked']}, digits {100 * row['digits']:5.1f} %, answer loss {row['answer_loss']:.3f} "
                  f"({row['answer_loss'] - found['as they are']['answer_loss']:+.3f})", flush=True)
            asked = {key: getattr(options, key) for key in ("model", "device", "task", "digits", "tokens", "samples")}
            common.save(f"needle_layers_{options.name}", "python3 bench/needle_layers.py",
                        {"adapter": str(options.adapter), "text": str(options.text), **asked, "beyond": reach, "found": found}, options.output, quiet=True)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # what the program said is on stderr already
        raise SystemExit(str(error)) from None
