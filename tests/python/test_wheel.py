"""The wheel, around the library that is already built, installed into an environment of its own and used there."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("SPARSEK_BUILD_DIR", ROOT / "build/release"))

USE = """
import importlib.metadata, pathlib, sys
import torch, sparsek
from sparsek import _library
root, version = sys.argv[1:]
package = pathlib.Path(sparsek.__file__).resolve()
assert package.is_relative_to(pathlib.Path(root).resolve()), package
assert _library.candidates()[0].exists(), _library.candidates()
assert str(_library.candidates()[0]) in pathlib.Path("/proc/self/maps").read_text()
assert (package.parent / "py.typed").exists()
assert importlib.metadata.version("sparsek") == version
q, k, v = (torch.randn(1, 50, heads, 16, requires_grad=True) for heads in (4, 2, 2))
out, lse = sparsek.attention(q, k, v, torch.randn(1, 50, 2), topk=4, window_size=8)
out.sum().backward()
assert out.shape == q.shape and torch.isfinite(q.grad).all()
print("used")
"""


def run(*command: object, cwd: pathlib.Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    return result.stdout.decode()


def test_wheel(tmp_path: pathlib.Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    library = BUILD / "src/ops/libsparsek_ops.so"
    cuda_library = ROOT / "build/cuda/src/ops/cuda/libsparsek_ops_cuda.so"
    with_cuda = ("-C", f"cmake.define.SPARSEK_CUDA_LIBRARY={cuda_library}") if cuda_library.exists() else ()
    run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path,
        "-C", f"cmake.define.SPARSEK_LIBRARY={library}", *with_cuda, ROOT, cwd=tmp_path)  # fmt: skip
    (wheel,) = tmp_path.glob("sparsek-*-py3-none-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert "sparsek/lib/libsparsek_ops.so" in files
    assert ("sparsek/lib/libsparsek_ops_cuda.so" in files) == bool(with_cuda)

    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    run(*pip, "--python", home / "bin/python", "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = home.glob("lib/python3*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files stay unread
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert run(home / "bin/python", "-c", USE, home, version, cwd=tmp_path) == "used\n"
