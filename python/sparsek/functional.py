"""SparseK's operations as typed functions.

Layouts: q and out are [batch, seqlen, num_heads, head_dim]; k and v [batch, seqlen, num_kv_heads, head_dim]; scores
and everything the selection returns [batch, seqlen, num_kv_heads]; softmax_lse [batch, num_heads, seqlen]. The last
dimension of q, k, v is contiguous, other strides are free. q, k and v are float32, bfloat16 or float64; scores are
float32, or float64 with float64 q. head_dim is a multiple of 8 up to 256, num_heads a multiple of num_kv_heads.

On a GPU q, k and v are bfloat16 or float16, scores float32; head_dim is 64 or 128, num_heads at most 64 times
num_kv_heads; rows of q, k and v lie at multiples of 16 bytes, none of them twice (no `expand`). Every operation runs on
the current stream, waits for nothing on the host and can be captured in a CUDA graph; only cu_seqlens that lie on the
CPU break that: they are checked and copied. On the GPU they are taken as they are, clamped to the sequence.

Errors are the same everywhere: ValueError for a wrong shape, stride, device or value, TypeError for a wrong dtype,
NotImplementedError for a second derivative; each message states what was wanted and what was given. (Given to `select`,
`normalise_scores`, `sparsek` or `decode_step` on a GPU, a wrong dtype is a ValueError too.) Scores must be finite: on the
CPU others raise RuntimeError, on a GPU they turn that head's later rows into NaN. So does, on the CPU,
a state whose slots and pool do not fit its lengths: set nothing back, start with `new_state`.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

_ops = torch.ops.sparsek


def sparsek(z: Tensor, k: int) -> Tensor:
    """The projection of z onto {p: 0 <= p <= 1, sum p = k} along the last dimension (eq. 2).

    Args:
        z: [..., n], float32 or float64, finite.
        k: at least 1. With n <= k every weight is 1.

    Returns:
        p = clamp(z - tau, 0, 1), shaped and typed like z. Differentiable once.
    """
    return _ops.sparsek(z, k)


def normalise_scores(
    raw: Tensor,
    beta: Tensor,
    gamma: Tensor,
    slope: Tensor,
    *,
    stats: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    timestep_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores from a scorer's raw outputs, by their running mean and variance (eq. 1).

    Args:
        raw: [batch, seqlen, num_kv_heads], float32 or float64.
        beta, gamma, slope: [num_kv_heads], dtype of raw; slope in score per 1,024 positions.
        stats: [batch, num_kv_heads, 3] float64: count, mean and sum of squared deviations of what came before.
        cu_seqlens: int32 [num_documents + 1], document boundaries, with batch 1; not together with stats.
        timestep_norm: False leaves out mean and divisor.

    Returns:
        scores like raw, and the statistics after the last position. Differentiable once in raw, beta, gamma, slope and
        stats.
    """
    return _ops.normalise_scores(
        raw, beta, gamma, slope, stats=stats, cu_seqlens=cu_seqlens, timestep_norm=timestep_norm
    )


