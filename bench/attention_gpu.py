"""Attention on one GPU: SparseK beside dense attention (cuDNN, FlashAttention-2), FlexAttention's window and NSA.

    python bench/attention_gpu.py                 -> bench/results/h200/attention.json (about 4 minutes on an H200)
    python bench/attention_gpu.py --lengths 4096,65536 --no-layer --output /tmp/attention.json

Every contender is first compared with a float32 (SparseK: float64) evaluation of its own definition, in the same process,
at a short length; one that fails is reported and not timed. One that cannot run at a length has its reason in the place of
its times. bf16, causal, batch 1, head_dim 128; q, k, v and scores are normal. Times are medians of event timings behind a
write of 256 MiB, so that nothing lies in the L2 cache, and a pause in which the host gets ahead; SparseK's include the selection.
"""
import argparse
import dataclasses
import math
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import save
from gpu import attempt, device

HEAD_DIM, WINDOW, TOPK = 128, 1024, 1024
CHECK_SHAPE = (4096, 4)  # positions, heads: longer than window and topk together, so that the selection is not trivial


def normal(*shape, seed, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


@dataclasses.dataclass
class Inputs:
    seqlen: int
    heads: int
    kv_heads: int
    q: torch.Tensor = None  # [1, seqlen, heads, 128]
    k: torch.Tensor = None  # [1, seqlen, kv_heads, 128]
    v: torch.Tensor = None
    scores: torch.Tensor = None  # [1, seqlen, kv_heads]
    dout: torch.Tensor = None

    def leaves(self):
        return [self.q, self.k, self.v, self.scores]


def random_inputs(seqlen, heads, kv_heads):
    leaf = lambda n, seed, **options: normal(1, seqlen, *n, seed=seed, **options).requires_grad_()
    return Inputs(seqlen, heads, kv_heads, leaf((heads, HEAD_DIM), 1), leaf((kv_heads, HEAD_DIM), 2), leaf((kv_heads, HEAD_DIM), 3),
                  leaf((kv_heads,), 4, dtype=torch.float32), normal(1, seqlen, heads, HEAD_DIM, seed=5))


def attend_masked(q, k, v, visible, weight=None):
    """The definition of softmax attention over visible[i, j] (and weight[head, i, j] on values), in the dtype given."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(group, 1), v.transpose(1, 2).repeat_interleave(group, 1)
    logits = (q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)).masked_fill(~visible, -math.inf)
    probabilities = logits.softmax(-1)
    return ((probabilities if weight is None else probabilities * weight) @ v).transpose(1, 2)


def causal(seqlen):
    return torch.ones(seqlen, seqlen, dtype=torch.bool, device="cuda").tril()


class Contender:
    check_shape = CHECK_SHAPE
    any_heads = True  # timed with grouped heads too


class Dense(Contender):
    useful_pairs = staticmethod(lambda seqlen: seqlen * (seqlen + 1) / 2)

    def __init__(self, backend):
        self.backend = backend

    def prepare(self, inputs):
        return None

    def forward(self, inputs, prepared):
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=inputs.heads != inputs.kv_heads).transpose(1, 2)

    def expected(self, inputs):
        return attend_masked(inputs.q.float(), inputs.k.float(), inputs.v.float(), causal(inputs.seqlen))


def window_pairs(seqlen, window):
    short = min(seqlen, window)
    return short * (short + 1) / 2 + (seqlen - short) * window


class FlexWindow(Contender):
    useful_pairs = staticmethod(lambda seqlen: window_pairs(seqlen, WINDOW))
    any_heads = False  # each shape is compiled anew, for longer than it is timed

    def __init__(self):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        torch._dynamo.config.recompile_limit = 64  # each length, with and without gradients
        self.create_block_mask, self.attention = create_block_mask, torch.compile(flex_attention, dynamic=False)

    def prepare(self, inputs):
        visible = lambda b, h, i, j: (i >= j) & (i - j < WINDOW)
        return self.create_block_mask(visible, None, None, inputs.seqlen, inputs.seqlen, device="cuda", BLOCK_SIZE=128)

    def forward(self, inputs, mask):
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        return self.attention(q, k, v, block_mask=mask, enable_gqa=inputs.heads != inputs.kv_heads).transpose(1, 2)

    def expected(self, inputs):
        visible = causal(inputs.seqlen)
        return attend_masked(inputs.q.float(), inputs.k.float(), inputs.v.float(), visible & ~visible.tril(-WINDOW))


class NativeSparse(Contender):
    """fla's native sparse attention: 16 blocks of 64 keys a query, chosen by compressed attention; 16 query heads share a
    KV head, which its kernels ask for. No window (that part is FlashAttention)."""
    useful_pairs = staticmethod(lambda seqlen: window_pairs(seqlen, 1024))

    any_heads = False         # it has groups of 16 anyway
    check_shape = (2048, 16)  # its definition walks the queries one by one
    blocks = None             # chosen by the kernels themselves, except in the check

    def __init__(self):
        from fla.ops.nsa.naive import naive_nsa
        from fla.ops.nsa.parallel import parallel_nsa
        self.naive, self.attention = naive_nsa, parallel_nsa

    def prepare(self, inputs):
        heads = inputs.heads // 16
        gates = [torch.ones(1, inputs.seqlen, inputs.heads, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        return inputs.k[:, :, :heads].contiguous(), inputs.v[:, :, :heads].contiguous(), gates

    def forward(self, inputs, prepared):
        k, v, (compressed, selected) = prepared
        return self.attention(inputs.q, k, v, g_cmp=compressed, g_slc=selected, block_indices=self.blocks, block_counts=16,
                              block_size=64)

    def expected(self, inputs):
        """fla's own loop in float32; the kernels are then given the blocks that it chose, since rounding moves near ties."""
        k, v, (compressed, selected) = self.prepare(inputs)
        out, self.blocks = self.naive(inputs.q.float(), k.float(), v.float(), g_cmp=compressed.float(), g_slc=selected.float(),
                                      block_counts=16, block_size=64, return_block_indices=True)
        return out


class SparseK(Contender):
    def __init__(self):
        import sparsek
        self.sparsek = sparsek

    @staticmethod
    def useful_pairs(seqlen):
        return window_pairs(seqlen, WINDOW) + window_pairs(max(0, seqlen - WINDOW), TOPK)

    def prepare(self, inputs):
        return None

    def forward(self, inputs, prepared):
        return self.sparsek.attention(inputs.q, inputs.k, inputs.v, inputs.scores, topk=TOPK, window_size=WINDOW)[0]

    def expected(self, inputs):
        """The masks of eq. 3-7 from a selection in float64 on the CPU, and plain softmax on them."""
        scores = inputs.scores.detach().double().cpu()
        tau, expiry, *_ = self.sparsek.select(scores, topk=TOPK, window_size=WINDOW)
        tau, expiry, scores = tau[0].t().cuda(), expiry[0].t().cuda(), scores[0].t().cuda()  # [kv_heads, seqlen]
        i = torch.arange(inputs.seqlen, device="cuda")[:, None]
        j = torch.arange(inputs.seqlen, device="cuda")[None]
        window = (j <= i) & (j > i - WINDOW)
        far = (j + WINDOW <= i) & (i < expiry[:, None, :])
        weight = torch.where(far, (scores[:, None, :] - tau[:, :, None]).clamp(0, 1), 1.0).float()
        group = inputs.heads // inputs.kv_heads
        far, weight = far.repeat_interleave(group, 0), weight.repeat_interleave(group, 0)
        return attend_masked(inputs.q.float(), inputs.k.float(), inputs.v.float(), far | window, weight)


CONTENDERS = {
    "cuDNN dense": lambda: Dense(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-2 dense": lambda: Dense(SDPBackend.FLASH_ATTENTION),
    "FlexAttention window 1024": FlexWindow,
    "fla NSA, 1024 keys": NativeSparse,
    "SparseK k=w=1024": SparseK,
}


class Timer:
    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, work, repeats):
        times = []
        for n in range(repeats + 2):
            self.flush.zero_()
            torch.cuda._sleep(3_000_000)  # some 1.6 ms, in which the host runs ahead: the GPU's time is what is measured
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            stop.synchronize()
            if n >= 2:
                times.append(start.elapsed_time(stop))
        return {"median_ms": round(statistics.median(times), 4), "min_ms": round(min(times), 4), "max_ms": round(max(times), 4)}


def row_error(actual, expected):
    """The largest relative error of a row (one head of one position)."""
    difference = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return difference.max().item()


def check(contender):
    """None, or what is wrong. bf16 rounds probabilities and output: 2^-8 each, and sums over rows of 2,048 keys."""
    inputs = random_inputs(*contender.check_shape, contender.check_shape[1])
    with torch.no_grad():
        expected = contender.expected(inputs)
        error = row_error(contender.forward(inputs, contender.prepare(inputs)), expected)
    contender.blocks = None
    return None if error < 0.02 else f"row error {error:.3g} against its definition"


def measure(contender, seqlen, heads, kv_heads, timer):
    inputs = random_inputs(seqlen, heads, kv_heads)
    prepared = contender.prepare(inputs)

    def forward():
        with torch.no_grad():
            contender.forward(inputs, prepared)

    def forward_backward():
        for leaf in inputs.leaves():
            leaf.grad = None
        contender.forward(inputs, prepared).backward(inputs.dout)

    result = {}
    for name, work, factor in (("forward", forward, 1), ("forward_backward", forward_backward, 3.5)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        result[name] = timer(work, 15 if seqlen <= 16384 else 7 if seqlen <= 65536 else 5)
        flop = 4 * HEAD_DIM * heads * contender.useful_pairs(seqlen) * factor
        result[name] |= {"peak_mib": round(peak / 2**20), "useful_tflops": round(flop / result[name]["median_ms"] / 1e9, 1)}
    return result


def layer_of(contender, seqlen, heads, kv_heads, timer):
    """A Llama-shaped layer around it: norm, q k v and scores, attention, output, norm, gated MLP (2,048 wide, 5,632 inside)."""
    width, inside = heads * HEAD_DIM, 5632
    weight = lambda n, m, seed: (normal(n, m, seed=seed) / math.sqrt(m)).requires_grad_()
    w_q, w_o = weight(width, width, 11), weight(width, width, 12)
    w_k, w_v, w_u = (weight(kv_heads * n, width, seed) for n, seed in ((HEAD_DIM, 13), (HEAD_DIM, 14), (1, 15)))
    w_gate, w_up, w_down = weight(inside, width, 16), weight(inside, width, 17), weight(width, inside, 18)
    x = normal(1, seqlen, width, seed=19).requires_grad_()
    dx = normal(1, seqlen, width, seed=20)
    inputs = Inputs(seqlen, heads, kv_heads)
    shape = lambda y, n: y.view(1, seqlen, n, -1)
    mask = contender.prepare(inputs) if isinstance(contender, FlexWindow) else None

    def step():
        h = F.rms_norm(x, (width,))
        inputs.q, inputs.k, inputs.v = shape(h @ w_q.t(), heads), shape(h @ w_k.t(), kv_heads), shape(h @ w_v.t(), kv_heads)
        inputs.scores = (h @ w_u.t()).float() if isinstance(contender, SparseK) else None
        attended = contender.forward(inputs, mask).reshape(1, seqlen, width)
        y = x + attended @ w_o.t()
        h = F.rms_norm(y, (width,))
        return y + (F.silu(h @ w_gate.t()) * (h @ w_up.t())) @ w_down.t()

    def forward_backward():
        x.grad = None
        step().backward(dx)

    with torch.no_grad():
        result = {"forward": timer(step, 5)}
    result["forward_backward"] = timer(forward_backward, 5)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072")
    parser.add_argument("--heads", default="16/16,32/8", help="query heads / KV heads, several with commas")
    parser.add_argument("--only", default="", help="contenders whose name contains one of these words (commas between)")
    parser.add_argument("--no-layer", action="store_true", help="leave out the whole layer")
    parser.add_argument("--output", help="a file other than bench/results/h200/attention.json")
    options = parser.parse_args()
    contenders, results, timer = {}, [], Timer()
    for name, make in CONTENDERS.items():
        if options.only and not any(word in name for word in options.only.split(",")):
            continue
        try:
            contenders[name] = make()
        except ImportError as error:
            print(f"{name}: not here ({error})")
            continue
        wrong = attempt(check, contenders[name])
        if wrong is not None:
            results.append({"contender": name, "wrong": wrong})
            print(f"{name}: not timed: {wrong}", flush=True)
            del contenders[name]
    for pair in options.heads.split(","):
        heads, kv_heads = (int(n) for n in pair.split("/"))
        for seqlen in (int(n) for n in options.lengths.split(",")):
            for name, contender in contenders.items():
                if not contender.any_heads and pair != options.heads.split(",")[0]:
                    continue
                row = {"contender": name, "seqlen": seqlen, "heads": pair, **attempt(measure, contender, seqlen, heads, kv_heads, timer)}
                if not options.no_layer and pair == "16/16" and not isinstance(contender, NativeSparse):
                    row["layer"] = attempt(layer_of, contender, seqlen, heads, kv_heads, timer)
                results.append(row)
                text = row.get("failed") or f"{row['forward']['median_ms']:8.3f} {row['forward_backward']['median_ms']:8.3f} ms"
                print(f"{pair} T {seqlen:>7} {name:<26} {text}", flush=True)
            # after each length, so that a run that is ended keeps what it measured
            save("h200/attention", "python bench/attention_gpu.py", {"device": device(), "results": results}, options.output)


if __name__ == "__main__":
    main()
