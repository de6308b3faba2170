"""Every wrong input is refused with a message that states what was wanted and what was given, and changes nothing."""

import re
from typing import Callable

import pytest
import torch
from inputs import Inputs, random_inputs

import sparsek

OPTIONS = dict(topk=4, window_size=5, num_sinks=2)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# name: (change of the inputs and keywords, error, message)
ATTENTION_CASES: dict[str, tuple[Callable, type, str]] = {
    "q ndim": (lambda x, o: setattr(x, "q", x.q[0]), ValueError, "q must be [batch, seqlen, num_heads, head_dim] (4 "),
    "scores ndim": (
        lambda x, o: setattr(x, "scores", x.scores[0]),
        ValueError,
        "scores must be [batch, seqlen, num_kv_heads] (3 dimensions), got [20, 2]",
    ),
    "q dtype": (lambda x, o: setattr(x, "q", x.q.half()), TypeError, "q must be Float, BFloat16 or Double, got Half"),
    "v dtype": (
        lambda x, o: setattr(x, "v", x.v.double()),
        TypeError,
        "v must be Float like q, got Double",
    ),
    "scores dtype": (
        lambda x, o: setattr(x, "scores", x.scores.bfloat16()),
        TypeError,
        "scores must be Float (scores are never half precision: use scores.float()), got BFloat16",
    ),
    "device": (lambda x, o: setattr(x, "k", x.k.to("meta")), ValueError, "k must be on cpu like q, got meta"),
    "k shape": (
        lambda x, o: setattr(x, "k", x.k[:, :19]),
        ValueError,
        "k must be [batch, seqlen, num_kv_heads, head_dim] = [2, 20, 2, 16], got [2, 19, 2, 16]",
    ),
    "v shape": (
        lambda x, o: setattr(x, "v", x.v[..., :8]),
        ValueError,
        "v must be [batch, seqlen, num_kv_heads, head_dim] = [2, 20, 2, 16], got [2, 20, 2, 8]",
    ),
    "scores shape": (
        lambda x, o: setattr(x, "scores", x.scores[:, :, :1]),
        ValueError,
        "scores must be [batch, seqlen, num_kv_heads] = [2, 20, 2], got [2, 20, 1]",
    ),
    "inner stride": (
        lambda x, o: setattr(x, "v", x.v.transpose(1, 3).contiguous().transpose(1, 3)),
        ValueError,
        "v must have a contiguous last dimension (stride 1), got strides",
    ),
    "no batch": (
        lambda x, o: x.__init__(*(t[:0] for t in x.tensors())),
        ValueError,
        "q must have at least one batch row and one position, got [0, 20, 4, 16]",
    ),
    "no positions": (
        lambda x, o: x.__init__(*(t[:, :0] for t in x.tensors())),
        ValueError,
        "q must have at least one batch row and one position, got [2, 0, 4, 16]",
    ),
    "heads": (
        lambda x, o: setattr(x, "q", x.q[:, :, :3]),
        ValueError,
        "num_heads must be a multiple of num_kv_heads, got 3 and 2",
    ),
    "head_dim": (
        lambda x, o: x.__init__(*(t[..., :12] for t in (x.q, x.k, x.v)), x.scores),
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got 12",
    ),
    "only q_far": (
        lambda x, o: setattr(x, "q_far", x.q),
        ValueError,
        "q_far and k_far must be given together, got only q_far",
    ),
    "k_far shape": (
        lambda x, o: (setattr(x, "q_far", x.q), setattr(x, "k_far", x.k[:, 1:])),
        ValueError,
        "k_far must be [batch, seqlen, num_kv_heads, head_dim] = [2, 20, 2, 16], got [2, 19, 2, 16]",
    ),
    "topk": (lambda x, o: o.update(topk=0), ValueError, "topk must be between 1 and 2^28, got 0"),
    "window": (lambda x, o: o.update(window_size=0), ValueError, "window_size must be between 1 and 2^30, got 0"),
    "sinks": (lambda x, o: o.update(num_sinks=-1), ValueError, "num_sinks must be between 0 and 2^30, got -1"),
    "pool": (
        lambda x, o: o.update(pool_size=4),
        ValueError,
        "pool_size must be 0 (no limit) or more than topk = 4, got 4",
    ),
    "gate": (lambda x, o: o.update(gate="sigmoid"), ValueError, 'gate must be "soft" or "hard", got "sigmoid"'),
    "scale": (
        lambda x, o: o.update(softmax_scale=float("inf")),
        ValueError,
        "softmax_scale must be finite, got inf",
    ),
    "cu_seqlens batch": (
        lambda x, o: o.update(cu_seqlens=int32(0, 20)),
        ValueError,
        "q must have batch 1 with cu_seqlens, got [2, 20, 4, 16]",
    ),
    "cu_seqlens dtype": (
        lambda x, o: o.update(cu_seqlens=torch.tensor([0, 20])),
        TypeError,
        "cu_seqlens must be Int, got Long",
    ),
    "cu_seqlens ndim": (
        lambda x, o: o.update(cu_seqlens=int32(0, 20)[None]),
        ValueError,
        "cu_seqlens must be [num_documents + 1] (1 dimensions), got [1, 2]",
    ),
    "scores nan": (
        lambda x, o: x.scores[1, 3, 0].fill_(torch.nan),
        RuntimeError,
        "scores must be finite, got nan at batch row 1, position 3, head 0",
    ),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case: str) -> None:
    change, error, message = ATTENTION_CASES[case]
    inputs, options = random_inputs(dtype=torch.float32, seqlen=20), dict(OPTIONS)
    change(inputs, options)
    with pytest.raises(error, match=re.escape(message)):
        sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, **inputs.far())


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (int32(1, 20), "cu_seqlens must start at 0, got 1"),
        (int32(0, 19), "cu_seqlens must end at seqlen = 20, got 19"),
        (int32(0, 12, 12, 20), "cu_seqlens must increase, got 12 then 12 at index 2"),
        (int32(0), "cu_seqlens must be [num_documents + 1] with at least one document, got [1]"),
    ],
)
def test_cu_seqlens(cu_seqlens: torch.Tensor, message: str) -> None:
    x = random_inputs(batch=1, seqlen=20, dtype=torch.float32)
    ones = torch.ones(2)
    for call in (
        lambda: sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS, cu_seqlens=cu_seqlens),
        lambda: sparsek.select(x.scores, **OPTIONS, cu_seqlens=cu_seqlens),
        lambda: sparsek.window_mass(x.q, x.k, window_size=5, cu_seqlens=cu_seqlens),
        lambda: sparsek.normalise_scores(x.scores, ones, ones, ones, cu_seqlens=cu_seqlens),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_selection_given_to_attention_forward() -> None:
    x = random_inputs(dtype=torch.float32, seqlen=20)
    tau, expiry, frac_begin, frac_end = sparsek.select(x.scores, **OPTIONS)
    keywords = dict(window_size=5, num_sinks=2)
    message = re.escape("tau must be [batch, seqlen, num_kv_heads] = [2, 20, 2], got [2, 19, 2]")
    with pytest.raises(ValueError, match=message):
        sparsek.attention_forward(x.q, x.k, x.v, x.scores, tau[:, 1:], expiry, frac_begin, frac_end, **keywords)
    message = re.escape("frac_end must be [batch, seqlen, num_kv_heads] = [2, 20, 2], got [2, 21, 2]")
    longer = torch.cat([frac_end, frac_end[:, :1]], 1)
    with pytest.raises(ValueError, match=message):
        sparsek.attention_forward(x.q, x.k, x.v, x.scores, tau, expiry, frac_begin, longer, **keywords)
    with pytest.raises(TypeError, match="expiry must be Int, got Long"):
        sparsek.attention_forward(x.q, x.k, x.v, x.scores, tau, expiry.long(), frac_begin, frac_end, **keywords)


