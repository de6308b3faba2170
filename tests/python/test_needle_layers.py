"""bench/needle_layers.py: the budgets it writes are what the program reads, and the layers it opens those that were asked for."""
import json
import subprocess
import sys

import pytest
from program import MODEL, ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import needle_layers  # noqa: E402

ADAPTERS = {name: ROOT / f"adapters/{name}.safetensors" for name in ("smollm2-135m", "smollm2-135m-256")}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_program_reads_the_budgets_written(name, tmp_path):
    header, metadata, tensors = needle_layers.read(ADAPTERS[name])
    layers = needle_layers.budgets(metadata)
    assert len(layers) == 30
    layers[23] = (7000, 96)
    needle_layers.write(tmp_path / "a.safetensors", layers, header, metadata, tensors)
    shown = run("inspect", "--model", MODEL, "--scorer", tmp_path / "a.safetensors", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["layers_topk_window"] == needle_layers.budgets_text(layers)
    assert needle_layers.read(tmp_path / "a.safetensors")[2] == tensors


def test_layers_are_numbers_spans_and_sums():
    own = [(10, 5)] * 30
    opened = needle_layers.cases_of("20-22,5,1+3", own, 700)
    assert list(opened) == ["layer 20", "layer 21", "layer 22", "layer 5", "layer 1+3"]
    assert [layer for layer in range(30) if opened["layer 1+3"][layer] == (700, 5)] == [1, 3]
    assert opened["layer 5"] == own[:5] + [(700, 5)] + own[6:]
    assert len(needle_layers.cases_of(None, own, 700)) == 30
    for wrong, mentions in (("3,x", "found x"), ("3-", "found 3-"), ("30", "0 to 29"), ("-1", "found -1"), ("5-3", "found 5-3")):
        with pytest.raises(SystemExit, match=mentions):
            needle_layers.cases_of(wrong, own, 700)


def test_other_files_are_named(tmp_path):
    (tmp_path / "short").write_bytes(b"GGUF")
    for path in (tmp_path / "short", tmp_path / "missing"):
        with pytest.raises(SystemExit, match=path.name):
            needle_layers.read(path)


def test_opens_a_layer(tmp_path):
    (tmp_path / "text.txt").write_text((ROOT / "docs/math.md").read_text() * 2)
    command = [sys.executable, ROOT / "bench/needle_layers.py", tmp_path / "text.txt", "--model", MODEL, "--adapter", ADAPTERS["smollm2-135m-256"], "--layers", "23",
               "--tokens", "900", "--samples", "1", "--output", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert list(found) == ["as they are", "dense", "layer 23"]
    assert len({row["asked"] for row in found.values()}) == 1 and found["dense"]["asked"] > 5  # beyond the window alone
    assert found["layer 23"]["answer_loss"] != found["as they are"]["answer_loss"]
