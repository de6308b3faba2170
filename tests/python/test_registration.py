"""What torch expects of an operation: schemas, meta functions, autograd, autocast, compilation."""

from typing import Callable

import pytest
import torch
from inputs import random_inputs

import sparsek

ops = torch.ops.sparsek
OPTIONS = dict(topk=4, window_size=5, num_sinks=2)


def tensors_of_state(state: sparsek.AttentionState) -> list:
    return [
        state.k,
        state.v,
        state.ring_k,
        state.ring_scores,
        state.slot_scores,
        state.slot_positions,
        state.pool_scores,
        state.lengths,
    ]


def filled_state(far: bool, dtype: torch.dtype, tokens: int = 30) -> sparsek.AttentionState:
    inputs = random_inputs(dtype=dtype, far=far, seqlen=tokens)
    state = sparsek.new_state(
        batch=2, num_kv_heads=2, head_dim=16, **OPTIONS, far_rotary=far, delayed_scores=True, dtype=dtype
    )
    with torch.no_grad():
        x = inputs
        return sparsek.attention_chunk(x.q, x.k, x.v, x.scores, state, **OPTIONS, **x.far())[2]


def op_cases() -> dict[str, Callable[[], tuple]]:
    def attention(far: bool, gate: str) -> tuple:
        x = random_inputs(dtype=torch.float32, far=far, requires_grad=True)
        return ops.attention.default, (x.q, x.k, x.v, x.scores), dict(**OPTIONS, gate=gate, **x.far())

    def attention_forward() -> tuple:
        x = random_inputs(dtype=torch.float32, requires_grad=True)
        kept = sparsek.select(x.scores, **OPTIONS)
        keywords = dict(window_size=5, num_sinks=2)
        return ops.attention_forward.default, (x.q, x.k, x.v, x.scores, *kept), keywords

    def rows(far: bool) -> tuple:
        x = random_inputs(dtype=torch.float32, far=far, requires_grad=True)
        kept = sparsek.select(x.scores, **OPTIONS)
        seen = ops._visibility(x.scores, *kept, window_size=5, num_sinks=2)
        row_scores = seen[0].detach().requires_grad_()
        return x, row_scores, seen[1:]

    def attention_rows(far: bool) -> tuple:
        x, row_scores, seen = rows(far)
        arguments = (x.q, x.k, x.v, x.q_far, x.k_far, row_scores, *seen)
        return ops._attention_rows.default, arguments, dict(gate="soft", softmax_scale=0.25, deterministic=False)

    def attention_backward(far: bool) -> tuple:
        op, arguments, keywords = attention_rows(far)
        with torch.no_grad():
            out, lse = op(*arguments, **keywords)
            detached = [None if t is None else t.detach() for t in arguments]
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        return ops.attention_backward.default, (dout, dlse, *detached, out, lse), keywords

    def visibility() -> tuple:
        x = random_inputs(dtype=torch.float32, requires_grad=True)
        kept = sparsek.select(x.scores, **OPTIONS)
        return ops._visibility.default, (x.scores, *kept), dict(window_size=5, num_sinks=2)

    def select_rows() -> tuple:
        x = random_inputs(dtype=torch.float32, requires_grad=True)
        return ops._select_rows.default, (x.scores,), OPTIONS

    def checked_cu_seqlens() -> tuple:
        return ops._checked_cu_seqlens.default, (torch.tensor([0, 3, 20], dtype=torch.int32), 20), {}

    def select() -> tuple:
        x = random_inputs(dtype=torch.float32, requires_grad=True)
        return ops.select.default, (x.scores,), OPTIONS

    def window_mass() -> tuple:
        x = random_inputs(dtype=torch.float32, far=True, requires_grad=True)
        return ops.window_mass.default, (x.q, x.k), dict(window_size=5, num_sinks=2, **x.far())

    def window_mass_chunk(far: bool) -> tuple:
        x = random_inputs(dtype=torch.float32, far=far, seqlen=11)
        s = filled_state(far, torch.float32)
        arguments = (x.q, x.k, s.k, s.ring_k, s.ring_mass, s.lengths)
        return ops.window_mass_chunk.default, arguments, dict(window_size=5, num_sinks=2, **x.far())

    def attention_chunk(far: bool, delayed: bool) -> tuple:
        x = random_inputs(dtype=torch.float32, far=far, seqlen=11, requires_grad=True)
        state = tensors_of_state(filled_state(far, torch.float32))
        arguments = (x.q, x.k, x.v, x.scores, *state)
        return ops.attention_chunk.default, arguments, dict(**OPTIONS, **x.far(), delayed_scores=delayed)

    def new_state(far: bool) -> tuple:
        sizes = dict(batch=2, num_kv_heads=2, head_dim=16, **OPTIONS, far_rotary=far, delayed_scores=far)
        return ops.new_state.default, (), sizes

    def leaving_mass() -> tuple:
        state = filled_state(False, torch.float32)
        return ops.leaving_mass.default, (state.ring_mass, state.lengths), dict(window_size=5)

    def decode_step(far: bool) -> tuple:
        x = random_inputs(dtype=torch.float32, far=far, seqlen=1)
        state = filled_state(far, torch.float32)
        tensors = tensors_of_state(state)
        arguments = (x.q, x.k, x.v, x.scores, *tensors[:4], state.ring_mass, *tensors[4:])
        return ops.decode_step.default, arguments, dict(**OPTIONS, **x.far())

    def select_chunk() -> tuple:
        s = filled_state(False, torch.float32)
        arguments = (torch.randn(2, 11, 2), s.slot_scores, s.slot_positions, s.pool_scores, s.lengths)
        return ops._select_chunk.default, arguments, dict(**OPTIONS, pool_size=1024)

    def chunk_visibility() -> tuple:
        op, arguments, keywords = select_chunk()
        selected = op(*arguments, **keywords)
        return ops._chunk_visibility.default, (arguments[-1], *selected[1:10]), dict(window_size=5, num_sinks=2)

    def window_rows(behind_a_state: bool) -> tuple:
        lengths = filled_state(False, torch.float32).lengths if behind_a_state else None
        arguments = (torch.randn(2, 11, 4, 16), lengths, None)
        return ops._window_rows.default, arguments, dict(window_size=5, num_sinks=2)

    def window_mass_rows() -> tuple:
        op, arguments, keywords = window_rows(False)
        rows = op(*arguments, **keywords)[:3]
        tensors = (arguments[0], torch.randn(2, 11, 2, 16), None, None, *rows, None)
        return ops._window_mass_rows.default, tensors, dict(window_size=5, softmax_scale=0.25)

    def normalise_scores(carried: bool) -> tuple:
        raw = torch.randn(2, 20, 2, requires_grad=True)
        heads = [torch.rand(2, requires_grad=True) for _ in range(3)]
        stats = torch.tensor([5.0, 0.3, 4.0], dtype=torch.float64).expand(2, 2, 3).contiguous().requires_grad_()
        return ops.normalise_scores.default, (raw, *heads), dict(stats=stats if carried else None)

    def normalise_scores_backward() -> tuple:
        raw, heads = torch.randn(2, 20, 2), [torch.rand(2) for _ in range(3)]
        return ops.normalise_scores_backward.default, (torch.randn(2, 20, 2), None, raw, *heads), {}

    return {
        "attention soft": lambda: attention(False, "soft"),
        "attention hard far": lambda: attention(True, "hard"),
        "attention_forward": attention_forward,
        "_attention_rows": lambda: attention_rows(False),
        "_attention_rows far": lambda: attention_rows(True),
        "attention_backward": lambda: attention_backward(False),
        "attention_backward far": lambda: attention_backward(True),
        "_visibility": visibility,
        "select": select,
        "_select_rows": select_rows,
        "_checked_cu_seqlens": checked_cu_seqlens,
        "window_mass": window_mass,
        "window_mass_chunk": lambda: window_mass_chunk(False),
        "window_mass_chunk far": lambda: window_mass_chunk(True),
        "attention_chunk": lambda: attention_chunk(False, False),
        "attention_chunk far delayed": lambda: attention_chunk(True, True),
        "new_state": lambda: new_state(False),
        "new_state far delayed": lambda: new_state(True),
        "leaving_mass": leaving_mass,
        "_select_chunk": select_chunk,
        "_chunk_visibility": chunk_visibility,
        "_window_rows": lambda: window_rows(False),
        "_window_rows behind a state": lambda: window_rows(True),
        "_window_mass_rows": window_mass_rows,
        "decode_step": lambda: decode_step(False),
        "decode_step far": lambda: decode_step(True),
        "normalise_scores": lambda: normalise_scores(False),
        "normalise_scores carried": lambda: normalise_scores(True),
        "normalise_scores_backward": normalise_scores_backward,
        "sparsek": lambda: (ops.sparsek.default, (torch.randn(3, 20, requires_grad=True), 4), {}),
        "sparsek_backward": lambda: (ops.sparsek_backward.default, (torch.randn(3, 20), torch.rand(3, 20)), {}),
    }