def test_fractions_outside_the_sequence() -> None:
    """attention_forward cuts them; attention_backward, which takes rows as they are, refuses them."""
    x = random_inputs(dtype=torch.float32, seqlen=20, requires_grad=True)
    tau, expiry, frac_begin, frac_end = sparsek.select(x.scores.detach(), **OPTIONS)
    wild = frac_end.new_full(frac_end.shape, 2**30)
    keywords = dict(window_size=5, num_sinks=2)
    out, lse = sparsek.attention_forward(x.q, x.k, x.v, x.scores, tau, expiry, -wild, wild, **keywords)
    out.sum().backward()
    assert torch.isfinite(x.scores.grad).all()

    for begin, end in ((0, 21), (-1, 3), (0, 2**30)):
        begins, ends = (torch.full((2, 2, 20), at, dtype=torch.int32) for at in (begin, end))
        message = f"frac_begin and frac_end must lie between 0 and seqlen_q = 20, got [{begin}, {end})"
        with pytest.raises(ValueError, match=re.escape(message)):
            backward_of_rows(frac_begin=begins, frac_end=ends)


def backward_of_rows(**changes: torch.Tensor) -> None:
    """attention_backward on the rows of a whole sequence of 20 positions, with some of them replaced."""
    x = random_inputs(dtype=torch.float32, seqlen=20)
    selection = sparsek.select(x.scores, **OPTIONS)
    keywords = dict(window_size=5, num_sinks=2)
    rows = torch.ops.sparsek._visibility(x.scores, *selection, **keywords)
    out, lse = sparsek.attention_forward(x.q, x.k, x.v, x.scores, *selection, **keywords)
    names = ("row_scores", "tau", "window_begin", "far_begin", "far_end", "frac_begin", "frac_end")
    arguments = dict(zip(names, rows)) | changes
    torch.ops.sparsek.attention_backward(
        *(torch.ones_like(out), None, x.q, x.k, x.v, None, None, *arguments.values(), out, lse),
        gate="soft",
        softmax_scale=0.25,
        deterministic=False,
    )


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("window_begin", 7, 8, "between 2 and 7 at batch row 1, query 7, got 8"),
        ("window_begin", 7, 1, "between 2 and 7 at batch row 1, query 7, got 1"),
        ("window_begin", 0, -1, "between 0 and 0 at batch row 1, query 0, got -1"),
        ("window_begin", 19, 2**31 - 1, "between 14 and 19 at batch row 1, query 19, got 2147483647"),
        ("far_begin", 6, 9, "far_begin must not decrease with the row, got 10 then 9 at batch row 1, row 6"),
        ("far_begin", 0, 4, "far_begin must be at least 5, the first query whose window the row has left, got 4"),
    ],
)
def test_rows_that_no_selection_made(name: str, index: int, value: int, message: str) -> None:
    positions = torch.arange(20, dtype=torch.int32)
    rows = {"window_begin": (positions - 4).clamp_min(0).repeat(2, 1), "far_begin": (positions + 5).repeat(2, 2, 1)}
    backward_of_rows(**rows)
    rows[name][1, ..., index] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        backward_of_rows(**rows)


