"""bench/layer_budgets.py: how it shares keys out, and what it asks of a program that answers at once."""
import json
import subprocess
import sys

import pytest
from program import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import layer_budgets  # noqa: E402

PROGRAM = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if "--print-config" in words:
    layers = "8+8" if "attention.layers=8+8" in words else ""
    print("[attention]\\ntopk = 508\\nwindow_size = 512\\nnum_sinks = 4\\nfar_distance = -1\\nlayers = '" + layers + "'")
    sys.exit()
given = dict(word.split("=", 1) for word in words if "=" in word)
layers = [tuple(map(int, layer.split("+"))) for layer in given["attention.layers"].split(", ")]
keys = sum(layers[1])  # the second layer alone matters
folder = pathlib.Path(given["run.folder"])
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text(json.dumps({{"validation_loss": 2 + 20 / keys}}) + "\\n")
"""


def test_keys_go_where_they_gain():
    more = [2.0, 1.97, 1.99, 2.0001]
    fewer = [2.001, 2.05, 2.02, 2.005]
    budgets = layer_budgets.allocate(2.0, more, fewer, (508, 512), 0.002)
    assert budgets[0] == (254, 256)                      # half of it was to spare
    assert budgets[3] == (508, 512)                      # neither to spare nor to gain
    free = 1020 - 510
    assert sum(map(sum, budgets)) <= 4 * 1020 and free - 128 < sum(map(sum, budgets[1:])) - 3 * 1020 <= free
    assert budgets[1][0] - 508 == 3 * 128 and budgets[2][0] == 508  # .03 and .01 of three units: 3 and 1, of which there are 3 together
    assert budgets[1][1] == budgets[2][1] == 512


def test_a_layer_gets_four_times_its_budget_at_most():
    budgets = layer_budgets.allocate(2.0, [2.0] * 19 + [1.9], [2.0] * 19 + [2.1], (60, 68), 0.002)
    assert budgets[:19] == [(30, 34)] * 19 and 3 * 128 < sum(budgets[19]) <= 4 * 128


def test_nothing_moves_where_nothing_differs():
    assert layer_budgets.allocate(2.0, [1.9] * 3, [2.1] * 3, (508, 512), 0.002) == [(508, 512)] * 3
    assert layer_budgets.allocate(2.0, [2.0] * 3, [2.1] * 3, (508, 512), 0.002) == [(508, 512)] * 3


def test_measures_every_layer(tmp_path):
    program, log, out = tmp_path / "program", tmp_path / "log", tmp_path / "out.json"
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    command = [sys.executable, ROOT / "bench/layer_budgets.py", "run.toml", "--adapter", ROOT / "adapters/smollm2-135m.safetensors", "--program", program,
               "--output", out, "--jobs", 3, "run.device=cuda"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["loss"] == pytest.approx(2 + 20 / 1020)
    assert found["loss_with_more"][1] == pytest.approx(2 + 20 / 2040) and found["loss_with_more"][0] == found["loss_with_more"][2] == found["loss"]
    assert found["loss_with_fewer"][1] == pytest.approx(2 + 20 / 510)
    layers = found["layers"].split(", ")
    assert len(layers) == 30 and layers[1] == "3452+512" and set(layers[:1] + layers[2:]) == {"254+256"}
    assert found["loss_with_layers"] < found["loss"] and found["layers"] in done.stdout
    runs = [json.loads(line) for line in log.read_text().splitlines()][1:]
    assert len(runs) == 62 and all({"run.device=cuda", "attention.far_distance=1024", "optimiser.scorer_lr=0", "run.steps=1"} <= set(run) for run in runs)


def test_one_budget_for_all_is_where_it_begins(tmp_path):
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable, log=str(tmp_path / "log")))
    program.chmod(0o755)
    command = [sys.executable, ROOT / "bench/layer_budgets.py", "run.toml", "--adapter", "x", "--program", program, "attention.layers=8+8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "attention.layers=" in done.stderr


def test_says_what_the_program_said(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'sparsek: no such file' >&2\nexit 2\n")
    program.chmod(0o755)
    command = [sys.executable, ROOT / "bench/layer_budgets.py", "run.toml", "--adapter", "x", "--program", program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "sparsek: no such file" in done.stderr
