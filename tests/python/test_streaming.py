"""eq. 12-13: whole sequences, chunks of any sizes and single tokens give the same numbers and gradients."""

import pytest
import torch
from inputs import Inputs, random_inputs

import sparsek
from sparsek import AttentionState

SEQLEN = 75
CHUNKS = {
    "ones": [1] * SEQLEN,
    "below the window": [3] * (SEQLEN // 3),
    "above window and topk": [33, 30, 12],
    "mixed": [5, 1, 40, 2, 1, 26],
    "whole": [SEQLEN],
}
OPTIONS = {
    "plain": dict(topk=4, window_size=6),
    "sinks": dict(topk=4, window_size=6, num_sinks=3, pool_size=7),
    "more sinks than window": dict(topk=3, window_size=2, num_sinks=5, pool_size=4),
    "window of one": dict(topk=2, window_size=1, num_sinks=1, pool_size=3),
    "no pool limit": dict(topk=4, window_size=5, num_sinks=2, pool_size=0),
    "window above the sequence": dict(topk=4, window_size=100, num_sinks=2),
    "topk above the sequence": dict(topk=100, window_size=4, num_sinks=2),
}


def start(options: dict, far: bool = False, delayed: bool = False, dtype: torch.dtype = torch.float64):
    return sparsek.new_state(
        batch=2, num_kv_heads=2, head_dim=16, **options, far_rotary=far, delayed_scores=delayed, dtype=dtype
    )


def run_chunks(inputs: Inputs, chunks: list[int], state: AttentionState, **keywords):
    outs, lses, begin = [], [], 0
    for chunk in chunks:
        x = inputs.slice(begin, begin + chunk)
        out, lse, state = sparsek.attention_chunk(x.q, x.k, x.v, x.scores, state, **keywords, **x.far())
        outs.append(out)
        lses.append(lse)
        begin += chunk
    return torch.cat(outs, 1), torch.cat(lses, 2), state


def sorted_slots(state: AttentionState) -> list[torch.Tensor]:
    """Slots in the order of their positions: their order in memory is free. Empty ones are zeroed."""
    order = state.slot_positions.argsort(2)
    empty = (state.slot_positions < 0).gather(2, order)
    num_fixed = state.k.size(2) - state.slot_positions.size(2)
    rows = [t[:, :, num_fixed:].gather(2, order.unsqueeze(3).expand(-1, -1, -1, t.size(3))) for t in (state.k, state.v)]
    return [
        state.slot_positions.gather(2, order),
        state.slot_scores.gather(2, order).masked_fill(empty, 0),
        *(t.masked_fill(empty.unsqueeze(3), 0) for t in rows),
    ]


def assert_same_state(a: AttentionState, b: AttentionState, tolerance: float = 1e-12) -> None:
    num_fixed = a.k.size(2) - a.slot_positions.size(2)
    pairs = list(zip(sorted_slots(a), sorted_slots(b)))
    pairs += [(a.k[:, :, :num_fixed], b.k[:, :, :num_fixed]), (a.v[:, :, :num_fixed], b.v[:, :, :num_fixed])]
    pairs += [(a.pool_scores, b.pool_scores), (a.ring_scores, b.ring_scores), (a.lengths, b.lengths)]
    for optional in ((a.ring_k, b.ring_k), (a.ring_mass, b.ring_mass)):
        pairs += [optional] if optional[0] is not None else []
    for mine, right in pairs:
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chunks_equal_the_whole_sequence(options: dict, gate: str, far: bool) -> None:
    inputs = random_inputs(seqlen=SEQLEN, far=far)
    whole = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, gate=gate, **inputs.far())
    states = []
    for chunks in CHUNKS.values():
        out, lse, state = run_chunks(inputs, chunks, start(options, far), **options, gate=gate)
        torch.testing.assert_close(out, whole[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, whole[1], rtol=1e-11, atol=1e-11)
        states.append(state)
    if options.get("pool_size") != 0:  # without a limit the pool's capacity depends on the chunks
        for state in states[1:]:
            assert_same_state(state, states[0])


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "no pool limit"])  # that one is refused
def test_single_tokens_equal_the_whole_sequence(case: str, gate: str, far: bool) -> None:
    options = OPTIONS[case]
    inputs = random_inputs(seqlen=SEQLEN, far=far)
    whole, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, gate=gate, **inputs.far())
    for chunks in ([], [20], [3, 37]):  # chunks first, then tokens
        read = sum(chunks)
        state = start(options, far)
        if chunks:
            state = run_chunks(inputs, chunks, state, **options, gate=gate)[2]
        size = state.size_in_bytes()
        for i in range(read, SEQLEN - 5):
            x = inputs.slice(i, i + 1)
            out = sparsek.decode_step(x.q, x.k, x.v, x.scores, state, **options, gate=gate, **x.far())
            torch.testing.assert_close(out, whole[:, i : i + 1], rtol=1e-11, atol=1e-11)
        assert state.size_in_bytes() == size
        # and chunks after tokens
        out, _, _ = run_chunks(inputs.slice(SEQLEN - 5, SEQLEN), [4, 1], state, **options, gate=gate)
        torch.testing.assert_close(out, whole[:, SEQLEN - 5 :], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("window_size", [1, 2, 7])
def test_delayed_scores_stream(window_size: int, far: bool) -> None:
    options = dict(topk=4, window_size=window_size, num_sinks=3, pool_size=9)
    mass = dict(window_size=window_size, num_sinks=3)
    inputs = random_inputs(seqlen=SEQLEN, far=far)
    y = sparsek.window_mass(inputs.q, inputs.k, **mass, **inputs.far())
    if window_size == 1:  # every y is log(1e-9): ties, broken by position
        assert (y == y[0, 0, 0]).all()
    whole, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, y, **options, **inputs.far())
    for chunks in CHUNKS.values():
        state, begin = start(options, far, delayed=True), 0
        token_state = start(options, far, delayed=True)
        for chunk in chunks:
            x = inputs.slice(begin, begin + chunk)
            leaving, ring_mass = sparsek.window_mass_chunk(x.q, x.k, state, **mass, **x.far())
            first = max(0, window_size - begin)
            if first < chunk:
                now = y[:, begin + first - window_size : begin + chunk - window_size]
                torch.testing.assert_close(leaving[:, first:], now, rtol=1e-9, atol=1e-9)
            out, _, state = sparsek.attention_chunk(
                x.q, x.k, x.v, leaving, state, **options, **x.far(), delayed_scores=True
            )
            state = state._replace(ring_mass=ring_mass)
            torch.testing.assert_close(out, whole[:, begin : begin + chunk], rtol=1e-8, atol=1e-8)
            begin += chunk
        for i in range(SEQLEN):
            x = inputs.slice(i, i + 1)
            leaving = sparsek.leaving_mass(token_state, window_size=window_size)
            out = sparsek.decode_step(
                x.q, x.k, x.v, leaving, token_state, **options, **x.far(), delayed_scores=True
            )
            torch.testing.assert_close(out, whole[:, i : i + 1], rtol=1e-8, atol=1e-8)
        assert_same_state(state, token_state, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_the_whole_sequence_in_low_precision(dtype: torch.dtype) -> None:
    options = dict(topk=16, window_size=24, num_sinks=4)
    inputs = random_inputs(seqlen=300, far=True, dtype=dtype)
    whole, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, **inputs.far())
    chunked, _, state = run_chunks(inputs, [7, 93, 1, 199], start(options, True, dtype=dtype), **options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)
    state = start(options, True, dtype=dtype)
    for i in range(300):
        x = inputs.slice(i, i + 1)
        out = sparsek.decode_step(x.q, x.k, x.v, x.scores, state, **options, **x.far())
        torch.testing.assert_close(out, whole[:, i : i + 1], rtol=tolerance, atol=tolerance)


