"""What torch expects of the CUDA operations: graphs, streams, compilation, autocast, determinism, bad inputs."""

import re
from typing import Callable

import pytest
import torch
from cuda_inputs import DEVICE, Case, assert_rows_close, attend, gradients, make, on_gpu
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

ops = torch.ops.sparsek
BF16 = torch.bfloat16


def step(x: Inputs, options: dict, dout: torch.Tensor) -> list[torch.Tensor]:
    out, lse = attend(x, options)
    return [out, lse, *torch.autograd.grad((out.float() * dout).sum() + lse.sum(), x.tensors())]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_cuda_graph(far: bool, documents: bool) -> None:
    """Forward and backward are captured, and replayed on other values; documents too are read at replay."""
    case = Case(seqlen=600, far=far, num_sinks=2, documents=(0, 50, 600) if documents else ())
    x, options = on_gpu(make(case), case.dtype, requires_grad=True), case.options()
    dout = torch.randn(x.q.shape, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):  # what is made once, before the capture
            step(x, options, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, options, dout)
    other = on_gpu(make(case), case.dtype)
    with torch.no_grad():
        for mine, theirs in zip(x.tensors(), other.tensors()):
            mine.copy_(theirs)
        if documents:
            options["cu_seqlens"].copy_(torch.tensor([0, 321, 600]))
    graph.replay()
    replayed = [t.clone() for t in captured]
    eager = step(x, options, dout)
    assert torch.equal(replayed[0], eager[0]) and torch.equal(replayed[1], eager[1])
    for name, mine, right in zip("qkvstu", replayed[2:], eager[2:]):
        assert_rows_close(name, mine, right, 0.01)


def test_decode_in_a_cuda_graph() -> None:
    case = Case(seqlen=300, topk=40, window_size=50, num_sinks=2)
    x, options = on_gpu(make(case), case.dtype), {**case.selection()}
    sizes = dict(batch=1, num_kv_heads=2, head_dim=128, **options, dtype=BF16, device=DEVICE)
    with torch.no_grad():
        part = x.slice(0, 200)
        begin = sparsek.attention_chunk(part.q, part.k, part.v, part.scores, sparsek.new_state(**sizes), **options)[2]
        copy = lambda: sparsek.AttentionState(*(None if t is None else t.clone() for t in begin))  # noqa: E731
        eager, state, warm = copy(), copy(), copy()
        token = Inputs(*(None if t is None else t.clone() for t in vars(x.slice(200, 201)).values()))
        call = lambda s: sparsek.decode_step(token.q, token.k, token.v, token.scores, s, **options)  # noqa: E731
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(warm)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(state)
        for i in range(200, 300):
            for mine, new in zip(token.tensors(), x.slice(i, i + 1).tensors()):
                mine.copy_(new)
            graph.replay()
            assert torch.equal(out, call(eager)), i
        for mine, right in zip(state, eager):
            assert mine is right is None or torch.equal(mine, right)


def test_streams() -> None:
    """The work goes to the current stream: it waits for what stands before it there, and for nothing else."""
    case = Case(seqlen=900)
    source = on_gpu(make(case), case.dtype)
    right = attend(source, case.options())[0]
    stream = torch.cuda.Stream()
    poisoned = Inputs(*(None if t is None else torch.full_like(t, torch.nan) for t in vars(source).values()))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for mine, theirs in zip(poisoned.tensors(), source.tensors()):
            mine.copy_(theirs)
        out = attend(poisoned, case.options())[0]
    stream.synchronize()
    assert torch.equal(out, right)


