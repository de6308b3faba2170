"""libsparsek_ops_cuda.so without a GPU: what it names, what it needs, and what a call says where it is missing."""

import ctypes
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build/cuda/src/ops/cuda/libsparsek_ops_cuda.so"
TORCH = pathlib.Path(torch.__file__).parent / "lib"

built = pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY.name} is not built: make cuda")


def output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def symbols(library: pathlib.Path, which: str) -> set[str]:
    lines = output("nm", "-D", f"--{which}-only", library).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def functions_of_the_stub() -> set[str]:
    source = (ROOT / "src/ops/cuda/torch_cuda_stub.c").read_text()
    return set(re.findall(r"^\w+ (\w+)\(", source, re.MULTILINE))


@built
def test_needs_torchs_libraries_by_name() -> None:
    """Python loads them with local scope: without these entries the library's symbols stay unresolved."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", LIBRARY))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    others = set(needed) - {"libtorch_cpu.so", "libtorch_cuda.so"}
    wanted = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux-x86-64\.so\.2"
    assert all(re.fullmatch(wanted, name) for name in others), others  # no libcudart: its own is inside
    (path,) = re.findall(r"(?:RUNPATH|RPATH).*\[(.*)\]", output("readelf", "-d", LIBRARY))
    assert path == "$ORIGIN/../../torch/lib"


@built
def test_calls_torchs_stable_functions_only() -> None:
    wanted = {name for name in symbols(LIBRARY, "undefined") if re.match("aoti_torch|torch_", name)}
    mangled = {name for name in symbols(LIBRARY, "undefined") if re.match(r"_Z.*(c10|at|caffe2|torch)\d*[A-Z]", name)}
    assert not {name for name in mangled if re.match(r"_ZN?K?(3c10|2at|6caffe2|5torch)", name)}
    assert not {name for name in symbols(LIBRARY, "undefined") if name.startswith("cu")}  # the runtime is inside
    of_torch_cuda = functions_of_the_stub()
    assert of_torch_cuda == {"aoti_torch_get_current_cuda_stream"}
    assert of_torch_cuda <= wanted
    assert wanted - of_torch_cuda <= symbols(TORCH / "libtorch_cpu.so", "defined")


@built
def test_keeps_its_cuda_runtime_to_itself() -> None:
    assert not {name for name in symbols(LIBRARY, "defined") if re.match("cuda|cu[A-Z]|__cuda", name)}


@built
@pytest.mark.skipif(tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36), reason="built on a newer system, for it")
def test_runs_where_the_oldest_supported_system_does() -> None:
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d+\.\d+)", output("objdump", "-T", LIBRARY))}
    assert max(versions) <= (2, 36), max(versions)


@built
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_does_not_load_beside_a_torch_without_cuda() -> None:
    with pytest.raises(OSError, match="libtorch_cuda.so"):
        ctypes.CDLL(str(LIBRARY))


MISSING = """
import importlib.util, sys
import torch
torch.version.cuda = "13.0"  # as a torch with CUDA says it
spec = importlib.util.spec_from_file_location("_library", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
library._CUDA_NAME = "libnowhere.so"
library.load()
assert not library.has_cuda_kernels()
x = torch.randn(1, 9, 1)
assert torch.ops.sparsek.select(x, topk=2, window_size=3)[0].shape == x.shape
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name in library.CUDA_OPERATIONS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsek::{name}", "CUDA"), name
for operation in (torch.ops.sparsek.select, torch.ops.sparsek._select_rows):
    try:
        operation.default.redispatch(key, x, topk=2, window_size=3)
    except NotImplementedError as error:
        print(error)
"""


def test_a_call_says_what_is_missing() -> None:
    """A torch with CUDA and no libsparsek_ops_cuda.so: the CPU works, a call on a GPU names the file and how to get it."""
    said = output(sys.executable, "-c", MISSING, ROOT / "python/sparsek/_library.py")
    assert said.count("libnowhere.so was not found (looked at ") == 2 and said.count("`make cuda`") == 2, said


ON_THE_CPU = """
import ctypes, importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("_library", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
library.load()
ctypes.CDLL(sys.argv[2])
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
scores, heads = torch.randn(1, 9, 1), torch.rand(1)
q, state, lengths = torch.zeros(1, 1, 2, 64).bfloat16(), torch.zeros(1, 2, 5, 64).bfloat16(), torch.zeros(1).long()
slots, pool = torch.zeros(1, 2, 2), torch.zeros(1, 2, 1024)
decode = (q, q, q, torch.zeros(1, 1, 2), state, state, None, torch.zeros(1, 2, 3), None, slots, slots.long(), pool, lengths)
for name, arguments, keywords in (
    ("select", (scores,), dict(topk=2, window_size=3)),
    ("normalise_scores", (scores, heads, heads, heads), {}),
    ("sparsek_backward", (scores, scores), {}),
    ("decode_step", decode, dict(topk=2, window_size=3)),
):
    try:
        getattr(torch.ops.sparsek, name).default.redispatch(key, *arguments, **keywords)
    except ValueError as error:
        print(name + ": " + str(error).splitlines()[0])
"""


@built
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_tensors_on_the_cpu_are_refused_by_name() -> None:
    """As where only some of a call's tensors are on a GPU. The stand-in for libtorch_cuda.so serves: nothing is launched."""
    command = [sys.executable, "-c", ON_THE_CPU, ROOT / "python/sparsek/_library.py", LIBRARY]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARY.parent / "stub")}
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert said.returncode == 0, said.stderr
    first = {"select": "scores", "normalise_scores": "raw", "sparsek_backward": "p", "decode_step": "q"}
    text = "{}: {} must be on a GPU like other tensors of this call, got cpu"
    assert said.stdout.splitlines() == [text.format(*pair) for pair in first.items()]


def test_every_cuda_operation_is_listed() -> None:
    """The list that answers without the library is the list of what the library registers."""
    from sparsek import _library

    registered = set()
    for source in (ROOT / "src/ops/cuda").glob("*.cc"):
        registered |= set(re.findall(r'm\.impl\("(\w+)"', source.read_text()))
    assert registered == set(_library.CUDA_OPERATIONS)
