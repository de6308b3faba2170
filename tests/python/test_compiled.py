"""torch.compile with its default backend, and bits that repeat."""

import shutil

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from inputs import Inputs, random_inputs

import sparsek

OPTIONS = dict(topk=6, window_size=9, num_sinks=2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """One graph from projection to loss, forward and backward, equal to what runs uncompiled."""

    def loss(x: Inputs) -> torch.Tensor:
        scores = torch.tanh(x.scores) * 2
        out, lse = sparsek.attention(x.q * 1.5, x.k, torch.relu(x.v), scores, **OPTIONS)
        return (out.square().sum(-1) + lse.transpose(1, 2)).mean()

    x = random_inputs(dtype=torch.float32, seqlen=70, requires_grad=True)
    compiled = torch.compile(loss, backend="inductor", fullgraph=True)
    # A graph kept from an earlier run would hide what the meta functions say today.
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        expected, actual = loss(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(torch.autograd.grad(actual, x.tensors()), torch.autograd.grad(expected, x.tensors())):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(dtype: torch.dtype) -> None:
    """The same bits every time, with one thread and with many."""
    x = random_inputs(dtype=dtype, seqlen=1500, far=True, requires_grad=True)
    keywords = dict(topk=100, window_size=64, num_sinks=2, deterministic=True, **x.far())
    dout = torch.randn_like(x.q)

    def run() -> list[torch.Tensor]:
        out, lse = sparsek.attention(x.q, x.k, x.v, x.scores, **keywords)
        return [out, lse, *torch.autograd.grad((out * dout).sum() + lse.sum(), x.tensors())]

    first, threads = run(), torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 4, 4, 4):
            torch.set_num_threads(num_threads)
            assert all(torch.equal(a, b) for a, b in zip(first, run()))
    finally:
        torch.set_num_threads(threads)