def cases() -> dict[str, Callable[[], tuple]]:
    options = dict(topk=20, window_size=30, num_sinks=2)

    def tensors(far: bool = False, seqlen: int = 150, requires_grad: bool = True) -> Inputs:
        return on_gpu(make(Case(seqlen=seqlen, batch=2, far=far)), BF16, requires_grad)

    def attention(far: bool) -> tuple:
        x = tensors(far)
        return ops.attention.default, (x.q, x.k, x.v, x.scores), dict(**options, **x.far())

    def select_rows(group: int) -> tuple:
        return ops._select_rows.default, (tensors().scores,), dict(**options, far_lists_group=group)

    def attention_rows(far: bool, lists: bool) -> tuple:
        x = tensors(far)
        *seen, far_lists = ops._select_rows(x.scores.detach(), **options, far_lists_group=2 if lists else 0)
        arguments = (x.q, x.k, x.v, x.q_far, x.k_far, seen[0].requires_grad_(), *seen[1:])
        keywords = dict(gate="soft", softmax_scale=0.1, deterministic=False, max_far=22, far_lists=far_lists)
        return ops._attention_rows.default, arguments, keywords

    def backward(far: bool) -> tuple:
        op, arguments, keywords = attention_rows(far, True)
        with torch.no_grad():
            out, lse = op(*arguments, **keywords)
        detached = [None if t is None else t.detach() for t in arguments]
        return ops.attention_backward.default, (torch.randn_like(out), None, *detached, out, lse), keywords

    def attention_chunk() -> tuple:
        x = tensors(seqlen=40)
        state = sparsek.new_state(batch=2, num_kv_heads=2, head_dim=128, **options, dtype=BF16, device=DEVICE)
        with torch.no_grad():
            y = tensors(seqlen=100, requires_grad=False)
            state = sparsek.attention_chunk(y.q, y.k, y.v, y.scores, state, **options)[2]
        s = (state.k, state.v, None, state.ring_scores, state.slot_scores, state.slot_positions, state.pool_scores)
        return ops.attention_chunk.default, (x.q, x.k, x.v, x.scores, *s, state.lengths), options

    def normalise_scores() -> tuple:
        raw = torch.randn(2, 50, 2, device=DEVICE, requires_grad=True)
        heads = [torch.rand(2, device=DEVICE, requires_grad=True) for _ in range(3)]
        return ops.normalise_scores.default, (raw, *heads), {}

    return {
        "attention": lambda: attention(False),
        "attention far": lambda: attention(True),
        "_select_rows": lambda: select_rows(0),
        "_select_rows with lists": lambda: select_rows(2),
        "_attention_rows": lambda: attention_rows(False, True),
        "_attention_rows far, own lists": lambda: attention_rows(True, False),
        "attention_backward": lambda: backward(False),
        "attention_backward far": lambda: backward(True),
        "attention_chunk": attention_chunk,
        "normalise_scores": normalise_scores,
    }


@pytest.mark.parametrize("case", cases())
def test_opcheck(case: str) -> None:
    op, arguments, keywords = cases()[case]()
    # far_lists is memory that only kernels read, part of it unwritten: no two are equal.
    but_values = ("test_schema", "test_autograd_registration", "test_faketensor")
    chosen = dict(test_utils=but_values) if "with lists" in case else {}
    torch.library.opcheck(op, arguments, keywords, **chosen)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    case = Case(seqlen=300, num_sinks=2)
    options = case.options()

    def loss(q, k, v, scores):
        out, lse = sparsek.attention(q * 1.5, k, v, torch.tanh(scores) * 2, **options)
        return out.float().square().sum(-1).mean() + lse.mean()

    x = on_gpu(make(case), case.dtype, requires_grad=True)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    expected, actual = loss(*x.tensors()), compiled(*x.tensors())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for name, mine, right in zip(
        "qkvs", torch.autograd.grad(actual, x.tensors()), torch.autograd.grad(expected, x.tensors())
    ):
        assert_rows_close(name, mine, right, 0.02)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic(far: bool, head_dim: int) -> None:
    """20 times the same bits, asked for by argument or for all of torch."""
    case = Case(seqlen=2500, head_dim=head_dim, far=far, num_sinks=2, topk=200, extra=dict(deterministic=True))
    x = on_gpu(make(case), case.dtype, requires_grad=True)
    dout = torch.randn(x.q.shape, device=DEVICE)
    first = step(x, case.options(), dout)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, step(x, case.options(), dout)))
    torch.use_deterministic_algorithms(True)
    try:
        again = step(x, {**case.options(), "deterministic": False}, dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    case = Case(seqlen=300, dtype=dtype, far=True)
    x = on_gpu(make(case), torch.float32, requires_grad=True)
    half = on_gpu(make(case), dtype)
    wanted = attend(Inputs(*(None if t is None else (t if t is x.scores else t.to(dtype)) for t in vars(x).values())), case.options())
    with torch.autocast("cuda", dtype=dtype):
        out, lse = attend(x, case.options())
        y = sparsek.window_mass(x.q, x.k, window_size=5)
    assert out.dtype == half.q.dtype and lse.dtype == y.dtype == torch.float32
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), x.tensors())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_scores_that_are_not_finite_poison_their_head_from_there_on() -> None:
    case = Case(seqlen=600, num_heads=4, num_kv_heads=2)
    x = on_gpu(make(case), case.dtype, requires_grad=True)
    clean = attend(x, case.options())[0]
    with torch.no_grad():
        x.scores[0, 200, 1] = torch.nan
    out, lse = attend(x, case.options())
    assert torch.equal(out[:, :, :2], clean[:, :, :2])
    assert out[0, 400:, 2:].isnan().all() and lse[0, 2:, 400:].isnan().all()
    grads = torch.autograd.grad(out[:, :, :2].float().sum(), x.tensors())
    assert all(g.shape == t.shape for g, t in zip(grads, x.tensors()))


