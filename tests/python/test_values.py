"""The operations against the definition (definition.py), float64 and small: layouts, defaults, options."""

import definition
import pytest
import torch
from definition import Options
from inputs import random_inputs

import sparsek

CASES = [
    Options(topk=3, window_size=5),
    Options(topk=4, window_size=6, num_sinks=3, pool_size=7),
    Options(topk=1, window_size=1, num_sinks=1, pool_size=2),
    Options(topk=5, window_size=3, num_sinks=6, pool_size=0),
    Options(topk=64, window_size=4),
]


def test_sparsek_has_the_values_of_the_definition() -> None:
    for dtype in (torch.float32, torch.float64):
        p = sparsek.sparsek(torch.tensor([[3, 1, 0.2, -1], [0.5] * 4, [5, 3, 1, -1], [2, 1.9, 1.8, 0]], dtype=dtype), 2)
        wanted = torch.tensor(
            [[1, 0.9, 0.1, 0], [0.5] * 4, [1, 1, 0, 0], [23 / 30, 20 / 30, 17 / 30, 0]], dtype=dtype
        )
        torch.testing.assert_close(p, wanted)
    z = torch.randn(3, 2, 50, dtype=torch.float64).transpose(0, 1)
    wanted = torch.stack([definition.sparsek(row, 7) for row in z.reshape(-1, 50)]).view(2, 3, 50)
    torch.testing.assert_close(sparsek.sparsek(z, 7), wanted)
    assert torch.equal(sparsek.sparsek(z, 50), torch.ones_like(z))


@pytest.mark.parametrize("options", CASES)
def test_select_agrees_with_the_definition(options: Options) -> None:
    u = torch.randn(2, 40, 2, dtype=torch.float64)
    u[1, :, 1] = u[1, :, 1].round()  # ties
    tau, expiry, frac_begin, frac_end = sparsek.select(u, **options.keywords())
    for b in range(2):
        for h in range(2):
            for i in range(40):
                pool, selected, weights = definition.selection(u[b, :, h], i, options)
                seen = {j for j in range(40) if j + options.window_size <= i < expiry[b, j, h]}
                seen = {j for j in seen if j >= options.num_sinks}
                assert seen == set(selected), (b, h, i)
                mine = torch.clamp(u[b, pool, h] - tau[b, i, h], 0, 1)
                torch.testing.assert_close(mine, weights, rtol=0, atol=1e-12)
                fractional = {j for j in range(40) if frac_begin[b, j, h] <= i < frac_end[b, j, h]}
                assert fractional == {j for j, p in zip(pool, mine.tolist()) if 0 < p < 1}, (b, h, i)


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("far", [False, True])
def test_attention_agrees_with_the_definition(options: Options, gate: str, far: bool) -> None:
    inputs = random_inputs(far=far, requires_grad=True)
    wanted = definition.attention(inputs.q, inputs.k, inputs.v, inputs.scores, options, gate, **inputs.far())
    out = sparsek.attention(
        inputs.q, inputs.k, inputs.v, inputs.scores, **options.keywords(), gate=gate, **inputs.far()
    )
    assert out[0].shape == inputs.q.shape and out[1].shape == (2, 4, 40)
    weights = [torch.randn_like(x) for x in out]
    for mine, right in zip(out, wanted):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)
    mine = torch.autograd.grad(out, inputs.tensors(), weights)
    right = torch.autograd.grad(wanted, inputs.tensors(), weights, allow_unused=True)
    for ours, theirs, tensor in zip(mine, right, inputs.tensors()):
        theirs = torch.zeros_like(tensor) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_attention_is_dense_when_topk_covers_everything() -> None:
    inputs = random_inputs(dtype=torch.float32)
    out, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, topk=40, window_size=3)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_attention_is_select_and_attention_forward() -> None:
    inputs = random_inputs(dtype=torch.float32, seqlen=100)
    kept = sparsek.select(inputs.scores, topk=8, window_size=9, num_sinks=2)
    parts = sparsek.attention_forward(inputs.q, inputs.k, inputs.v, inputs.scores, *kept, window_size=9, num_sinks=2)
    whole = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, topk=8, window_size=9, num_sinks=2)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("window_size", [1, 2, 5, 64])
