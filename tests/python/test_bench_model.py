"""bench/model_gpu.py on the CPU: a tiny shape on both sides, and a part that fails beside parts that do not."""
import json
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT

pytest.importorskip("transformers")
COMMAND = [sys.executable, ROOT / "bench/model_gpu.py", "--device", "cpu", "--shapes", "tiny", "--contexts", "70,20", "--batches", "1,3",
           "--decode-tokens", 3, "--topk", 8, "--window", 8, "--chunk", 32]


def measure(tmp_path, *options):
    output = tmp_path / "model.json"
    result = subprocess.run([*map(str, [*COMMAND, "--output", output, *options])], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def test_every_row_is_there(tmp_path):
    found, table = measure(tmp_path, "--program", PROGRAM, "--ways", "dynamic,static")
    contenders = ["sparsek", "transformers dynamic", "transformers static"]
    rows = {(row["contender"], row["context"], row["batch"]): row for row in found["results"]}
    assert set(rows) == {(name, context, batch) for name in contenders for context in (70, 20) for batch in (1, 3)}
    for row in rows.values():
        assert row["read_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert row["read_seconds"]["min"] <= row["read_seconds"]["median"] <= row["read_seconds"]["max"]
        assert row["decode_step_ms"]["min"] <= row["decode_step_ms"]["median"] <= row["decode_step_ms"]["max"]
    assert len(table.splitlines()) == 1 + len(rows) + 1
    assert found["runs"]["tiny"]["transformers"] and "topk 8" in found["runs"]["tiny"]["sparsek"]["attention"]


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    found, table = measure(tmp_path, "--program", PROGRAM, "--ways", "dynamic", "--window", "0")
    failed = [row for row in found["results"] if "failed" in row]
    assert [row["contender"] for row in failed] == ["sparsek"] and "--window" in failed[0]["failed"] and "--window" in table
    assert sum(row["contender"] == "transformers dynamic" for row in found["results"]) == 4
