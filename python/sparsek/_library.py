"""Finds and loads the libraries that register the operations of torch.ops.sparsek.

libsparsek_ops.so has them all and their CPU kernels. libsparsek_ops_cuda.so adds the CUDA kernels, where torch itself was
built with CUDA; it is a library of its own because it needs libtorch_cuda.so, which a torch for the CPU does not have.
"""

from pathlib import Path
from typing import NoReturn

import torch

_NAME = "libsparsek_ops.so"
_CUDA_NAME = "libsparsek_ops_cuda.so"

# The operations that libsparsek_ops_cuda.so has kernels for.
CUDA_OPERATIONS = (
    "normalise_scores",
    "normalise_scores_backward",
    "sparsek",
    "sparsek_backward",
    "select",
    "_select_rows",
    "_select_chunk",
    "_visibility",
    "_chunk_visibility",
    "_window_rows",
    "_attention_rows",
    "attention_backward",
    "_window_mass_rows",
    "decode_step",
    "_add_rms_norm",
    "_add_rms_norm_backward",
    "_split_rotary",
    "_split_rotary_backward",
    "_swiglu",
    "_swiglu_backward",
    "_cross_entropy_",
)

_cuda_kernels_absent = None  # a torch.library.Library while calls on a GPU are answered with what is missing


def candidates(name: str = _NAME) -> list[Path]:
    """Where a library may lie: inside an installed wheel, then in the repository's build folders."""
    package = Path(__file__).resolve().parent
    build = package.parent.parent / "build"
    folders = [build / "cuda" / "src" / "ops" / "cuda"] if name == _CUDA_NAME else []
    if name == _NAME:
        # A GPU host has build/cuda alone, made against its own torch.
        folders = [build / "release" / "src" / "ops", build / "cuda" / "src" / "ops"]
    return [folder / name for folder in [package / "lib", *folders]]


def load() -> None:
    """Loads the libraries once; operations that someone has loaded already are kept.

    Raises:
        ImportError: libsparsek_ops.so was not found; the message names every place that was looked at. Without
            libsparsek_ops_cuda.so everything but calls on a GPU works, and those raise NotImplementedError.
    """
    if not hasattr(torch.ops.sparsek, "attention") and not _load_first(candidates()):
        places = ", ".join(str(path) for path in candidates())
        raise ImportError(f"{_NAME} not found (looked at {places}): run `make build`, or install the wheel")
    if torch.version.cuda is None or has_cuda_kernels():
        return
    if not _load_first(candidates(_CUDA_NAME)):
        _answer_without_cuda_kernels()


def load_cuda(path: str) -> None:
    """Loads a libsparsek_ops_cuda.so from elsewhere, before `import sparsek` or after it found none."""
    global _cuda_kernels_absent
    _cuda_kernels_absent = None
    torch.ops.load_library(path)


def has_cuda_kernels() -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return _cuda_kernels_absent is None and has_kernel(f"sparsek::{CUDA_OPERATIONS[0]}", "CUDA")


def _load_first(paths: list[Path]) -> bool:
    for path in paths:
        if path.exists():
            torch.ops.load_library(str(path))
            return True
    return False


def _answer_without_cuda_kernels() -> None:
    global _cuda_kernels_absent
    places = ", ".join(str(path) for path in candidates(_CUDA_NAME))
    message = (
        f"sparsek's CUDA kernels are not here: {_CUDA_NAME} was not found (looked at {places}). Build it with `make cuda` "
        "(needs nvcc, no GPU), or install a wheel that was built with -DSPARSEK_CUDA=ON"
    )

    def refuse(*arguments: object, **keywords: object) -> NoReturn:
        raise NotImplementedError(message)

    _cuda_kernels_absent = torch.library.Library("sparsek", "IMPL")
    for name in CUDA_OPERATIONS:
        _cuda_kernels_absent.impl(name, refuse, "CUDA")