def test_batch_rows_may_have_different_lengths() -> None:
    options = dict(topk=4, window_size=6, num_sinks=3, pool_size=7)
    inputs = random_inputs(seqlen=SEQLEN, far=True)
    whole, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, **inputs.far())
    read = [2, 41]
    states = [run_chunks(inputs, [n], start(options, True), **options)[2] for n in read]
    mixed = AttentionState(*(None if a is None else torch.stack([a[0], b[1]]) for a, b in zip(*states)))

    def next_30(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t[b, n : n + 30] for b, n in enumerate(read)])

    wanted, x = next_30(whole), Inputs(*(next_30(t) for t in inputs.tensors()))
    out, _, after = run_chunks(x, [9, 21], mixed, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-11)
    assert after.lengths.tolist() == [32, 71]
    for i in range(30):
        t = x.slice(i, i + 1)
        out = sparsek.decode_step(t.q, t.k, t.v, t.scores, mixed, **options, **t.far())
        torch.testing.assert_close(out, wanted[:, i : i + 1], rtol=1e-11, atol=1e-11)
    assert_same_state(mixed, after)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_through_the_state_equal_the_whole_sequences(options: dict, gate: str, far: bool) -> None:
    inputs = random_inputs(seqlen=SEQLEN, far=far, requires_grad=True, spread=0.5)
    whole = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, gate=gate, **inputs.far())
    weights = [torch.randn_like(x) for x in whole]
    wanted = torch.autograd.grad(whole, inputs.tensors(), weights)
    for chunks in ([25, 25, 25], CHUNKS["mixed"], CHUNKS["ones"]):
        *chunked, _ = run_chunks(inputs, chunks, start(options, far), **options, gate=gate)
        gradients = torch.autograd.grad(chunked, inputs.tensors(), weights)
        for mine, right in zip(gradients, wanted):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_delayed_scores_have_their_gradient_through_the_state() -> None:
    options = dict(topk=4, window_size=6, num_sinks=3, pool_size=9)
    inputs = random_inputs(seqlen=SEQLEN, requires_grad=True, spread=0.5)
    out, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options)
    weights = torch.randn_like(out)
    wanted = torch.autograd.grad(out, inputs.tensors(), weights)
    state, begin, outs = start(options), 0, []
    padding = torch.full((2, 6, 2), torch.nan, dtype=torch.float64)
    leaving = torch.cat([padding, inputs.scores], 1)  # at query i the score of key i - window_size
    for chunk in CHUNKS["mixed"]:
        x = inputs.slice(begin, begin + chunk)
        scores = leaving[:, begin : begin + chunk]
        out, _, state = sparsek.attention_chunk(x.q, x.k, x.v, scores, state, **options, delayed_scores=True)
        outs.append(out)
        begin += chunk
    for mine, right in zip(torch.autograd.grad(torch.cat(outs, 1), inputs.tensors(), weights), wanted):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_a_detached_state_cuts_the_gradient() -> None:
    options = dict(topk=4, window_size=6, num_sinks=3, pool_size=9)
    inputs = random_inputs(seqlen=SEQLEN, requires_grad=True)
    _, _, state = run_chunks(inputs, [40], start(options), **options)
    assert state.k.requires_grad and state.slot_scores.requires_grad and state.pool_scores.requires_grad
    x = inputs.slice(40, SEQLEN)
    out, _, _ = sparsek.attention_chunk(x.q, x.k, x.v, x.scores, state.detach(), **options)
    (gradient,) = torch.autograd.grad(out.sum(), inputs.k)
    assert (gradient[:, :40] == 0).all() and (gradient[:, 40:] != 0).any()


def test_statistics_stream() -> None:
    raw = torch.randn(2, SEQLEN, 2, dtype=torch.float64, requires_grad=True)
    heads = [torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    whole, last = sparsek.normalise_scores(raw, *heads)
    weights = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, [raw, *heads], weights, retain_graph=True)
    for chunks in CHUNKS.values():
        stats, parts, begin = None, [], 0
        for chunk in chunks:
            part, stats = sparsek.normalise_scores(raw[:, begin : begin + chunk], *heads, stats=stats)
            parts.append(part)
            begin += chunk
        joined = torch.cat(parts, 1)
        torch.testing.assert_close(joined, whole, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(stats, last, rtol=1e-11, atol=1e-11)
        for mine, right in zip(torch.autograd.grad(joined, [raw, *heads], weights), wanted):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)
