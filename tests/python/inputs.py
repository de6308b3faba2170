"""Random inputs whose values differ along every axis."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    q_far: Optional[Tensor] = None
    k_far: Optional[Tensor] = None

    def far(self) -> dict[str, Optional[Tensor]]:
        return dict(q_far=self.q_far, k_far=self.k_far)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.scores, self.q_far, self.k_far) if t is not None]

    def slice(self, begin: int, end: int) -> "Inputs":
        cut = [None if t is None else t[:, begin:end] for t in vars(self).values()]
        return Inputs(*cut)


def random_inputs(
    batch: int = 2,
    seqlen: int = 40,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    far: bool = False,
    requires_grad: bool = False,
    spread: float = 1.0,
) -> Inputs:
    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    keys = (batch, seqlen, num_kv_heads, head_dim)
    queries = (batch, seqlen, num_heads, head_dim)
    score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = Inputs(
        normal(*queries),
        normal(*keys),
        normal(*keys),
        spread * normal(batch, seqlen, num_kv_heads, dtype=score_dtype),
        normal(*queries) if far else None,
        normal(*keys) if far else None,
    )
    if requires_grad:
        for tensor in inputs.tensors():
            tensor.requires_grad_()
    return inputs
