"""The operations between attention layers on a GPU, forward and gradient, against the same operations in float64 on the
CPU, by row. Skipped, saying why, where there is no GPU; what the CPU computes is tested anywhere."""

from typing import Callable, Optional

import pytest
import torch
from cuda_inputs import DEVICE, assert_rows_close
from torch import Tensor

import sparsek  # noqa: F401 (loads the operations)
from sparsek import _library

ops = torch.ops.sparsek
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not _library.has_cuda_kernels(), reason="libsparsek_ops_cuda.so is not built"
    ),
]
HALVES = [torch.bfloat16, torch.float16]


def gpu(function: Callable) -> Callable:
    for mark in on_gpu:
        function = mark(function)
    return function


def rounding(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps


def half(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """float64 with values that the half type has."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).double()


def wide(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float().double()


def both(
    function: Callable, inputs: list[Optional[Tensor]], dtypes: list, to: torch.dtype, weights: list[Tensor]
) -> list[list[Tensor]]:
    """Results and gradients on the CPU in float64, then on the GPU in `dtypes` and `to`; weights: of results."""
    found = []
    for device, of, result in (("cpu", [torch.float64] * len(inputs), torch.float64), (DEVICE, dtypes, to)):
        moved = [None if x is None else x.to(device, dtype).requires_grad_() for x, dtype in zip(inputs, of)]
        out = function(moved, result)
        given = [x for x in moved if x is not None]
        grads = torch.autograd.grad(out, given, [w.to(o.device, o.dtype) for w, o in zip(weights, out)])
        found.append([*out, *grads])
    return found


def compare(found: list[list[Tensor]], names: list[str], tolerances: list[float]) -> None:
    for name, expected, actual, tolerance in zip(names, *found, tolerances, strict=True):
        assert_rows_close(name, actual, expected, tolerance)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 700, 576), (2, 33, 64), (3, 1, 257), (1, 70, 4096)])
@pytest.mark.parametrize("has_update", [False, True])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], has_update: bool) -> None:
    x, update, weight = wide(shape, 1), half(shape, dtype, 2) if has_update else None, wide(shape[-1:], 3)

    def function(inputs: list[Optional[Tensor]], to: torch.dtype) -> list[Tensor]:
        out, total, _ = ops._add_rms_norm(inputs[0], inputs[1], inputs[2], eps=1e-5, dtype=to)
        return [out, total] if has_update else [out]

    found = both(function, [x, update, weight], [torch.float32, dtype, torch.float32], dtype,
                 [half(shape, dtype, 4), wide(shape, 5)][: 1 + has_update])
    names = ["out", *["sum"] * has_update, "dx", *["dupdate"] * has_update, "dweight"]
    size = {"out": rounding(dtype), "sum": 1e-6, "dx": 1e-5, "dupdate": rounding(dtype), "dweight": 1e-4}
    compare(found, names, [size[name] for name in names])


@gpu
def test_gradient_of_a_norm_whose_sum_alone_is_used() -> None:
    shape = (2, 30, 64)
    x = wide(shape, 1).float().to(DEVICE).requires_grad_()
    update = half(shape, torch.bfloat16, 2).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.ones(64, device=DEVICE)
    _, total, _ = ops._add_rms_norm(x, update, weight, eps=1e-5, dtype=torch.bfloat16)
    (2 * total).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2)) and torch.equal(update.grad, torch.full_like(update, 2))


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("batch, seqlen, heads, kv_heads, head_dim, own_angles",
                         [(1, 700, 9, 3, 64, False), (2, 33, 4, 4, 128, True), (3, 5, 3, 1, 10, False)])
def test_split_rotary(dtype: torch.dtype, far: bool, batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int,
                      own_angles: bool) -> None:
    qkv = half((batch, seqlen, (heads + 2 * kv_heads) * head_dim), dtype, 1)
    cos, sin = (wide((batch if own_angles else 1, seqlen, 1, head_dim // 2), seed) for seed in (2, 3))
    far_cos, far_sin = (wide((1, 1, 1, head_dim // 2), seed) if far else None for seed in (4, 5))
    counts = [heads, kv_heads, kv_heads, heads, kv_heads][: 5 if far else 3]
    weights = [half((batch, seqlen, count, head_dim), dtype, 10 + i) for i, count in enumerate(counts)]
    # The gradients arrive as torch's attention hands them back: heads before positions.
    weights = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    found = []
    for device, of, angle_type in (("cpu", torch.float64, torch.float64), (DEVICE, dtype, torch.float32)):
        x = qkv.to(device, of).requires_grad_()
        angles = [None if a is None else a.to(device, angle_type) for a in (cos, sin, far_cos, far_sin)]
        out = ops._split_rotary(x, *angles, num_heads=heads, num_kv_heads=kv_heads)[: len(counts)]
        if device == DEVICE:
            assert all(o.is_contiguous() for o in out)
        found.append([*out, *torch.autograd.grad(out, x, [w.to(device, of) for w in weights])])
    compare(found, ["q", "k", "v", "q_far", "k_far"][: len(counts)] + ["dqkv"], [rounding(dtype)] * (len(counts) + 1))


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 300, 3072), (2, 7, 14), (5, 48)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out_shape = (*shape[:-1], shape[-1] // 2)
    found = both(lambda inputs, _: [ops._swiglu(inputs[0])], [half(shape, dtype, 1)], [dtype], dtype,
                 [half(out_shape, dtype, 2)])
    compare(found, ["out", "dgate_up"], [rounding(dtype)] * 2)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("vocab_size", [49152, 1000, 23])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_cross_entropy(dtype: torch.dtype, vocab_size: int, has_teacher: bool) -> None:
    rows = 50
    logits = 2 * half((rows, vocab_size), dtype, 1)
    teacher = half((rows, vocab_size), dtype, 2) if has_teacher else None
    targets = torch.arange(rows) * 7919 % vocab_size
    targets[3:6] = -100
    found = []
    for device, of in (("cpu", torch.float64), (DEVICE, dtype)):
        x = logits.to(device, of, copy=True)  # overwritten
        other = None if teacher is None else teacher.to(device, of)
        options = dict(ignored=-100, next_token_weight=0.7, kl_weight=0.4, writes_gradient=True)
        losses, divergences = ops._cross_entropy_(x, targets.to(device), other, **options)
        found.append([losses[:, None], divergences[:, None], x] if has_teacher else [losses[:, None], x])
    # float16 has no numbers between 0 and 6e-8: the gradients of improbable tokens.
    names = ["losses", *["divergences"] * has_teacher, "dlogits"]
    compare(found, names, [1e-5, *[1e-5] * has_teacher, 2 * rounding(dtype)])
    assert found[1][-1][3:6].abs().max() == 0


@gpu
@pytest.mark.parametrize("vocab_size", [2048, 2047])  # by eight elements, and one by one
def test_cross_entropy_with_columns_that_are_out_of_the_question(vocab_size: int) -> None:
    """-inf in all that some threads see: they add nothing."""
    logits = half((20, vocab_size), torch.bfloat16, 1)
    logits[:, 8:1032] = -torch.inf
    targets = torch.arange(20) % 8
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    x = logits.to(DEVICE, torch.bfloat16)
    losses, _ = ops._cross_entropy_(
        x, targets.to(DEVICE), None, ignored=-100, next_token_weight=1.0, kl_weight=0.0, writes_gradient=True
    )
    assert_rows_close("losses", losses[:, None], expected[:, None], 1e-5)
    assert x[:, 8:1032].abs().max() == 0 and x.isfinite().all()


@gpu
def test_the_same_bits_twice() -> None:
    x, weight = wide((1, 9000, 576), 1).float().to(DEVICE), wide((576,), 2).float().to(DEVICE)

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out, _, _ = ops._add_rms_norm(leaves[0], None, leaves[1], eps=1e-5, dtype=torch.bfloat16)
        weights = torch.cos(torch.arange(out.numel(), device=DEVICE)).view_as(out).bfloat16()
        return list(torch.autograd.grad(out, leaves, weights))

    for first, second in zip(gradients(), gradients()):
        assert torch.equal(first, second)


@gpu
def test_no_second_derivative() -> None:
    gate_up = torch.randn(3, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(ops._swiglu(gate_up).sum(), gate_up, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def norm(x: Tensor, weight: int = 8, dtype: torch.dtype = torch.bfloat16) -> None:
    ops._add_rms_norm(x, None, torch.ones(weight, device=DEVICE), eps=1e-5, dtype=dtype)


def rotate(x: Tensor) -> None:
    angles = x[None, :, None]
    ops._split_rotary(x.bfloat16()[None], angles, angles, None, None, num_heads=1, num_kv_heads=1)


@gpu
@pytest.mark.parametrize(
    "call, mentions",
    [
        (lambda x: norm(x.bfloat16()), "x must be Float"),
        (lambda x: norm(x, dtype=torch.float32), "BFloat16 or Half"),
        (lambda x: norm(x, weight=7), r"weight.*\[8\]"),
        (lambda x: ops._swiglu(x), "BFloat16 or Half"),
        (lambda x: ops._swiglu(x.bfloat16()[:, :7]), "2 ffn"),
        (rotate, "head_dim"),
    ],
)
def test_wrong_inputs_are_named(call: Callable, mentions: str) -> None:
    with pytest.raises(ValueError, match=mentions):
        call(torch.randn(4, 8, device=DEVICE))


def test_on_the_cpu_torch_differentiates() -> None:
    """The operations' own definition, in float64: values and finite differences."""
    x, update, weight = wide((2, 5, 12), 1), wide((2, 5, 12), 2), wide((12,), 3)
    for tensor in (x, update, weight):
        tensor.requires_grad_()
    out, total, _ = ops._add_rms_norm(x, update, weight, eps=1e-5, dtype=torch.float64)
    assert torch.equal(total, x + update)
    expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert torch.allclose(out, expected, rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *inputs: ops._add_rms_norm(*inputs, eps=1e-5, dtype=torch.float64)[:2], (x, update, weight)
    )

    qkv = wide((2, 3, (2 + 2) * 6), 4).requires_grad_()
    cos, sin, far_cos, far_sin = (wide(shape, 5 + i) for i, shape in enumerate([(2, 3, 1, 3)] * 2 + [(1, 1, 1, 3)] * 2))

    def rotated(qkv: Tensor) -> tuple[Tensor, ...]:
        return ops._split_rotary(qkv, cos, sin, far_cos, far_sin, num_heads=2, num_kv_heads=1)

    q, k, v, q_far, k_far = rotated(qkv)
    heads = qkv.view(2, 3, 4, 6)
    low, high = heads[:, :, :2, :3], heads[:, :, :2, 3:]
    assert torch.equal(q, torch.cat([low * cos - high * sin, high * cos + low * sin], -1))
    assert torch.equal(q_far, torch.cat([low * far_cos - high * far_sin, high * far_cos + low * far_sin], -1))
    assert torch.equal(k_far, heads[:, :, 2:3]) and torch.equal(v, heads[:, :, 3:])
    assert torch.autograd.gradcheck(rotated, (qkv,))

    gate_up = wide((3, 10), 9).requires_grad_()
    assert torch.equal(ops._swiglu(gate_up), torch.nn.functional.silu(gate_up[:, :5]) * gate_up[:, 5:])
    assert torch.autograd.gradcheck(ops._swiglu, (gate_up,))


def test_cross_entropy_on_the_cpu() -> None:
    logits, teacher = wide((6, 11), 1).requires_grad_(), wide((6, 11), 2)
    targets = torch.tensor([0, 10, -100, 3, 3, 5])
    log_p, log_t = logits.log_softmax(-1), teacher.log_softmax(-1)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    divergences = (log_t.exp() * (log_t - log_p)).sum(-1) * (targets != -100)
    (gradient,) = torch.autograd.grad((0.7 * losses + 0.4 * divergences).sum(), logits)
    written = logits.detach().clone()
    options = dict(ignored=-100, next_token_weight=0.7, kl_weight=0.4, writes_gradient=True)
    found = ops._cross_entropy_(written, targets, teacher, **options)
    assert torch.allclose(found[0], losses) and torch.allclose(found[1], divergences)
    assert torch.allclose(written, gradient, atol=1e-12)
    kept = logits.detach().clone()
    ops._cross_entropy_(kept, targets, None, **{**options, "writes_gradient": False})
    assert torch.equal(kept, logits)
    for wrong in (-1, 11):
        with pytest.raises((IndexError, RuntimeError), match=f"{wrong}.*out of bounds"):
            ops._cross_entropy_(kept, torch.full((6,), wrong), None, **options)
    with pytest.raises(RuntimeError, match="_cross_entropy_ is not implemented"):
        ops._cross_entropy_(logits * 1, targets, None, **options)[0].sum().backward()
