"""The operations on a GPU against the CPU's in float64, by row. Skipped, saying why, where there is no GPU."""

import pytest
import torch
from cuda_inputs import (
    DEVICE,
    Case,
    assert_gradients_close,
    assert_rows_close,
    attend,
    gradients,
    make,
    on_gpu,
    tolerances,
    with_grad,
)
from inputs import Inputs

import sparsek
from sparsek import _library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not _library.has_cuda_kernels(), reason="libsparsek_ops_cuda.so is not built"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "plain": Case(),
    "fp16": Case(dtype=FP16),
    "16 heads": Case(num_heads=16, num_kv_heads=16, seqlen=1500),
    "32 heads in groups of 4": Case(num_heads=32, num_kv_heads=8, seqlen=1100, num_sinks=4),
    "group of 3": Case(num_heads=6, num_kv_heads=2, num_sinks=1),
    "head_dim 64": Case(head_dim=64),
    "head_dim 64 fp16 far": Case(head_dim=64, dtype=FP16, far=True, num_sinks=2),
    "sinks": Case(num_sinks=5, pool_size=100),
    "hard gate": Case(gate="hard", num_sinks=2),
    "far rotary": Case(far=True, num_sinks=3),
    "far rotary hard fp16": Case(far=True, gate="hard", dtype=FP16),
    "documents": Case(documents=(0, 1, 2, 100, 130, 629, 700), num_sinks=2),
    "documents far": Case(documents=(0, 37, 300, 700), far=True, num_sinks=2),
    "batch": Case(batch=3, seqlen=333, num_sinks=1),
    "ties": Case(scores="ties"),
    "rising": Case(scores="rising"),
    "flat": Case(scores="flat"),
    "one position": Case(seqlen=1),
    "prime": Case(seqlen=257, topk=7, window_size=11),
    "topk above the sequence": Case(seqlen=200, topk=500, window_size=17),
    "window above the sequence": Case(seqlen=200, topk=5, window_size=300),
    "window of one": Case(seqlen=200, topk=5, window_size=1),
    "scale": Case(extra=dict(softmax_scale=0.05)),
    "deterministic": Case(num_sinks=2, extra=dict(deterministic=True)),
    "deterministic far": Case(far=True, extra=dict(deterministic=True)),
    "topk beyond the Hopper kernels": Case(seqlen=3200, topk=2600, window_size=64, num_heads=2, num_kv_heads=1),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    """out, softmax_lse, and all gradients, of both outputs."""
    case = CASES[name]
    exact, rounded = with_grad(make(case)), None
    rounded = on_gpu(exact, case.dtype, requires_grad=True)
    expected = attend(exact, case.options("cpu"))
    actual = attend(rounded, case.options())
    assert actual[0].dtype == case.dtype and actual[1].dtype == torch.float32
    assert_rows_close("out", actual[0], expected[0], tolerances(case.dtype)["out"])
    torch.testing.assert_close(actual[1].double().cpu(), expected[1], rtol=0, atol=2e-5 * 10)
    weights = (torch.randn_like(expected[0]).to(case.dtype).double(), torch.randn_like(expected[1]))
    assert_gradients_close(
        gradients(actual, rounded, weights), gradients(expected, exact, weights), case.dtype
    )