def test_documents_from_the_cpu() -> None:
    """Checked and copied; from the GPU they are clamped, whatever they hold."""
    case = Case(seqlen=400, num_sinks=2)
    x, options = on_gpu(make(case), case.dtype), case.options()
    starts = torch.tensor([0, 150, 400], dtype=torch.int32)
    here, there = (attend(x, {**options, "cu_seqlens": t})[0] for t in (starts, starts.to(DEVICE)))
    assert torch.equal(here, there)
    assert torch.equal(
        sparsek.select(x.scores, **case.selection(), cu_seqlens=starts)[1],
        sparsek.select(x.scores, **case.selection(), cu_seqlens=starts.to(DEVICE))[1],
    )
    for wrong, message in (
        ([1, 400], "cu_seqlens must start at 0, got 1"),
        ([0, 399], "cu_seqlens must end at seqlen = 400, got 399"),
        ([0, 30, 30, 400], "cu_seqlens must increase, got 30 then 30 at index 2"),
    ):
        tensor = torch.tensor(wrong, dtype=torch.int32)
        for call in (
            lambda t: attend(x, {**options, "cu_seqlens": t}),
            lambda t: sparsek.select(x.scores, **case.selection(), cu_seqlens=t),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call(tensor)
    for hostile in ([-5, 10, 10**9], [7, 3, 1], [0, -(2**31), 2**31 - 1]):
        out, _ = attend(x, {**options, "cu_seqlens": torch.tensor(hostile, dtype=torch.int32, device=DEVICE)})
        torch.cuda.synchronize()
        assert out.shape == x.q.shape


BAD: dict[str, tuple[Callable, type, str]] = {
    "float32": (
        lambda x, o: x.__init__(*(t.float() for t in x.tensors())),
        TypeError,
        "q must be BFloat16 or Half on a GPU, got Float",
    ),
    "float64": (
        lambda x, o: x.__init__(*(t.double() for t in x.tensors())),
        TypeError,
        "q must be BFloat16 or Half on a GPU, got Double",
    ),
    "mixed dtypes": (lambda x, o: setattr(x, "v", x.v.half()), TypeError, "v must be BFloat16 like q, got Half"),
    "scores dtype": (
        lambda x, o: setattr(x, "scores", x.scores.bfloat16()),
        TypeError,
        "scores must be Float (scores are never half precision: use scores.float()), got BFloat16",
    ),
    "devices": (lambda x, o: setattr(x, "k", x.k.cpu()), ValueError, "k must be on cuda:0 like q, got cpu"),
    "scores device": (
        lambda x, o: setattr(x, "scores", x.scores.cpu()),
        ValueError,
        "scores must be on cuda:0 like q, got cpu",
    ),
    "shape": (
        lambda x, o: setattr(x, "v", x.v[:, 1:]),
        ValueError,
        "v must be [batch, seqlen, num_kv_heads, head_dim] = [1, 100, 2, 128], got [1, 99, 2, 128]",
    ),
    "head_dim": (
        lambda x, o: x.__init__(*(t[..., :96].contiguous() for t in (x.q, x.k, x.v)), x.scores),
        ValueError,
        "head_dim must be 64 or 128 on a GPU, got 96",
    ),
    "group": (
        lambda x, o: x.__init__(x.q.repeat(1, 1, 33, 1), x.k[:, :, :1], x.v[:, :, :1], x.scores[:, :, :1].contiguous()),
        ValueError,
        "num_heads must be at most 64 times num_kv_heads on a GPU, got 132 and 1",
    ),
    "inner stride": (
        lambda x, o: setattr(x, "k", x.k.transpose(1, 3).contiguous().transpose(1, 3)),
        ValueError,
        "k must have a contiguous last dimension (stride 1), got strides",
    ),
    "alignment": (
        lambda x, o: setattr(x, "v", torch.zeros(1, 100, 2, 132, dtype=BF16, device=DEVICE)[..., 4:]),
        ValueError,
        "v must have rows that lie at multiples of 16 bytes",
    ),
    "expanded": (
        lambda x, o: setattr(x, "v", x.v[:, :, :1].expand(-1, -1, 2, -1)),
        ValueError,
        "v must have rows that lie at multiples of 16 bytes, none of them twice",
    ),
    "topk": (lambda x, o: o.update(topk=0), ValueError, "topk must be between 1 and 2^28, got 0"),
    "window": (lambda x, o: o.update(window_size=0), ValueError, "window_size must be between 1 and 2^30, got 0"),
    "sinks": (lambda x, o: o.update(num_sinks=-1), ValueError, "num_sinks must be between 0 and 2^30, got -1"),
    "pool": (lambda x, o: o.update(pool_size=20), ValueError, "pool_size must be 0 (no limit) or more than topk = 20"),
    "gate": (lambda x, o: o.update(gate="half"), ValueError, 'gate must be "soft" or "hard", got "half"'),
    "length": (
        lambda x, o: x.__init__(*(t[:, :1].expand(-1, 2**30 + 1, *[-1] * (t.dim() - 2)) for t in x.tensors())),
        ValueError,
        "q must have at most 2^30 positions, got 1073741825",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    change, error, message = BAD[name]
    x, options = on_gpu(make(Case(seqlen=100)), BF16), dict(topk=20, window_size=30)
    change(x, options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with pytest.raises(error, match=re.escape(message)):
        attend(x, options)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before  # nothing was begun


def test_out_of_memory_says_what_was_wanted() -> None:
    scores = torch.randn(1, 200_000, 2, device=DEVICE)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        wanted = r"sparsek: select could not allocate \d{7,} bytes \(\w+ \[[\d, ]+\]\) on cuda:0, where \d+ of \d+ bytes are free"
        with pytest.raises(RuntimeError, match=wanted):
            sparsek.select(scores, topk=4, window_size=5, pool_size=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sparsek.select(scores, topk=4, window_size=5)[0].shape == scores.shape


def test_bad_inputs_of_the_parts() -> None:
    x = on_gpu(make(Case(seqlen=100)), BF16)
    with pytest.raises(ValueError, match="scores must be Float on a GPU, got Double"):
        sparsek.select(x.scores.double(), topk=4, window_size=5)
    with pytest.raises(ValueError, match=re.escape("scores must be [batch, seqlen, num_kv_heads] (3 dim")):
        sparsek.select(x.scores[0], topk=4, window_size=5)
    with pytest.raises(ValueError, match="topk must be between 1 and 2\\^28, got 0"):
        sparsek.select(x.scores, topk=0, window_size=5)
    kept = sparsek.select(x.scores, topk=4, window_size=5)
    with pytest.raises(ValueError, match="topk must be given to attention_forward on a GPU"):
        sparsek.attention_forward(x.q, x.k, x.v, x.scores, *kept, window_size=5)
    with pytest.raises(ValueError, match="tau must be on cuda:0 like scores, got cpu"):
        sparsek.attention_forward(x.q, x.k, x.v, x.scores, kept[0].cpu(), *kept[1:], window_size=5, topk=4)
    *rows, lists = ops._select_rows(x.scores, topk=4, window_size=5, far_lists_group=2)
    keywords = dict(gate="soft", softmax_scale=0.1, deterministic=False)
    made = re.escape(f"far_lists must be what _select_rows made for these rows, {lists.numel()} values for max_far 4, 100 ")
    with pytest.raises(ValueError, match=made + ".*got 7 values and 100 key rows"):
        ops._attention_rows(x.q, x.k, x.v, None, None, *rows, **keywords, max_far=4, far_lists=lists[:7])
    with pytest.raises(ValueError, match=f"values for max_far 3, .*got {lists.numel()} values"):
        ops._attention_rows(x.q, x.k, x.v, None, None, *rows, **keywords, max_far=3, far_lists=lists)
    with pytest.raises(ValueError, match="max_far, the most far rows that a query sees, must be given"):
        ops._attention_rows(x.q, x.k, x.v, None, None, *rows, **keywords)
    with pytest.raises(ValueError, match=re.escape("max_far must be between 0 and 2^30, got -1")):
        ops._attention_rows(x.q, x.k, x.v, None, None, *rows, **keywords, max_far=-1)
    with pytest.raises(ValueError, match="batch times num_kv_heads must be at most 65535 on a GPU"):
        sparsek.select(torch.zeros(32768, 1, 2, device=DEVICE), topk=4, window_size=5)
    with pytest.raises(ValueError, match="raw must be on a GPU like other tensors of this call, got cpu"):
        sparsek.normalise_scores(x.scores.cpu(), *(torch.rand(2, device=DEVICE) for _ in range(3)))
    sizes = dict(batch=1, num_kv_heads=2, head_dim=128, topk=4, window_size=5)
    state = sparsek.new_state(**sizes, dtype=BF16, device=DEVICE)
    odd = torch.zeros(state.k.numel() + 1, dtype=BF16, device=DEVICE)[1:].view(state.k.shape)
    token = x.slice(0, 1)
    with pytest.raises(ValueError, match="state_k must have rows that lie at multiples of 16 bytes"):
        sparsek.decode_step(
            token.q, token.k, token.v, token.scores, state._replace(k=odd), topk=4, window_size=5
        )
