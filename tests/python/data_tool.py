"""Runs the data_tool executable, through which the Python tests reach the C++ readers and tokenizers."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def build_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("SPARSEK_BUILD_DIR", ROOT / "build" / "release"))


def data_tool(*args: object, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess:
    tool = build_dir() / "tests" / "data" / "data_tool"
    result = subprocess.run([str(tool), *map(str, args)], input=stdin, capture_output=True, timeout=300)
    if check and result.returncode != 0:
        raise AssertionError(f"data_tool {args}: {result.stderr.decode(errors='replace')}")
    return result