def test_sparsek() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sparsek.sparsek(torch.randn(5), 0)
    with pytest.raises(TypeError, match="z must be Float or Double, got Half"):
        sparsek.sparsek(torch.randn(5).half(), 1)
    with pytest.raises(ValueError, match="got a scalar"):
        sparsek.sparsek(torch.tensor(1.0), 1)
    with pytest.raises(RuntimeError, match="finite"):
        sparsek.sparsek(torch.tensor([1.0, torch.nan, 2.0]), 1)
    assert sparsek.sparsek(torch.empty(0, 5), 1).shape == (0, 5)


def test_normalise_scores() -> None:
    raw, ones = torch.randn(2, 9, 3), torch.ones(3)
    with pytest.raises(ValueError, match=re.escape("gamma must be [num_kv_heads] = [3], got [2]")):
        sparsek.normalise_scores(raw, ones, ones[:2], ones)
    with pytest.raises(TypeError, match="slope must be Float, got Double"):
        sparsek.normalise_scores(raw, ones, ones, ones.double())
    with pytest.raises(TypeError, match="stats must be Double, got Float"):
        sparsek.normalise_scores(raw, ones, ones, ones, stats=torch.zeros(2, 3, 3))
    with pytest.raises(TypeError, match="raw must be Float or Double, got BFloat16"):
        sparsek.normalise_scores(raw.bfloat16(), ones, ones, ones)
    with pytest.raises(RuntimeError, match="raw scores must be finite, got inf"):
        sparsek.normalise_scores(raw.index_fill(1, torch.tensor([4]), torch.inf), ones, ones, ones)


