"""Which layers of a model need keys: the loss on held-out text where one layer has about twice as many or half as many, and from that a
budget for each layer, of as many keys together, for attention.layers (docs/adapting.md).

    python3 bench/layer_budgets.py CONFIG --adapter run/scorer/model/adapter.safetensors [--program build/cuda/sparsek] [key=value ...]

CONFIG is what the adapter was trained with, one budget for all layers; key=value as for `sparsek train` (validation.batches: how much text).
Every measurement is a run of one step that changes nothing. -> bench/results/layer_budgets_NAME.json
"""
import argparse
import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import tempfile
import tomllib

import adapter_file
import common


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--adapter", type=pathlib.Path, required=True)
    parser.add_argument("--program", type=pathlib.Path, default=common.PROGRAM)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; a GPU takes 4")
    parser.add_argument("--spare", type=float, default=0.002, help="a layer whose loss rises by less gives half of its keys away")
    parser.add_argument("--name", default="smollm2", help="of the result: bench/results/layer_budgets_NAME.json")
    parser.add_argument("--output", help="write the result there instead")
    return parser.parse_intermixed_args()


def halved(budget):
    """topk and window of half as many keys."""
    return (max(budget[0] // 2, 1), max(budget[1] // 2, 1))


def doubled(budget):
    """All of the second half selected: a window is no better for being long."""
    return (2 * budget[0] + budget[1], budget[1])


def allocate(base, more, fewer, budget, spare, unit=128):
    """A budget for each layer, together at most as many keys as `budget` in all of them. base, more[i], fewer[i]: the loss with `budget`
    everywhere, and with layer i's doubled and halved. Layers that can spare keys give half; the others share what is free, a unit after
    the other, in proportion to what twice as many keys would gain them, up to four times their budget. Gains as small as differences of
    layers that cannot matter (half of --spare) count as none."""
    gives = [loss - base < spare for loss in fewer]
    gains = [0.0 if give or base - loss < spare / 2 else base - loss for give, loss in zip(gives, more)]
    half = halved(budget)
    units = [0] * len(gains)
    for _ in range(sum(gives) * (sum(budget) - sum(half)) // unit):
        claims = [gain / (count + 1) if (count + 1) * unit <= 3 * sum(budget) else 0.0 for gain, count in zip(gains, units)]
        if max(claims) > 0:
            units[claims.index(max(claims))] += 1
    return [half if give else (budget[0] + count * unit, budget[1]) for give, count in zip(gives, units)]


def loss_with(options, layers):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sparsek-budgets-"))
    try:
        command = [options.program, "train", options.config, *options.overrides, f"run.folder={folder / 'run'}", f"scorer.adapter={options.adapter}",
                   f"attention.layers={adapter_file.text(layers)}", "warm_start.steps=0", "run.steps=1", "optimiser.lr=0", "optimiser.scorer_lr=0",
                   "optimiser.scale_lr=0", "scorer.lookup_heads=0", "schedule.anneal_steps=0", "schedule.topk_from=0", "schedule.window_from=0",
                   "loss.teacher=", "loss.kl=0", "loss.next_token=1", "validation.every=1", "run.log_every=1"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr.strip()}")
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return next(row["validation_loss"] for row in rows if "validation_loss" in row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    options = arguments()
    shown = subprocess.run([str(options.program), "train", options.config, *options.overrides, "--print-config"], capture_output=True, text=True)
    if shown.returncode != 0:
        raise SystemExit(shown.stderr.strip())
    attention = tomllib.loads(shown.stdout)["attention"]
    if attention["layers"]:
        raise SystemExit(f"{options.config}: expected one budget for all layers, found attention.layers; add attention.layers= and an adapter that was trained so")
    budget = (attention["topk"], attention["window_size"])
    layers = int(adapter_file.read(options.adapter)[1]["num_layers"])
    alike = [budget] * layers
    # A far distance that followed the budgets would differ from run to run.
    if attention["far_distance"] < 0:
        options.overrides.append(f"attention.far_distance={attention['num_sinks'] + sum(budget)}")
    asked = {("base", 0): alike}
    for layer in range(layers):
        for kind, other in (("more", doubled(budget)), ("fewer", halved(budget))):
            asked[kind, layer] = alike[:layer] + [other] + alike[layer + 1:]
    found = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for key, loss in zip(asked, pool.map(lambda one: loss_with(options, one), asked.values())):
            found[key] = loss
            print(f"{key[0]:<6} {key[1]:>3}  {loss:.4f}  {loss - found['base', 0]:+.4f}", flush=True)
    more, fewer = ([found[kind, layer] for layer in range(layers)] for kind in ("more", "fewer"))
    proposal = allocate(found["base", 0], more, fewer, budget, options.spare)
    proposed = loss_with(options, proposal)
    print(f"\nattention.layers = \"{adapter_file.text(proposal)}\"\nloss {proposed:.4f}, of one budget {found['base', 0]:.4f}, before any training with it")
    common.save(f"layer_budgets_{options.name}", "python3 bench/layer_budgets.py",
                {"adapter": str(options.adapter), "topk": budget[0], "window_size": budget[1], "loss": found["base", 0], "doubled": doubled(budget),
                 "halved": halved(budget), "loss_with_more": more, "loss_with_fewer": fewer, "layers": adapter_file.text(proposal), "loss_with_layers": proposed},
                options.output)


if __name__ == "__main__":
    main()