@pytest.mark.parametrize("case", op_cases())
def test_opcheck(case: str) -> None:
    op, arguments, keywords = op_cases()[case]()
    torch.library.opcheck(op, arguments, keywords)


# The C++ trainer's, between attention layers: without functions for tensors without data, so not for torch.compile.
# tests/python/test_cuda_layer.py compares them with torch's own.
OF_THE_TRAINER = {"sparsek::_add_rms_norm", "sparsek::_add_rms_norm_backward", "sparsek::_split_rotary", "sparsek::_split_rotary_backward",
                  "sparsek::_swiglu", "sparsek::_swiglu_backward", "sparsek::_cross_entropy_"}


def test_every_operation_has_a_case() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparsek::")}
    checked = {op_cases()[case]()[0].name() for case in op_cases()}
    assert registered == checked | OF_THE_TRAINER and not checked & OF_THE_TRAINER


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    state = filled_state(True, torch.float32)

    def step(x: tuple, state: sparsek.AttentionState) -> torch.Tensor:
        q, k, v, raw, q_far, k_far = x
        ones = torch.ones(2)
        scores, _ = sparsek.normalise_scores(raw, ones, ones, ones)
        far = dict(q_far=q_far, k_far=k_far)
        out, lse = sparsek.attention(q, k, v, scores, **OPTIONS, **far)
        chunk_out, chunk_lse, new = sparsek.attention_chunk(q, k, v, scores, state, **OPTIONS, **far)
        y = sparsek.window_mass(q, k, window_size=5, **far)
        p = sparsek.sparsek(raw.transpose(1, 2), 3)
        return sum(t.sum() for t in (out, lse, chunk_out, chunk_lse, y, p, new.k, new.slot_scores))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (20, 33):
        inputs = random_inputs(dtype=torch.float32, far=True, seqlen=seqlen, requires_grad=True)
        tensors = inputs.tensors()
        eager, traced = step(tensors, state), compiled(tensors, state)
        torch.testing.assert_close(traced, eager)
        for a, b in zip(torch.autograd.grad(traced, tensors), torch.autograd.grad(eager, tensors)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_decode_step_compiles_and_changes_the_state() -> None:
    compiled = torch.compile(
        lambda x, state: sparsek.decode_step(*x, state, **OPTIONS), fullgraph=True, backend="aot_eager"
    )
    states = [filled_state(False, torch.float32)]
    states.append(sparsek.AttentionState(*(None if t is None else t.clone() for t in states[0])))
    for _ in range(3):
        inputs = random_inputs(dtype=torch.float32, seqlen=1).tensors()
        eager = sparsek.decode_step(*inputs, states[0], **OPTIONS)
        torch.testing.assert_close(compiled(inputs, states[1]), eager)
    for a, b in zip(*states):
        assert a is b is None or torch.equal(a, b)
    assert states[1].lengths.tolist() == [33, 33]


def test_autocast_casts_q_k_v_and_leaves_scores() -> None:
    x = random_inputs(dtype=torch.float32, far=True, requires_grad=True)
    half = [t.bfloat16() for t in (x.q, x.k, x.v)]
    half_far = dict(q_far=x.q_far.bfloat16(), k_far=x.k_far.bfloat16())
    wanted = sparsek.attention(*half, x.scores, **OPTIONS, **half_far)
    wanted_y = sparsek.window_mass(*half[:2], window_size=5, **half_far)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS, **x.far())
        y = sparsek.window_mass(x.q, x.k, window_size=5, **x.far())
    assert out[0].dtype == torch.bfloat16 and out[1].dtype == torch.float32 and y.dtype == torch.float32
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1]) and torch.equal(y, wanted_y)
    gradients = torch.autograd.grad(out[0].float().sum(), x.tensors())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)

    state = filled_state(False, torch.bfloat16)
    x = random_inputs(dtype=torch.float32, seqlen=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunk, _, _ = sparsek.attention_chunk(x.q, x.k, x.v, x.scores, state, **OPTIONS)
        step = sparsek.decode_step(x.q, x.k, x.v, x.scores, state, **OPTIONS)
    assert chunk.dtype == step.dtype == torch.bfloat16

    x = random_inputs(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS)
    assert out.dtype == torch.float64


@pytest.mark.parametrize(
    "function",
    [
        lambda x: sparsek.attention(x.q, x.k, x.v, x.scores, **OPTIONS)[0].square().sum(),
        lambda x: sparsek.sparsek(x.scores, 3).square().sum(),
        lambda x: sparsek.normalise_scores(x.scores, *torch.ones(3, 2, dtype=torch.float64))[0].square().sum(),
    ],
    ids=["attention", "sparsek", "normalise_scores"],
)
def test_second_derivatives_are_refused(function: Callable) -> None:
    inputs = random_inputs(requires_grad=True)
    (first,) = torch.autograd.grad(function(inputs), inputs.scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="sparsek has no second derivatives: .*_backward"):
        first.square().sum().backward()


def test_gradients_come_only_where_they_are_defined() -> None:
    x = random_inputs(requires_grad=True)
    assert not any(t.requires_grad for t in sparsek.select(x.scores, **OPTIONS))
    assert not sparsek.window_mass(x.q, x.k, window_size=5).requires_grad
    state = filled_state(False, torch.float64)
    x = random_inputs(seqlen=1, requires_grad=True)
    with pytest.raises(NotImplementedError, match="decode_step .* has no gradient.*attention_chunk"):
        sparsek.decode_step(x.q, x.k, x.v, x.scores, state, **OPTIONS)


def test_decode_step_tells_autograd_that_the_state_changed() -> None:
    state = filled_state(False, torch.float64)
    x = random_inputs(seqlen=4, requires_grad=True)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    saved = (state.k * scale).sum()
    x = random_inputs(seqlen=1)
    sparsek.decode_step(x.q, x.k, x.v, x.scores, state, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_gradcheck() -> None:
    x = random_inputs(batch=1, seqlen=13, num_heads=2, num_kv_heads=1, head_dim=8, far=True, requires_grad=True)
    options = dict(topk=3, window_size=2, num_sinks=1, pool_size=6, softmax_scale=0.25)

    def attention(q, k, v, scores, q_far, k_far):
        return sparsek.attention(q, k, v, scores, **options, q_far=q_far, k_far=k_far)

    assert torch.autograd.gradcheck(attention, x.tensors())
    assert torch.autograd.gradcheck(lambda z: sparsek.sparsek(z, 3), x.scores.detach().transpose(1, 2).requires_grad_())
    heads = [torch.rand(1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    stats = torch.tensor([[[4.0, 0.3, 2.0]]], dtype=torch.float64)

    def normalise(raw, beta, gamma, slope, mean_and_m2):
        carried = torch.cat([stats[..., :1], mean_and_m2], 2)
        scores, new_stats = sparsek.normalise_scores(raw, beta, gamma, slope, stats=carried)
        return scores, new_stats[..., 1:]

    assert torch.autograd.gradcheck(normalise, (x.scores, *heads, stats[..., 1:].clone().requires_grad_()))
