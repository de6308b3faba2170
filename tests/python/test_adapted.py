"""bench/adapted.py with a program that answers at once: what it asks for, and that a run that is ended keeps what it has."""
import json
import subprocess
import sys

import pytest
from program import ROOT

PROGRAM = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if words[0] == "needles":
    if "--task" in words and words[words.index("--task") + 1] == "keys":
        sys.exit(1)
    print(json.dumps({{"accuracy": 0.5, "token_accuracy": 0.75, "token_accuracy_by_place": [0.75], "depths": [{{"right": 1}}]}}))
else:
    tokens = int(words[words.index("--max-tokens") + 1])
    loss = 1.0 if "a.safetensors" in words else 2.0
    print(json.dumps({{"tokens": tokens, "loss_by_position": [{{"from": i, "to": i + 512, "loss": loss}} for i in range(0, tokens, 512)]}}))
"""


def test_keeps_what_it_has(tmp_path):
    program, log, out = tmp_path / "program", tmp_path / "log", tmp_path / "out.json"
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    for name in ("manuals/m-0000", "other/essays-x-0000"):
        path = tmp_path / "text" / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_text("word " * 80_000)
    result = subprocess.run([sys.executable, ROOT / "bench/adapted.py", "--text", tmp_path / "text", "--adapter", "a.safetensors", "--program", program,
                             "--output", out], capture_output=True, timeout=120)
    assert result.returncode != 0  # needles' second task fails
    found = json.loads(out.read_text())
    assert found["loss"]["mean"]["manuals"] == {"dense": 2.0, "window": 2.0, "untrained": 2.0, "adapter": 1.0}
    assert found["context"]["mean"]["adapter after 65536"] == 1.0
    assert len(found["needles"]["found"]) == 10 and all(key.startswith("passkey ") for key in found["needles"]["found"])
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    untrained = [words for words in asked if "window_mass" in words]
    assert untrained and all("--scorer" in words and "--topk" in words for words in untrained)
    assert not any("dense" in words and "65536" in words for words in asked)  # beyond its positions


@pytest.mark.parametrize(("part", "wanted"), [("loss", "8192 tokens and more"), ("context", "67584 tokens together"), ("needles", "other/essays-*.txt")])
def test_says_which_text_is_missing(tmp_path, part, wanted):
    result = subprocess.run([sys.executable, ROOT / "bench/adapted.py", "--text", tmp_path, "--adapter", "a.safetensors", "--parts", part,
                             "--output", tmp_path / "out.json"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and wanted in result.stderr and "Traceback" not in result.stderr