@pytest.mark.parametrize("name", ["plain", "sinks", "documents", "batch", "ties", "rising", "flat", "one position"])
def test_selection_is_the_cpus(name: str) -> None:
    """The same thresholds, and exactly the same keys and intervals."""
    case = CASES[name]
    scores = make(case).scores.float()
    options = {**case.selection(), "cu_seqlens": case.options("cpu")["cu_seqlens"]}
    on_device = {**options, "cu_seqlens": case.options()["cu_seqlens"]}
    wanted = sparsek.select(scores, **options)
    found = sparsek.select(scores.to(DEVICE), **on_device)
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1].cpu(), wanted[1])
    rows = torch.ops.sparsek._select_rows(scores, **options)
    for group in (0, 4):
        mine = torch.ops.sparsek._select_rows(scores.to(DEVICE), **on_device, far_lists_group=group)
        assert torch.equal(mine[0].cpu(), rows[0])
        torch.testing.assert_close(mine[1].cpu(), rows[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(mine[2].cpu(), rows[2])
        visible = rows[3] < rows[4]
        assert torch.equal((mine[3] < mine[4]).cpu(), visible)
        for at in (3, 4):
            assert torch.equal(mine[at].cpu()[visible], rows[at][visible])


def test_visibility_is_the_cpus() -> None:
    case = CASES["documents"]
    scores, starts = make(case).scores.float(), case.options("cpu")["cu_seqlens"]
    selected = sparsek.select(scores, **case.selection(), cu_seqlens=starts)
    keywords = dict(window_size=case.window_size, num_sinks=case.num_sinks)
    wanted = torch.ops.sparsek._visibility(scores, *selected, **keywords, cu_seqlens=starts)
    found = torch.ops.sparsek._visibility(
        scores.to(DEVICE), *(t.to(DEVICE) for t in selected), **keywords, cu_seqlens=starts.to(DEVICE)
    )
    for mine, right in zip(found, wanted):
        assert torch.equal(mine.cpu(), right)


@pytest.mark.parametrize("name", ["plain", "sinks", "far rotary", "documents"])
def test_a_kept_selection_gives_the_same(name: str) -> None:
    """attention_forward with what select returned: its lists are made from the rows."""
    case = CASES[name]
    x = on_gpu(make(case), case.dtype, requires_grad=True)
    options = case.options()
    starts = options["cu_seqlens"]
    whole = attend(x, options)
    kept = sparsek.select(x.scores.detach(), **case.selection(), cu_seqlens=starts)
    keywords = dict(window_size=case.window_size, num_sinks=case.num_sinks, topk=case.topk, cu_seqlens=starts)
    parts = sparsek.attention_forward(x.q, x.k, x.v, x.scores, *kept, **keywords, **x.far())
    assert_rows_close("out", parts[0], whole[0], 0.004)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-5)
    weights = (torch.randn_like(whole[0]), torch.randn_like(whole[1]))
    right = {name: g.double().cpu() for name, g in gradients(whole, x, weights).items()}
    assert_gradients_close(gradients(parts, x, weights), right, case.dtype)


@pytest.mark.parametrize("deterministic", [False, True])
def test_too_small_a_topk_gives_nan_and_not_less_attention(deterministic: bool) -> None:
    """attention_forward lays out its lists, of 1,024 queries here, by topk: rows beyond that may not be lost in silence."""
    case = Case(seqlen=4000, topk=1500, window_size=16, num_heads=2, num_kv_heads=2, num_sinks=2)
    x = on_gpu(make(case), case.dtype, requires_grad=True)
    kept = sparsek.select(x.scores.detach(), **case.selection())
    keywords = dict(window_size=case.window_size, num_sinks=case.num_sinks, deterministic=deterministic)
    right = sparsek.attention_forward(x.q, x.k, x.v, x.scores, *kept, **keywords, topk=case.topk)
    assert not any(t.isnan().any() for t in right)
    out, lse = sparsek.attention_forward(x.q, x.k, x.v, x.scores, *kept, **keywords, topk=4)
    # Queries below 1,024 see less than their list has room for; every later list has more rows than topk + 1,024.
    assert_rows_close("out", out[:, :1024], right[0][:, :1024], 0.004)
    torch.testing.assert_close(lse[..., :1024], right[1][..., :1024], rtol=1e-5, atol=1e-5)
    assert out[:, 1024:].isnan().all() and lse[..., 1024:].isnan().all()
    for name, gradient in gradients((out, lse), x, (torch.randn_like(out), torch.randn_like(lse))).items():
        assert gradient.isnan().any(), name

    # The backward may be called by itself, with numbers of a call that had room.
    rows = torch.ops.sparsek._visibility(
        x.scores.detach(), *kept, window_size=case.window_size, num_sinks=case.num_sinks
    )
    parts = [t.detach() for t in (x.q, x.k, x.v)]
    common = dict(gate="soft", softmax_scale=0.1, deterministic=deterministic)
    done = torch.ops.sparsek._attention_rows(*parts, None, None, *rows, **common, max_far=case.topk + 2)
    dout = torch.randn_like(done[0])
    dq, dk, dv, _, _, dscores = torch.ops.sparsek.attention_backward(
        dout, None, *parts, None, None, *rows, *done, **common, max_far=6
    )
    assert not dq[:, :1024].isnan().any() and dq[:, 1024:].isnan().all()
    assert all(t.isnan().any() for t in (dk, dv, dscores))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """A view that is contiguous nowhere but in its last dimension, NaN between its rows."""
    base = torch.full([2 * n for n in tensor.shape[:-1]] + [tensor.shape[-1]], torch.nan, dtype=tensor.dtype, device=DEVICE)
    view = base[tuple(slice(1, None, 2) for _ in tensor.shape[:-1])]
    return view.copy_(tensor.detach()).requires_grad_()


@pytest.mark.parametrize("name", ["plain", "far rotary", "batch"])
def test_views(name: str) -> None:
    """Strided views, heads before positions, and slices of one packed projection."""
    case = CASES[name]
    x = on_gpu(make(case), case.dtype, requires_grad=True)
    out, lse = attend(x, case.options())
    weights = (torch.randn_like(out), torch.randn_like(lse))
    right = {name: g.double().cpu() for name, g in gradients((out, lse), x, weights).items()}
    heads_first = lambda t: t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # noqa: E731
    for change in (strided, heads_first):
        views = Inputs(*(None if t is None else change(t) for t in vars(x).values()))
        mine = attend(views, case.options())
        assert torch.equal(mine[0], out) and torch.equal(mine[1], lse)
        assert_gradients_close(gradients(mine, views, weights), right, case.dtype)
    heads = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
    packed = torch.cat([x.q, x.k, x.v], 2).detach()
    q, k, v = packed.split(heads, 2)
    mine = attend(Inputs(q, k, v, x.scores, x.q_far, x.k_far), case.options())
    assert torch.equal(mine[0], out)
    total = torch.autograd.grad(attend(x, case.options())[0].sum(), x.q)[0]  # dout with stride 0
    assert total.isfinite().all()


def test_normalise_scores() -> None:
    raw = torch.randn(2, 900, 3) + 5
    heads = [torch.rand(3) for _ in range(3)]
    stats = torch.tensor([5.0, 0.3, 4.0], dtype=torch.float64).expand(2, 3, 3).contiguous()
    dscores, dstats = torch.randn(2, 900, 3), torch.randn(2, 3, 3, dtype=torch.float64)
    for carried in (None, stats):
        for timestep_norm in (True, False):
            results = []
            for device in ("cpu", DEVICE):
                inputs = [t.to(device).requires_grad_() for t in (raw, *heads)]
                keywords = {} if carried is None else dict(stats=carried.to(device))
                out = sparsek.normalise_scores(*inputs, **keywords, timestep_norm=timestep_norm)
                grads = torch.autograd.grad(out, inputs, [dscores.to(device), dstats.to(device)])
                results.append([t.cpu() for t in (*out, *grads)])
            for mine, right in zip(results[1], results[0]):
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    starts = torch.tensor([0, 1, 300, 900], dtype=torch.int32)
    wanted = sparsek.normalise_scores(raw[:1], *heads, cu_seqlens=starts)[0]
    found = sparsek.normalise_scores(raw[:1].to(DEVICE), *(t.to(DEVICE) for t in heads), cu_seqlens=starts.to(DEVICE))[0]
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_sparsek() -> None:
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(4, 5, 300, dtype=dtype)
        results = []
        for device in ("cpu", DEVICE):
            x = z.to(device).requires_grad_()
            p = sparsek.sparsek(x, 20)
            results.append((p.cpu(), torch.autograd.grad(p.square().sum(), x)[0].cpu()))
        for mine, right in zip(results[1], results[0]):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("name", ["plain", "fp16", "sinks", "far rotary", "documents", "head_dim 64", "batch"])
def test_window_mass(name: str) -> None:
    case = CASES[name]
    x, options = make(case), case.options("cpu")
    keywords = dict(window_size=case.window_size, num_sinks=case.num_sinks)
    wanted = sparsek.window_mass(x.q, x.k, **keywords, **x.far(), cu_seqlens=options["cu_seqlens"])
    y = on_gpu(x, case.dtype)
    found = sparsek.window_mass(y.q, y.k, **keywords, **y.far(), cu_seqlens=case.options()["cu_seqlens"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=0, atol=0.02)


def start(case: Case, device: str, dtype: torch.dtype, delayed: bool = False) -> sparsek.AttentionState:
    sizes = dict(batch=case.batch, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim)
    return sparsek.new_state(
        **sizes, **case.selection(), far_rotary=case.far, delayed_scores=delayed, dtype=dtype, device=device
    )


CHUNKED = {
    "plain": Case(seqlen=500),
    "sinks far": Case(seqlen=500, far=True, num_sinks=3),
    "groups, batch": Case(seqlen=400, batch=2, num_heads=8, num_sinks=2, pool_size=200),
    "head_dim 64 fp16": Case(seqlen=400, head_dim=64, dtype=FP16),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_equal_the_whole_sequence(name: str) -> None:
    """Chunks of several sizes behind a carried state, and the gradients through all of them."""
    case = CHUNKED[name]
    exact = with_grad(make(case))
    options = {**case.selection(), "gate": case.gate}
    expected = attend(exact, options)
    x = on_gpu(exact, case.dtype, requires_grad=True)
    state, outs, lses, begin = start(case, DEVICE, case.dtype), [], [], 0
    for chunk in (130, 1, 64, 105, case.seqlen - 300):
        part = x.slice(begin, begin + chunk)
        out, lse, state = sparsek.attention_chunk(part.q, part.k, part.v, part.scores, state, **options, **part.far())
        outs.append(out), lses.append(lse)
        begin += chunk
    assert state.lengths.tolist() == [case.seqlen] * case.batch
    actual = (torch.cat(outs, 1), torch.cat(lses, 2))
    assert_rows_close("out", actual[0], expected[0], tolerances(case.dtype)["out"])
    torch.testing.assert_close(actual[1].double().cpu(), expected[1], rtol=0, atol=2e-4)
    weights = (torch.randn_like(expected[0]).to(case.dtype).double(), torch.randn_like(expected[1]))
    assert_gradients_close(gradients(actual, x, weights), gradients(expected, exact, weights), case.dtype)


@pytest.mark.parametrize("name", CHUNKED)
def test_single_tokens_equal_the_whole_sequence(name: str) -> None:
    case = CHUNKED[name]
    exact = make(case)
    options = {**case.selection(), "gate": case.gate}
    expected = attend(exact, options)[0]
    x = on_gpu(exact, case.dtype)
    state, first = start(case, DEVICE, case.dtype), case.seqlen - 200
    part = x.slice(0, first)
    with torch.no_grad():
        state = sparsek.attention_chunk(part.q, part.k, part.v, part.scores, state, **options, **part.far())[2]
        outs = []
        for i in range(first, case.seqlen):
            token = x.slice(i, i + 1)
            outs.append(sparsek.decode_step(token.q, token.k, token.v, token.scores, state, **options, **token.far()))
    assert_rows_close("out", torch.cat(outs, 1), expected[:, first:], tolerances(case.dtype)["out"])
    assert state.lengths.tolist() == [case.seqlen] * case.batch


def test_delayed_scores_stream() -> None:
    """window_mass behind a state, in chunks and then token by token, feeds the selection as a whole sequence does."""
    case = Case(seqlen=360, topk=40, window_size=50, num_sinks=2)
    exact = make(case)
    keywords = dict(window_size=case.window_size, num_sinks=case.num_sinks)
    y = sparsek.window_mass(exact.q, exact.k, **keywords)
    x = on_gpu(exact, case.dtype)
    found = sparsek.window_mass(x.q, x.k, **keywords)
    torch.testing.assert_close(found.double().cpu(), y, rtol=0, atol=0.02)
    state, mine, begin = start(case, DEVICE, case.dtype, delayed=True), [], 0
    with torch.no_grad():
        for chunk in (100, 7, 93, 60):
            part = x.slice(begin, begin + chunk)
            leaving, ring_mass = sparsek.window_mass_chunk(part.q, part.k, state, **keywords)
            mine.append(leaving)
            _, _, state = sparsek.attention_chunk(
                part.q, part.k, part.v, leaving, state, **case.selection(), delayed_scores=True
            )
            state = state._replace(ring_mass=ring_mass)
            begin += chunk
        for i in range(begin, case.seqlen):
            token, leaving = x.slice(i, i + 1), sparsek.leaving_mass(state, window_size=case.window_size)
            mine.append(leaving)
            out = sparsek.decode_step(
                token.q, token.k, token.v, leaving, state, **case.selection(), delayed_scores=True
            )
            assert out.isfinite().all()
    left = torch.cat(mine, 1)[:, case.window_size :]
    torch.testing.assert_close(left[:, 2:], found[:, 2 : case.seqlen - case.window_size], rtol=0, atol=1e-3)