def state(**changes) -> sparsek.AttentionState:
    sizes = dict(batch=2, num_kv_heads=2, head_dim=16, **OPTIONS, dtype=torch.float32) | changes
    return sparsek.new_state(**sizes)


STATE_CASES: dict[str, tuple[Callable[[], sparsek.AttentionState], type, str]] = {
    "batch": (
        lambda: state(batch=1),
        ValueError,
        "state_k must be [batch, num_kv_heads, num_sinks + window_size + topk, head_dim] = [2, 2, 11, 16], "
        "got [1, 2, 11, 16]",
    ),
    "topk": (lambda: state(topk=5), ValueError, "= [2, 2, 11, 16], got [2, 2, 12, 16]"),
    "dtype": (lambda: state(dtype=torch.bfloat16), TypeError, "state_k must be Float, got BFloat16"),
    "far rotary": (
        lambda: state(far_rotary=True),
        ValueError,
        "ring_k must be given exactly with q_far and k_far, got one",
    ),
    "pool": (
        lambda: state(pool_size=64),
        ValueError,
        "pool_scores must be [batch, num_kv_heads, pool_size] = [2, 2, 1024], got [2, 2, 64]",
    ),
    "lengths": (lambda: state()._replace(lengths=torch.zeros(2)), TypeError, "lengths must be Long, got Float"),
    "negative length": (
        lambda: state()._replace(lengths=torch.tensor([0, -1])),
        ValueError,
        "lengths must not be negative, got -1 in batch row 1",
    ),
    "enormous length": (
        lambda: state()._replace(lengths=torch.tensor([2**63 - 1, 0])),
        ValueError,
        "lengths must be at most 2^60, got 9223372036854775807 in batch row 0",
    ),
    "slot positions": (
        lambda: state()._replace(slot_positions=torch.zeros(2, 2, 4)),
        TypeError,
        "slot_positions must be Long, got Float",
    ),
}


@pytest.mark.parametrize("case", STATE_CASES)
@pytest.mark.parametrize("seqlen", [1, 3])
def test_state(case: str, seqlen: int) -> None:
    make, error, message = STATE_CASES[case]
    x = random_inputs(dtype=torch.float32, seqlen=seqlen)
    calls = [sparsek.attention_chunk] + ([sparsek.decode_step] if seqlen == 1 else [])
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call(x.q, x.k, x.v, x.scores, make(), **OPTIONS)


def unchanged(call: Callable[[sparsek.AttentionState], object], before: sparsek.AttentionState) -> bool:
    copy = sparsek.AttentionState(*(None if t is None else t.clone() for t in before))
    with pytest.raises((ValueError, RuntimeError)):
        call(copy)
    same = lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num())  # noqa: E731
    return all(a is b is None or same(a, b) for a, b in zip(copy, before))


def test_decode_step() -> None:
    x = random_inputs(dtype=torch.float32, seqlen=2)
    with pytest.raises(ValueError, match=re.escape("one token per batch row, got [2, 2, 4, 16]")):
        sparsek.decode_step(x.q, x.k, x.v, x.scores, state(), **OPTIONS)
    x = x.slice(0, 1)
    with pytest.raises(ValueError, match=re.escape("decode_step needs a pool_size larger than topk = 4")):
        sparsek.decode_step(x.q, x.k, x.v, x.scores, state(pool_size=0), **OPTIONS, pool_size=0)
    strided = state()._replace(ring_scores=torch.zeros(2, 5, 2).transpose(1, 2))
    with pytest.raises(ValueError, match="ring_scores must be contiguous, got strides"):
        sparsek.decode_step(x.q, x.k, x.v, x.scores, strided, **OPTIONS)
    x.scores[1, 0, 1] = torch.nan
    with pytest.raises(RuntimeError, match="scores must be finite, got nan at batch row 1, position 0, head 1"):
        sparsek.decode_step(x.q, x.k, x.v, x.scores, state(), **OPTIONS)
    assert unchanged(lambda s: sparsek.decode_step(x.q, x.k, x.v, x.scores, s, **OPTIONS), state())


