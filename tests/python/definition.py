"""docs/math.md's sections 2-4 in slow, differentiable torch code: one query at a time, sorted lists, no shared state.

Autograd through it gives eq. 10-11: tau is the closed form over F, and gate "hard" is written as the straight-through
estimator it is. It shares nothing with the library.
"""

import math
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    topk: int
    window_size: int
    num_sinks: int = 0
    pool_size: Optional[int] = None

    @property
    def pool(self) -> int:
        return max(4 * self.topk, 1024) if self.pool_size is None else self.pool_size

    def keywords(self) -> dict[str, Optional[int]]:
        return dict(
            topk=self.topk, window_size=self.window_size, num_sinks=self.num_sinks, pool_size=self.pool_size
        )


def sparsek(z: Tensor, k: int) -> Tensor:
    """eq. 2 for one vector."""
    if z.numel() <= k:
        return torch.ones_like(z)
    ordered = torch.sort(z.detach(), descending=True).values.tolist()
    best = None
    for ones in range(k + 1):  # |S|; then F is a run of the sorted values
        for fractional in range(2, len(ordered) - ones + 1):
            inside = ordered[ones : ones + fractional]
            tau = (math.fsum(inside) + ones - k) / fractional
            fits = all(0 < x - tau < 1 for x in inside)
            fits = fits and all(x - tau >= 1 for x in ordered[:ones])
            if fits and all(x - tau <= 0 for x in ordered[ones + fractional :]):
                best = tau
    if best is None:
        return torch.clamp(z.detach() - (ordered[k - 1] - 1), 0, 1)
    p = torch.clamp(z.detach() - best, 0, 1)
    inside = (p > 0) & (p < 1)
    return torch.where(inside, p + (z - z[inside].mean()) - (z - z[inside].mean()).detach(), p)


def selection(u: Tensor, query: int, options: Options) -> tuple[list[int], list[int], Tensor]:
    """Pool and selected positions of one query, by rank, and the pool's weights (eq. 3-6)."""
    candidates = range(options.num_sinks, query - options.window_size + 1)
    values = u.detach().tolist()
    pool = sorted(candidates, key=lambda j: (-values[j], j))
    if options.pool > 0:
        pool = pool[: options.pool]
    weights = sparsek(u[pool], options.topk) if pool else u[:0]
    return pool, pool[: options.topk], weights


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    options: Options,
    gate: str = "soft",
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    queries: Optional[Sequence[int]] = None,
) -> tuple[Tensor, Tensor]:
    """eq. 7-9 for whole sequences, or for some of their queries."""
    batch, seqlen, num_heads, head_dim = q.shape
    queries = range(seqlen) if queries is None else queries
    group = num_heads // k.shape[2]
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for b in range(batch):
        for i in queries:
            for h in range(num_heads):
                kv = h // group
                window = list(range(max(0, i - options.window_size + 1), i + 1))
                sinks = [j for j in range(min(options.num_sinks, i + 1)) if j not in window]
                _, selected, weights = selection(scores[b, :, kv], i, options)
                far = sinks + selected
                logits_window = k[b, window, kv] @ q[b, i, h]
                if q_far is None:
                    logits_far = k[b, far, kv] @ q[b, i, h]
                else:
                    logits_far = k_far[b, far, kv] @ q_far[b, i, h]
                logits = scale * torch.cat([logits_window, logits_far])
                chosen = weights[: len(selected)]
                if gate == "hard":
                    chosen = chosen + (1 - chosen).detach()
                gates = torch.cat([torch.ones(len(window) + len(sinks), dtype=chosen.dtype), chosen])
                outs.append((torch.softmax(logits, 0) * gates) @ v[b, window + far, kv])
                lses.append(torch.logsumexp(logits, 0))
    out = torch.stack(outs).reshape(batch, len(queries), num_heads, head_dim)
    return out, torch.stack(lses).reshape(batch, len(queries), num_heads).transpose(1, 2)


def window_mass(
    q: Tensor,
    k: Tensor,
    options: Options,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
) -> Tensor:
    """eq. 1b."""
    batch, seqlen, num_heads, head_dim = q.shape
    num_kv_heads, w = k.shape[2], options.window_size
    mass = torch.zeros(batch, seqlen, num_kv_heads, dtype=torch.float64)
    for b in range(batch):
        for i in range(seqlen):
            for h in range(num_heads):
                kv = h // (num_heads // num_kv_heads)
                window = list(range(max(0, i - w + 1), i + 1))
                sinks = [j for j in range(min(options.num_sinks, i + 1)) if j not in window]
                near = k[b, window, kv] @ q[b, i, h]
                far = k[b, sinks, kv] @ q[b, i, h] if q_far is None else k_far[b, sinks, kv] @ q_far[b, i, h]
                p = torch.softmax(torch.cat([near, far]).double() / math.sqrt(head_dim), 0)
                for at, j in enumerate(window):
                    if i >= j + (w + 1) // 2:
                        mass[b, j, kv] += p[at]
    first = torch.arange(seqlen) + (w + 1) // 2
    last = torch.clamp(torch.arange(seqlen) + w - 1, max=seqlen - 1)
    count = torch.clamp(last - first + 1, min=1)
    return torch.log(1e-9 + mass / count[None, :, None])