def window_mass(
    q: Tensor,
    k: Tensor,
    *,
    window_size: int,
    num_sinks: int = 0,
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> Tensor:
    """The delayed score y: the log of what a key's window paid it in its older half (eq. 1b). No gradient.

    Args:
        q, k, q_far, k_far, cu_seqlens: as in `attention`.

    Returns:
        [batch, seqlen, num_kv_heads], float32 (float64 for float64). Where no such query exists: log(1e-9).
    """
    return _ops.window_mass(
        q,
        k,
        window_size=window_size,
        num_sinks=num_sinks,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
        cu_seqlens=cu_seqlens,
    )


def select(
    scores: Tensor,
    *,
    topk: int,
    window_size: int,
    num_sinks: int = 0,
    pool_size: Optional[int] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which keys every query sees beside its window and the sinks, and with what threshold (eq. 3-6). No gradient.

    Args:
        scores: [batch, seqlen, num_kv_heads], float32 or float64, finite.
        topk: keys kept, at least 1. window_size: keys visible by recency, the query's own included.
        num_sinks: first positions that stay visible.
        pool_size: candidates that compete; None is max(4 * topk, 1024), 0 no limit, otherwise more than topk.
        cu_seqlens: int32 [num_documents + 1], starts 0, ends at seqlen, increasing, with batch 1.

    Returns:
        tau (dtype of scores, -inf where every weight is 1), and int32 expiry, frac_begin, frac_end: key j is selected
        at queries [j + window_size, expiry[j]) and its weight lies inside (0, 1) at [frac_begin[j], frac_end[j]).
    """
    return _ops.select(
        scores,
        topk=topk,
        window_size=window_size,
        num_sinks=num_sinks,
        pool_size=pool_size,
        cu_seqlens=cu_seqlens,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    topk: int,
    window_size: int,
    num_sinks: int = 0,
    pool_size: Optional[int] = None,
    gate: str = "soft",
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Causal attention over window, sinks and the topk selected keys (eq. 3-9), O(seqlen) in time and memory.

    Args:
        q: [batch, seqlen, num_heads, head_dim]. k, v: [batch, seqlen, num_kv_heads, head_dim]. All float32, bfloat16 or
            float64, head_dim a multiple of 8 up to 256; on a GPU bfloat16 or float16, 64 or 128. Autocast casts them.
        scores: [batch, seqlen, num_kv_heads], float32 (float64 with float64 q; a scorer under autocast wants
            `.float()`): a key's score, finite. Gradients: eq. 10-11.
        topk, window_size, num_sinks, pool_size, cu_seqlens: as in `select`.
        gate: "soft" multiplies selected values by their weight, "hard" by 1 (its gradient is the soft one's).
        softmax_scale: None is 1 / sqrt(head_dim).
        q_far, k_far: with both, keys outside the window use the logits <q_far, k_far> (eq. 9).
        deterministic: the same gradient bits every time; on a Hopper GPU the backward then takes about twice as long.

    Returns:
        out like q, and softmax_lse [batch, num_heads, seqlen], dtype of scores. Differentiable once in q, k, v, scores,
        q_far, k_far.

    Raises:
        ValueError, TypeError: shape, stride or value; dtype. RuntimeError: scores that are not finite (CPU).
    """
    return _ops.attention(
        q,
        k,
        v,
        scores,
        topk=topk,
        window_size=window_size,
        num_sinks=num_sinks,
        pool_size=pool_size,
        gate=gate,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
        cu_seqlens=cu_seqlens,
        deterministic=deterministic,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    tau: Tensor,
    expiry: Tensor,
    frac_begin: Tensor,
    frac_end: Tensor,
    *,
    window_size: int,
    num_sinks: int = 0,
    gate: str = "soft",
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    deterministic: bool = False,
    topk: Optional[int] = None,
) -> tuple[Tensor, Tensor]:
    """`attention` with a selection that `select` made, which activation checkpointing can keep (eq. 7-9).

    Args:
        tau, expiry, frac_begin, frac_end: what `select` returned for the same scores, window_size and num_sinks.
        topk: the selection's, which a GPU must be told: it lays out memory by it. Where a smaller one leaves no room for
            keys, their queries' out, softmax_lse and gradients are NaN.
        The rest: as in `attention`.
    """
    return _ops.attention_forward(
        q,
        k,
        v,
        scores,
        tau,
        expiry,
        frac_begin,
        frac_end,
        window_size=window_size,
        num_sinks=num_sinks,
        gate=gate,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
        cu_seqlens=cu_seqlens,
        deterministic=deterministic,
        topk=topk,
    )


class AttentionState(NamedTuple):
    """What attention carries from chunk to chunk and token to token, for one layer (section 6). Its size never changes,
    unless pool_size is 0: then the pool keeps every score.

    Fields: k, v (rows: num_sinks sinks, window_size ring rows with position p at p % window_size, topk slots), ring_k
    (far rotary only), ring_scores, ring_mass (delayed scores only), slot_scores, slot_positions, pool_scores, stats,
    lengths (tokens read, per batch row). `_replace(ring_mass=..., stats=...)` puts back what `window_mass_chunk` and
    `normalise_scores` return.
    """

    k: Tensor  # [batch, num_kv_heads, num_sinks + window_size + topk, head_dim]; with far rotary the unrotated keys
    v: Tensor  # like k
    ring_k: Optional[Tensor]  # [batch, num_kv_heads, window_size, head_dim] rotated keys; None without far rotary
    ring_scores: Tensor  # [batch, num_kv_heads, window_size] scores of the keys still in the window
    ring_mass: Optional[Tensor]  # [batch, num_kv_heads, window_size] sums of eq. 1b; None when not wanted
    slot_scores: Tensor  # [batch, num_kv_heads, topk]
    slot_positions: Tensor  # [batch, num_kv_heads, topk] int64, -1 empty
    pool_scores: Tensor  # [batch, num_kv_heads, pool_size] descending, -inf unused
    stats: Tensor  # [batch, num_kv_heads, 3] float64, of `normalise_scores`
    lengths: Tensor  # [batch] int64 tokens read

    def size_in_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def detach(self) -> "AttentionState":
        """The same values without their graph: what truncated backpropagation carries on."""
        return AttentionState(*(None if tensor is None else tensor.detach() for tensor in self))


def new_state(
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    topk: int,
    window_size: int,
    num_sinks: int = 0,
    pool_size: Optional[int] = None,
    far_rotary: bool = False,
    delayed_scores: bool = False,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> AttentionState:
    """The state before the first token (section 6).

    Args:
        batch, num_kv_heads, head_dim, topk, window_size, num_sinks, pool_size: as the chunks and steps will have them.
        far_rotary: whether they will come with q_far and k_far. delayed_scores: as in `attention_chunk`.
        dtype: of q, k and v: float32, bfloat16 or float64, on a GPU bfloat16 or float16; None is
            torch.get_default_dtype().
    """
    state = AttentionState(
        *_ops.new_state(
            batch=batch,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            topk=topk,
            window_size=window_size,
            num_sinks=num_sinks,
            pool_size=pool_size,
            far_rotary=far_rotary,
            delayed_scores=delayed_scores,
            dtype=torch.get_default_dtype() if dtype is None else dtype,
            device=device,
        )
    )
    return state._replace(
        ring_k=state.ring_k if far_rotary else None, ring_mass=state.ring_mass if delayed_scores else None
    )


def attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    state: AttentionState,
    *,
    topk: int,
    window_size: int,
    num_sinks: int = 0,
    pool_size: Optional[int] = None,
    gate: str = "soft",
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    delayed_scores: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, AttentionState]:
    """Attention of a chunk of any length behind a carried state (eq. 12-13).

    Args:
        q, k, v, scores: the chunk's, laid out as in `attention`.
        state: what the previous chunk returned, or `new_state(...)` of the same options.
        delayed_scores: False: scores[:, t] belongs to the chunk's token t. True: it is the final score of the key at
            position length + t - window_size, which becomes a candidate at query t (ignored where that is below
            num_sinks).
        The rest: as in `attention`.

    Returns:
        out and softmax_lse as `attention` gives them for the whole sequence, and the new state. Differentiable once in
        q, k, v, scores, q_far, k_far and the state's tensors. stats and ring_mass are passed on as they are
        (`normalise_scores` and `window_mass_chunk` make the new ones).
    """
    out, softmax_lse, new_k, new_v, new_ring_k, *scores_and_lengths = _ops.attention_chunk(
        q,
        k,
        v,
        scores,
        state.k,
        state.v,
        state.ring_k,
        state.ring_scores,
        state.slot_scores,
        state.slot_positions,
        state.pool_scores,
        state.lengths,
        topk=topk,
        window_size=window_size,
        num_sinks=num_sinks,
        pool_size=pool_size,
        gate=gate,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
        delayed_scores=delayed_scores,
        deterministic=deterministic,
    )
    ring_scores, slot_scores, slot_positions, pool_scores, lengths = scores_and_lengths
    new = AttentionState(
        k=new_k,
        v=new_v,
        ring_k=None if state.ring_k is None else new_ring_k,
        ring_scores=ring_scores,
        ring_mass=state.ring_mass,
        slot_scores=slot_scores,
        slot_positions=slot_positions,
        pool_scores=pool_scores,
        stats=state.stats,
        lengths=lengths,
    )
    return out, softmax_lse, new


def window_mass_chunk(
    q: Tensor,
    k: Tensor,
    state: AttentionState,
    *,
    window_size: int,
    num_sinks: int = 0,
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """`window_mass` behind a state that has ring_mass; call it before `attention_chunk`, with the same state.

    Returns:
        y [batch, chunk, num_kv_heads], final, of the keys that become candidates at the chunk's queries (positions
        length + t - window_size; meaningless where that is negative), and the new ring_mass.
    """
    if state.ring_mass is None:
        raise ValueError("the state has no ring_mass: create it with delayed_scores=True")
    return _ops.window_mass_chunk(
        q,
        k,
        state.k,
        state.ring_k,
        state.ring_mass,
        state.lengths,
        window_size=window_size,
        num_sinks=num_sinks,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
    )


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    state: AttentionState,
    *,
    topk: int,
    window_size: int,
    num_sinks: int = 0,
    pool_size: Optional[int] = None,
    gate: str = "soft",
    softmax_scale: Optional[float] = None,
    q_far: Optional[Tensor] = None,
    k_far: Optional[Tensor] = None,
    delayed_scores: bool = False,
) -> Tensor:
    """One token per batch row (eq. 12); changes `state` in place, its lengths and ring_mass included. No gradient.

    Args:
        q: [batch, 1, num_heads, head_dim]. k, v: [batch, 1, num_kv_heads, head_dim]. scores: [batch, 1, num_kv_heads],
            with delayed_scores as in `attention_chunk`.
        pool_size: not 0: the state has a fixed size.

    Returns:
        out like q.
    """
    return _ops.decode_step(
        q,
        k,
        v,
        scores,
        state.k,
        state.v,
        state.ring_k,
        state.ring_scores,
        state.ring_mass,
        state.slot_scores,
        state.slot_positions,
        state.pool_scores,
        state.lengths,
        topk=topk,
        window_size=window_size,
        num_sinks=num_sinks,
        pool_size=pool_size,
        gate=gate,
        softmax_scale=softmax_scale,
        q_far=q_far,
        k_far=k_far,
        delayed_scores=delayed_scores,
    )


def leaving_mass(state: AttentionState, *, window_size: int) -> Tensor:
    """y [batch, 1, num_kv_heads] of the key that the next `decode_step` makes a candidate (eq. 1b)."""
    if state.ring_mass is None:
        raise ValueError("the state has no ring_mass: create it with delayed_scores=True")
    return _ops.leaving_mass(state.ring_mass, state.lengths, window_size=window_size)
