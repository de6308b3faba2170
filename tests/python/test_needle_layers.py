"""bench/needle_layers.py and adapter_file.py: the budgets it writes are what the program reads, and the layers it opens those that were asked for."""
import json
import subprocess
import sys

import pytest
from program import MODEL, ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import adapter_file  # noqa: E402
import common  # noqa: E402
import needle_layers  # noqa: E402

ADAPTERS = {name: ROOT / f"adapters/{name}.safetensors" for name in ("smollm2-135m", "smollm2-135m-256")}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_program_reads_the_budgets_written(name, tmp_path):
    header, metadata, tensors = adapter_file.read(ADAPTERS[name])
    layers = adapter_file.budgets(metadata)
    assert len(layers) == 30
    layers[23] = (7000, 96)
    adapter_file.write(tmp_path / "a.safetensors", layers, header, metadata, tensors)
    shown = run("inspect", "--model", MODEL, "--scorer", tmp_path / "a.safetensors", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["layers_topk_window"] == adapter_file.text(layers)
    assert adapter_file.read(tmp_path / "a.safetensors")[2] == tensors


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
            adapter_file.read(path)


@pytest.mark.parametrize(("options", "mentions"), [(["--jobs", "0"], "--jobs: expected 1 or more"), (["--tokens", "20"], "--tokens: expected 800"),
                                                   (["--adapter", "absent.safetensors"], "absent.safetensors: expected an adapter")])
def test_wrong_options_end_in_a_message(tmp_path, options, mentions):
    (tmp_path / "text.txt").write_text((ROOT / "docs/math.md").read_text())
    command = [sys.executable, ROOT / "bench/needle_layers.py", tmp_path / "text.txt", "--model", MODEL, "--adapter", ADAPTERS["smollm2-135m"],
               "--output", tmp_path / "out.json", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and mentions in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_needles_within_the_window_say_nothing(monkeypatch):
    depth = {"asked": 2, "right": 2, "token_accuracy": 1.0, "answer_loss": 0.1}
    found = {"depths": [depth | {"distance": 600.0, "right": 1, "answer_loss": 0.5}, depth | {"distance": 512.0}]}
    monkeypatch.setattr(common, "sparsek", lambda *arguments, **options: found)
    monkeypatch.setattr(sys, "argv", ["needle_layers.py", "text.txt", "--adapter", "adapter.safetensors", "--tokens", "700"])
    options = needle_layers.arguments()
    assert needle_layers.needles(options, 512) == {"asked": 2, "right": 1, "digits": 1.0, "answer_loss": 0.5}
    with pytest.raises(SystemExit, match="--tokens 700: expected more"):
        needle_layers.needles(options, 600)


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