def changed(tensor: torch.Tensor, index: int, value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[0, 0, index] = value
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_does_not_fit_its_lengths(dtype: torch.dtype) -> None:
    """Set back to be used again, or taken from elsewhere: refused, nothing written."""
    x = random_inputs(dtype=dtype, seqlen=40)
    first, last = x.slice(0, 30), x.slice(30, 31)
    filled = sparsek.attention_chunk(first.q, first.k, first.v, first.scores, state(dtype=dtype), **OPTIONS)[2]
    length = torch.full_like(filled.lengths, 30)
    cases = [
        (filled._replace(lengths=length * 0), "a state of 0 tokens must hold 0 selected keys, found 4 in batch row 0"),
        (state(dtype=dtype)._replace(lengths=length), "a state of 30 tokens must hold 4 selected keys, found 0"),
        (filled._replace(lengths=length + 5), "a state of 35 tokens must hold 28 pool scores, found 23 in batch row 0"),
        (filled._replace(pool_scores=changed(filled.pool_scores, 3, torch.nan)), "pool_scores must be finite .* descend"),
        (filled._replace(pool_scores=changed(filled.pool_scores, 3, 99.0)), "pool_scores must be finite .* and descend"),
        (filled._replace(slot_scores=changed(filled.slot_scores, 1, torch.nan)), "slot_scores must be finite"),
    ]
    for wrong, message in cases:
        for call in (sparsek.attention_chunk, sparsek.decode_step):
            step = lambda s: call(last.q, last.k, last.v, last.scores, s, **OPTIONS)  # noqa: B023, E731
            with pytest.raises(RuntimeError, match=message):
                step(wrong)
            assert unchanged(step, wrong)
    other = filled._replace(slot_scores=changed(filled.slot_scores, 1, -99.0))
    with pytest.raises(RuntimeError, match="slot_scores must be the highest pool_scores"):
        sparsek.attention_chunk(last.q, last.k, last.v, last.scores, other, **OPTIONS)


def test_scores_that_are_not_finite_are_refused_once_they_compete() -> None:
    x = random_inputs(dtype=torch.float32, seqlen=30)
    x.scores[0, 9, 1] = torch.inf
    with pytest.raises(RuntimeError, match="must be finite, got inf"):
        sparsek.attention_chunk(x.q, x.k, x.v, x.scores, state(), **OPTIONS)


def test_new_state_and_leaving_mass() -> None:
    with pytest.raises(ValueError, match="topk must be between 1 and 2\\^28, got 0"):
        state(topk=0)
    with pytest.raises(ValueError, match="a head_dim that is a multiple of 8 up to 256, got 2, 2, 12"):
        state(head_dim=12)
    carried = state(delayed_scores=True)
    with pytest.raises(ValueError, match=re.escape("ring_mass must be [batch, num_kv_heads, window_size] = [2, 2, 6]")):
        sparsek.leaving_mass(carried, window_size=6)
    with pytest.raises(TypeError, match="lengths must be Long, got Float"):
        sparsek.leaving_mass(carried._replace(lengths=torch.zeros(2)), window_size=5)


def test_window_mass_needs_its_state() -> None:
    x = random_inputs(dtype=torch.float32, seqlen=3)
    with pytest.raises(ValueError, match="the state has no ring_mass"):
        sparsek.window_mass_chunk(x.q, x.k, state(), window_size=5, num_sinks=2)
    with pytest.raises(ValueError, match="the state has no ring_mass"):
        sparsek.leaving_mass(state(), window_size=5)
    with pytest.raises(ValueError, match=re.escape("ring_mass must be [batch, num_kv_heads, window_size] = [2, 2, 6]")):
        sparsek.window_mass_chunk(x.q, x.k, state(delayed_scores=True), window_size=6, num_sinks=2)
    negative = state(delayed_scores=True)._replace(lengths=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="lengths must not be negative, got -1 in batch row 1"):
        sparsek.window_mass_chunk(x.q, x.k, negative, window_size=5, num_sinks=2)