def test_window_mass_agrees_with_the_definition(window_size: int, far: bool) -> None:
    inputs = random_inputs(far=far)
    options = Options(topk=1, window_size=window_size, num_sinks=3)
    y = sparsek.window_mass(inputs.q, inputs.k, window_size=window_size, num_sinks=3, **inputs.far())
    wanted = definition.window_mass(inputs.q, inputs.k, options, **inputs.far())
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_separate_ones() -> None:
    inputs = random_inputs(batch=1, seqlen=90, far=True, requires_grad=True)
    bounds = [0, 1, 33, 90]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    options = dict(topk=4, window_size=6, num_sinks=2, pool_size=9)
    packed = sparsek.attention(
        inputs.q, inputs.k, inputs.v, inputs.scores, **options, **inputs.far(), cu_seqlens=cu_seqlens
    )
    parts = [inputs.slice(a, b) for a, b in zip(bounds, bounds[1:])]
    separate = [sparsek.attention(p.q, p.k, p.v, p.scores, **options, **p.far()) for p in parts]
    joined = (torch.cat([out for out, _ in separate], 1), torch.cat([lse for _, lse in separate], 2))
    for mine, right in zip(packed, joined):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(x) for x in packed]
    mine = torch.autograd.grad(packed, inputs.tensors(), weights)
    right = torch.autograd.grad(joined, inputs.tensors(), weights)
    for ours, theirs in zip(mine, right):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)

    mass = dict(window_size=6, num_sinks=2)
    packed_y = sparsek.window_mass(inputs.q, inputs.k, **mass, **inputs.far(), cu_seqlens=cu_seqlens)
    separate_y = [sparsek.window_mass(p.q, p.k, **mass, **p.far()) for p in parts]
    torch.testing.assert_close(packed_y, torch.cat(separate_y, 1), rtol=1e-11, atol=1e-11)

    heads = [torch.rand(2, dtype=torch.float64) for _ in range(3)]
    packed_u, _ = sparsek.normalise_scores(inputs.scores, *heads, cu_seqlens=cu_seqlens)
    separate_u = [sparsek.normalise_scores(p.scores, *heads)[0] for p in parts]
    torch.testing.assert_close(packed_u, torch.cat(separate_u, 1), rtol=1e-11, atol=1e-11)


def test_normalise_scores_agrees_with_eq_1() -> None:
    raw = torch.randn(2, 50, 3, dtype=torch.float64) + 30
    beta, gamma, slope = torch.randn(3, 3, dtype=torch.float64)
    scores, stats = sparsek.normalise_scores(raw, beta, gamma, slope)
    for j in range(50):
        seen = raw[:, : j + 1]
        spread = torch.sqrt(seen.var(1, unbiased=False) + 1e-5)
        wanted = beta + gamma * (raw[:, j] - seen.mean(1)) / spread + slope * j / 1024
        torch.testing.assert_close(scores[:, j], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats[..., 1], raw.mean(1))
    plain, _ = sparsek.normalise_scores(raw, beta, gamma, slope, timestep_norm=False)
    position = torch.arange(50, dtype=torch.float64)[None, :, None]
    torch.testing.assert_close(plain, beta + gamma * raw + slope * position / 1024)


def test_strided_inputs_give_the_same_bits() -> None:
    inputs = random_inputs(dtype=torch.float32, seqlen=70, far=True, requires_grad=True)
    options = dict(topk=8, window_size=9, num_sinks=2)

    def strided(t: torch.Tensor) -> torch.Tensor:
        base = torch.full([2 * n for n in t.shape[:-1]] + [t.shape[-1]], torch.nan, dtype=t.dtype)
        view = base[tuple(slice(1, None, 2) for _ in t.shape[:-1])]
        return view.copy_(t.detach()).requires_grad_()

    views = type(inputs)(*(strided(t) for t in vars(inputs).values()))
    results = []
    for x in (inputs, views):
        out, lse = sparsek.attention(x.q, x.k, x.v, x.scores, **options, **x.far(), deterministic=True)
        y = sparsek.window_mass(x.q, x.k, window_size=9, num_sinks=2, **x.far())
        grads = torch.autograd.grad([out, lse], x.tensors(), [torch.ones_like(out), torch.ones_like(lse)])
        results.append([out, lse, y, *grads])
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_a_future_token_changes_no_past_output() -> None:
    inputs = random_inputs(dtype=torch.float32, seqlen=100)
    options = dict(topk=8, window_size=9, num_sinks=2)
    before, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options)
    for tensor in (inputs.k, inputs.v, inputs.scores):
        tensor[:, 60:] += 5
    after, _ = sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options)
    torch.testing.assert_close(after[:, :60], before[:, :60], rtol=0, atol=0)
    assert not torch.equal(after[:, 60:], before[:, 60:])
