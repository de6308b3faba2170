"""What README.md and CONTRIBUTING.md say can be typed, runs; what they name, exists."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("SPARSEK_BUILD_DIR", ROOT / "build/release"))
README = (ROOT / "README.md").read_text()
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md")}
COMMANDS = re.findall(r"^    (build/release/sparsek .*)$", README, re.MULTILINE)


def test_there_is_something_to_run() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"generate", "perplexity", "inspect"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    words = shlex.split(command)
    words[0] = str(BUILD / "sparsek")
    if "--out" in words:  # shards of a text that has changed since are refused
        out = words[words.index("--out") + 1]
        assert out.startswith("build/")
        shutil.rmtree(ROOT / out, ignore_errors=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave busy cores to others
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip()


def test_python_block(tmp_path: pathlib.Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2  # the second goes on with the first's tensors
    check = "\nassert all(torch.isfinite(t.grad).all() for t in (q, k, v, scores))\nassert state.lengths.tolist() == [4097]\n"
    code = "\n".join(blocks) + check
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_and_paths(name: str) -> None:
    text = TEXTS[name]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets, named - targets
    for path in set(re.findall(r"`((?:src|docs|tests|bench|scripts|python)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r"\]\((docs/[\w./-]+)\)", text)):
        assert (ROOT / path).exists(), path
