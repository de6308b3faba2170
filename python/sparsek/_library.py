"""Finds and loads libsparsek_ops.so, which registers the operations of torch.ops.sparsek."""

from pathlib import Path

import torch

_NAME = "libsparsek_ops.so"


def candidates() -> list[Path]:
    """Where the library may lie: inside an installed wheel, then in the repository's build folder."""
    package = Path(__file__).resolve().parent
    repository = package.parent.parent
    return [package / "lib" / _NAME, repository / "build" / "release" / "src" / "ops" / _NAME]


def load() -> None:
    """Loads the library once; operations that someone has loaded already are kept.

    Raises:
        ImportError: no library was found; the message names every place that was looked at.
    """
    if hasattr(torch.ops.sparsek, "attention"):
        return
    for path in candidates():
        if path.exists():
            torch.ops.load_library(str(path))
            return
    places = ", ".join(str(path) for path in candidates())
    raise ImportError(f"{_NAME} not found (looked at {places}): run `make build`, or install the wheel")
