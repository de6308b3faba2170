"""Reading and decoding speed of whole models on one GPU: SparseK beside transformers' dense generation.

    SPARSEK_BUILD_DIR=build/cuda python bench/model_gpu.py    -> bench/results/h200/model.json
    python bench/model_gpu.py --shapes smollm2 --contexts 8192 --batches 1 --ways compiled --output /tmp/model.json
    python bench/model_gpu.py --device cpu --shapes tiny --contexts 64 --output /tmp/model.json    without a GPU: that it runs

Shapes are those of SmolLM2-135M and of Llama 3.1 8B in bfloat16 with random weights, which speed does not depend on
(--smollm2 FILE: our program reads that model instead). Ours is `sparsek bench model`. Both sides read one document of random
tokens (transformers in one piece, ours in chunks), then decode greedily, every step waited for; a batch decodes from copies of
what was read, each from another token. transformers' ways to decode, all with attn_implementation sdpa:
  dynamic   its default cache, which grows by concatenation
  static    its static cache, the step in a CUDA graph
  compiled  its static cache, torch.compile(mode="reduce-overhead"); only on request and at the first context: compiling takes long
What does not fit or fails has its reason in the place of its times.
"""
import argparse
import gc
import json
import os
import pathlib
import statistics
import tempfile
import time

import torch

from common import ROOT, save, sparsek
from gpu import attempt, device

