"""Inputs for the CUDA operations, and comparison by row with the CPU's float64 results."""

from dataclasses import dataclass, field
from typing import Optional

import torch
from inputs import Inputs
from torch import Tensor

import sparsek

DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """One attention: shapes, options, what comes with it."""

    batch: int = 1
    seqlen: int = 700
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    topk: int = 60
    window_size: int = 90
    num_sinks: int = 0
    pool_size: Optional[int] = None
    gate: str = "soft"
    far: bool = False
    documents: tuple[int, ...] = ()
    scores: str = "normal"
    extra: dict = field(default_factory=dict)

    def selection(self) -> dict:
        return dict(topk=self.topk, window_size=self.window_size, num_sinks=self.num_sinks, pool_size=self.pool_size)

    def options(self, device: str = DEVICE) -> dict:
        documents = torch.tensor(self.documents, dtype=torch.int32, device=device) if self.documents else None
        return dict(**self.selection(), gate=self.gate, cu_seqlens=documents, **self.extra)


def make(case: Case) -> Inputs:
    """On the CPU, in float64, with values that the half precision has."""

    def normal(heads: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(case.batch, case.seqlen, heads, case.head_dim, dtype=torch.float64)
        return values.to(case.dtype).double()

    shape = (case.batch, case.seqlen, case.num_kv_heads)
    scores = torch.randn(shape, dtype=torch.float64)
    if case.scores == "ties":
        scores = scores.mul(2).round()
    elif case.scores == "rising":
        scores = torch.arange(case.seqlen, dtype=torch.float64)[None, :, None] * 0.01 + scores * 0.01
    elif case.scores == "flat":
        scores = scores * 0.05
    q, k, v = normal(case.num_heads, 1.5), normal(case.num_kv_heads), normal(case.num_kv_heads)
    far = (normal(case.num_heads), normal(case.num_kv_heads)) if case.far else (None, None)
    return Inputs(q, k, v, scores.float().double(), *far)


def on_gpu(inputs: Inputs, dtype: torch.dtype, requires_grad: bool = False) -> Inputs:
    def move(name: str, tensor: Optional[Tensor]) -> Optional[Tensor]:
        if tensor is None:
            return None
        moved = tensor.detach().to(DEVICE, torch.float32 if name == "scores" else dtype)
        return moved.requires_grad_(requires_grad)

    return Inputs(*(move(name, tensor) for name, tensor in vars(inputs).items()))


def with_grad(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.detach().clone().requires_grad_() for t in vars(inputs).values()))


def attend(inputs: Inputs, options: dict) -> tuple[Tensor, Tensor]:
    return sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, **options, **inputs.far())


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs, weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = [name for name, tensor in vars(inputs).items() if tensor is not None]
    weights = [w.to(o.device, o.dtype) for w, o in zip(weights, outputs)]
    return dict(zip(names, torch.autograd.grad(outputs, inputs.tensors(), weights)))


def assert_rows_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Rows of the last dimension, each against its own size and a quarter of the mean row's: rows whose gradient cancels
    to almost nothing are as exact as what cancelled. Written so that NaN fails."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    size = expected.norm(dim=-1)
    typical = size.square().mean().sqrt()
    error = (actual - expected).norm(dim=-1) / (size + 0.25 * typical + 1e-12)
    worst = error.max().item() if error.isfinite().all() else float("nan")
    at = torch.unravel_index(error.nan_to_num(float("inf")).argmax(), error.shape)
    assert worst <= tolerance, f"{name}: row {[int(i) for i in at]} is off by {worst}, allowed {tolerance}"


# Twice the half type's unit in the last place for the probabilities and for the result, as in
# tests/kernels/cuda/attention_test.cc; delta comes from the rounded output, so dq's rows with few keys cancel.
def tolerances(dtype: torch.dtype) -> dict[str, float]:
    half = dict(out=0.008, q=0.05, k=0.012, v=0.01, q_far=0.05, k_far=0.012, scores=1e-3)
    return half if dtype == torch.bfloat16 else {name: value / 4 for name, value in half.items()} | dict(scores=1e-3)


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, wanted in expected.items():
        if name == "scores":
            difference = (actual[name].double().cpu() - wanted).abs().max().item()
            assert difference <= tolerances(dtype)[name] * wanted.abs().max().item(), (name, difference)
        else:
            assert_rows_close("d" + name, actual[name], wanted, tolerances(dtype)[name])
