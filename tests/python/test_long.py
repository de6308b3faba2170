"""Lengths beyond 16-bit indices: a state over a million tokens, whole sequences around 70,000."""

import definition
import pytest
import torch
from inputs import random_inputs
from torch import Tensor

import sparsek

OPTIONS = definition.Options(topk=16, window_size=24, num_sinks=3, pool_size=40)
HEADS, HEAD_DIM = 2, 8


def keys_at(positions: Tensor) -> Tensor:
    """[..., head_dim]: what the synthetic document holds at a position, so that a carried row shows where it is from."""
    scales = torch.tensor([1, 7, 31, 127, 1021, 8191, 65521, 1048573])
    return torch.frac(positions.unsqueeze(-1).double() / scales).float()


def section_6_bytes(far: bool) -> int:
    """docs/math.md's formula, with what the operation carries beside it: ring scores, statistics, the length."""
    o, element = OPTIONS, 4
    rows = 2 * (o.num_sinks + o.window_size + o.topk) + (o.window_size if far else 0)
    formula = HEADS * HEAD_DIM * element * rows + HEADS * (12 * o.topk + 4 * o.pool_size)
    return formula + HEADS * (4 * o.window_size + 3 * 8) + 8


@pytest.mark.parametrize("far", [False, True])
def test_a_million_tokens(far: bool) -> None:
    """Chunks, then single tokens: the state's bytes never change and it holds the right positions, its best keys and
    its ring. Kept keys are the best of the whole document, since with a pool of more than topk nothing better is ever
    dropped."""
    tokens, singles, chunk = 1_000_000, 50, 1 << 17
    o = OPTIONS
    scores = torch.randn(1, tokens, HEADS)
    scores[:, chunk - 10 :: chunk] += 9  # the best keys wait in the ring while the chunk changes
    queries = torch.randn(1, chunk, HEADS, HEAD_DIM)
    state = sparsek.new_state(
        batch=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, **o.keywords(), far_rotary=far, dtype=torch.float32
    )
    size = section_6_bytes(far)
    assert state.size_in_bytes() == size
    begin = 0
    while begin < tokens:
        end = min(begin + chunk, tokens - singles) if begin < tokens - singles else begin + 1
        k = keys_at(torch.arange(begin, end)).view(1, -1, 1, HEAD_DIM).expand(1, -1, HEADS, -1)
        q = queries[:, : end - begin]
        keywords = o.keywords() | (dict(q_far=q, k_far=k) if far else {})
        with torch.no_grad():
            if end - begin > 1:
                out, _, state = sparsek.attention_chunk(q, k, k, scores[:, begin:end], state, **keywords)
            else:
                out = sparsek.decode_step(q, k, k, scores[:, begin:end], state, **keywords)
        begin = end
        assert torch.isfinite(out).all()
        assert state.size_in_bytes() == size
        assert state.lengths.tolist() == [end]
    sinks, ring = torch.arange(o.num_sinks), torch.arange(tokens - o.window_size, tokens)
    ring = ring[torch.argsort(ring % o.window_size)]
    for head in range(HEADS):
        candidates = scores[0, o.num_sinks : tokens - o.window_size, head]
        best = torch.sort(candidates, descending=True, stable=True)
        assert torch.equal(state.pool_scores[0, head], best.values[: o.pool_size])
        slots = state.slot_positions[0, head]
        assert sorted(slots.tolist()) == sorted((best.indices[: o.topk] + o.num_sinks).tolist())
        assert torch.equal(state.slot_scores[0, head], scores[0, slots, head])
        wanted = keys_at(torch.cat([sinks, ring, slots]))
        assert torch.equal(state.k[0, head], wanted)
        assert torch.equal(state.v[0, head], wanted)
        assert torch.equal(state.ring_scores[0, head], scores[0, ring, head])
        if far:
            assert torch.equal(state.ring_k[0, head], keys_at(ring))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far", [False, True])
def test_around_70000(dtype: torch.dtype, far: bool) -> None:
    seqlen = 70_001
    x = random_inputs(batch=1, seqlen=seqlen, num_heads=2, num_kv_heads=1, head_dim=16, dtype=dtype, far=far)
    x.scores += torch.linspace(0, 3, seqlen)[None, :, None]  # the selection keeps changing
    out, lse = sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS.keywords(), **x.far())
    queries = [0, 26, 27, 32_767, 32_768, 65_535, 65_536, 65_537, 65_600, 69_999, 70_000]
    exact = [None if t is None else t.double() for t in (x.q, x.k, x.v, x.scores, x.q_far, x.k_far)]
    wanted, wanted_lse = definition.attention(
        *exact[:4], OPTIONS, q_far=exact[4], k_far=exact[5], queries=queries
    )
    # float32: docs/math.md section 8; bfloat16: one rounding of each probability and of the output.
    tolerance = 1e-5 if dtype == torch.float32 else 1.2e-2
    error = (out[:, queries].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (error <= tolerance).all(), error
    assert torch.allclose(lse[:, :, queries].double(), wanted_lse, rtol=0, atol=1e-5)


def test_gradients_around_70000() -> None:
    """A row's gradient from the far end: dv of a key is the sum of its probabilities, which the last queries alone
    make here."""
    seqlen, last = 70_001, 10
    x = random_inputs(batch=1, seqlen=seqlen, num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    for tensor in x.tensors():
        tensor.requires_grad_()
    dout = torch.zeros_like(x.q)
    dout[:, -last:] = torch.randn(1, last, 2, 16)
    out, _ = sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS.keywords())
    grads = torch.autograd.grad(out, x.tensors(), dout)
    exact = [t.detach().double().requires_grad_() for t in x.tensors()]
    wanted_out, _ = definition.attention(*exact, OPTIONS, queries=range(seqlen - last, seqlen))
    wanted = torch.autograd.grad(wanted_out, exact, dout[:, -last:].double())
    for name, grad, exact_grad in zip(("dq", "dk", "dv", "dscores"), grads, wanted):
        error = (grad.double() - exact_grad).abs().max() / exact_grad.abs().max()
        assert error <= 1e-5, (name, error)