TOPK, WINDOW = 1024, 1024
WARM_UP_STEPS = 3  # as our program has it
SMALL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
SHAPES = {
    "smollm2": {**SMALL, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
                "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "llama-8b": {**SMALL, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
                 "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "tiny": {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
             "intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 8192, "tie_word_embeddings": True,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ours(shape, options):
    """Rows of `sparsek bench model`, and what it says of the run as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        model, made_up = options.smollm2, []
        if shape != "smollm2" or model is None:
            model, made_up = pathlib.Path(folder) / "config.json", ["--random-weights"]
            model.write_text(json.dumps(SHAPES[shape]))
        found = sparsek("bench", "model", "--model", model, *made_up, "--device", options.device, "--context", options.contexts,
                        "--batch", options.batches, "--decode-tokens", options.decode_tokens, "--repeats", options.repeats,
                        "--chunk", options.chunk, "--topk", options.topk, "--window", options.window, program=options.program)
    return {**found, "model": "random weights" if made_up else "weights of a file"}


class Dense:
    """transformers' model of a shape, and its cache behind the context read last."""

    def __init__(self, shape, options):
        import transformers
        from transformers import AutoModelForCausalLM, LlamaConfig
        self.version, self.options = transformers.__version__, options
        self.config = LlamaConfig(**SHAPES[shape])
        with torch.device(options.device):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def synchronise(self):
        if self.options.device != "cpu":
            torch.cuda.synchronize()

    def timed(self, work):
        self.synchronise()
        start = time.perf_counter()
        result = work()
        self.synchronise()
        return result, time.perf_counter() - start

    @torch.no_grad()
    def read(self, context):
        """(cache, seconds of each reading and choosing the next token)"""
        from transformers import DynamicCache
        ids = torch.randint(self.config.vocab_size, (1, context), device=self.options.device)
        times, cache = [], None
        for _ in range(self.options.repeats if context <= 32768 else 1):
            del cache
            cache = DynamicCache(config=self.config)
            times.append(self.timed(lambda: self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1))[1])
        return cache, times

    def check_room(self, cache, batch):
        needed = batch * sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if self.options.device == "cpu":
            return
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            raise MemoryError(f"the cache of {batch} documents takes {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")

    @torch.no_grad()
    def decode(self, way, cache, batch):
        """Milliseconds of each step of `batch` copies of what was read."""
        from transformers import DynamicCache, StaticCache
        self.check_room(cache, batch)
        steps = self.options.decode_tokens
        if way == "dynamic":
            copies = DynamicCache(config=self.config)
        else:
            longest = cache.get_seq_length() + steps + 2 * WARM_UP_STEPS
            copies = StaticCache(config=self.config, max_cache_len=-(-longest // 64) * 64)
        for copy, layer in zip(copies.layers, cache.layers, strict=True):
            copy.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1))
        token = torch.randint(self.config.vocab_size, (batch, 1), device=self.options.device)
        forward = self.model
        if way == "compiled":
            torch.compiler.reset()
            forward = torch.compile(self.model, mode="reduce-overhead", dynamic=False)

        def step():
            token.copy_(forward(token, past_key_values=copies, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True))

        _, first = self.timed(step)
        for _ in range(WARM_UP_STEPS - 1):
            step()
        run = step
        if way == "static" and self.options.device != "cpu":
            run = self.recorded(step).replay
            run()
        times = [self.timed(run)[1] * 1e3 for _ in range(steps)]
        return {"decode_tokens_per_second": batch * steps / sum(times) * 1e3, "decode_step_ms": spread(times),
                **({"first_step_seconds": first} if way == "compiled" else {})}

    def recorded(self, step):
        self.synchronise()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # libraries make the workspaces of this stream before it is recorded
            step()
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return graph


def show(shape, context, batch, who, row):
    rate = lambda key: f"{row[key]:>12.1f}" if key in row else " " * 12
    print(f"{shape:<9} {context:>7} {batch:>5}  {who:<22} {rate('read_tokens_per_second')} {rate('decode_tokens_per_second')}  "
          f"{row.get('failed') or ''}", flush=True)


def dense_rows(shape, options, rows):
    """Appends to `rows` as it goes, so that what was measured stays when a later part fails."""
    dense = Dense(shape, options)
    contexts = [int(n) for n in options.contexts.split(",")]
    attempt(dense.read, min(contexts))  # kernels are loaded

    def one_context(context):
        cache, times = dense.read(context)
        reading = {"read_tokens_per_second": context / statistics.median(times), "read_seconds": spread(times)}
        for batch in (int(n) for n in options.batches.split(",")):
            for way in options.ways.split(","):
                if way == "compiled" and context != contexts[0]:
                    continue
                row = {"shape": shape, "context": context, "batch": batch, "contender": f"transformers {way}", **reading,
                       **attempt(dense.decode, way, cache, batch)}
                rows.append(row)
                show(shape, context, batch, row["contender"], row)
        return {}

    for context in contexts:
        failure = attempt(one_context, context)
        if failure:
            rows.append({"shape": shape, "context": context, "contender": "transformers", **failure})
            show(shape, context, "-", "transformers", failure)
    return {"transformers": dense.version}


def main():
    build = pathlib.Path(os.environ.get("SPARSEK_BUILD_DIR", ROOT / "build/cuda"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2,llama-8b", help=", ".join(SHAPES))
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--ways", default="dynamic,static", help="of transformers, compiled too; none: only ours")
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2, help="readings of each context (transformers: one beyond 32,768)")
    parser.add_argument("--topk", type=int, default=TOPK)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--chunk", type=int, default=32768, help="tokens that our program reads at once")
    parser.add_argument("--smollm2", help="a GGUF file or folder that our program reads for the shape smollm2")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--program", default=str(build / "sparsek"))
    parser.add_argument("--output", help="a file other than bench/results/h200/model.json")
    options = parser.parse_args()
    if options.device == "cpu" and not options.output:
        parser.error("--device cpu: expected --output with it, found none; the default file is an H200's")
    torch.manual_seed(1)
    on_gpu = options.device == "cuda"
    result = {"device": device() if on_gpu else {"name": "cpu", "torch": torch.__version__}, "runs": {}, "results": []}
    rows = result["results"]
    command = f"python bench/model_gpu.py --shapes {options.shapes} --contexts {options.contexts} --batches {options.batches} --ways {options.ways}"
    print(f"{'shape':<9} {'context':>7} {'batch':>5}  {'contender':<22} {'read tok/s':>12} {'decode tok/s':>12}", flush=True)
    for shape in options.shapes.split(","):
        found = attempt(ours, shape, options)
        for row in found.pop("results", [found]):
            rows.append({"shape": shape, "contender": "sparsek", **row})
            show(shape, row.get("context", "-"), row.get("batch", "-"), "sparsek", row)
        result["runs"][shape] = {"sparsek": found}
        if options.ways != "none":
            outcome = attempt(dense_rows, shape, options, rows)
            if "failed" in outcome:
                rows.append({"shape": shape, "contender": "transformers", **outcome})
                show(shape, "-", "-", "transformers", outcome)
            result["runs"][shape] |= outcome
        gc.collect()
        save("h200/model", command, result, options.output)  # a later shape may not come to its end


if __name__ == "__main__":
    main()
