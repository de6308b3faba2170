"""SparseK attention: linear time, constant memory, a learned and differentiable selection.

The definition, with the equation numbers the docstrings cite, is docs/math.md. ``torch.ops.sparsek`` has the same
operations without the types.
"""

from sparsek import _library

_library.load()

from sparsek.functional import (  # noqa: E402  (the operations exist once the library is loaded)
    AttentionState,
    attention,
    attention_chunk,
    attention_forward,
    decode_step,
    leaving_mass,
    new_state,
    normalise_scores,
    select,
    sparsek,
    window_mass,
    window_mass_chunk,
)

__all__ = [
    "AttentionState",
    "attention",
    "attention_chunk",
    "attention_forward",
    "decode_step",
    "leaving_mass",
    "new_state",
    "normalise_scores",
    "select",
    "sparsek",
    "window_mass",
    "window_mass_chunk",
]
