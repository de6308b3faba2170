"""sparsek bench: tiny runs that end well, and every option that can be wrong."""
import json

import pytest
from program import fails, run

ATTENTION = ["bench", "attention", "--seqlen", "70,64", "--topk", 8, "--window", 8, "--repeats", 1]
MODEL = ["bench", "model", "--model", "smollm2", "--context", "3,5", "--decode-tokens", 2, "--topk", 8, "--window", 8]

TRAIN = ["bench", "train", "--seqlen", "40,24", "--steps", 2, "run.threads=1", "model.vocab_size=96", "model.num_layers=1",
         "model.dim=32", "model.ffn_dim=48", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
         "attention.topk=8", "attention.window_size=8"]


@pytest.mark.parametrize("options", [[], ["--backward", "--dtype", "f32"], ["--scores", "rising", "--sinks", 2, "--no-dense"]],
                         ids=["forward", "backward", "rising"])
def test_attention(options):
    result = run(*ATTENTION, *options, "--json")
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    assert [row["seqlen"] for row in found["results"]] == [70, 64]
    for row in found["results"]:
        assert 0 < row["sparsek"]["min_ms"] <= row["sparsek"]["median_ms"] <= row["sparsek"]["max_ms"]
        assert ("dense" in row) == ("--no-dense" not in options)
    table = run(*ATTENTION, *options).stdout.decode().splitlines()
    assert len(table) == 3 and table[0].split()[0] == "tokens" and table[1].split()[0] == "70"


def test_model():
    result = run(*MODEL, "--json")
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    assert [row["context"] for row in found["results"]] == [3, 5]
    assert all(row["read_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in found["results"])
    assert len({row["state_bytes"] for row in found["results"]}) == 1
    assert len(run(*MODEL).stdout.splitlines()) == 3


def test_documents_side_by_side_of_a_shape(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("bench", "model", "--model", tmp_path / "config.json", "--random-weights", "--context", "5,20", "--batch", "1,3,3",
                 "--decode-tokens", 4, "--repeats", 2, "--topk", 8, "--window", 8, "--json")
    assert result.returncode == 0, result.stderr.decode()
    rows = json.loads(result.stdout)["results"]
    assert [(row["context"], row["batch"]) for row in rows] == [(5, 3), (5, 1), (20, 3), (20, 1)]
    assert rows[0]["state_bytes"] == 3 * rows[1]["state_bytes"]
    for row in rows:
        assert 0 < row["decode_step_ms"]["min"] <= row["decode_step_ms"]["median"] <= row["decode_step_ms"]["max"]
        assert 0 < row["read_seconds"]["min"] <= row["read_seconds"]["max"]
    fails(1, "bench", "model", "--model", tmp_path, "--random-weights", mentions=[str(tmp_path)])


@pytest.mark.parametrize("kind", ["sparsek", "window", "dense"])
def test_train(kind):
    result = run(*TRAIN, f"attention.kind={kind}", "--json")
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    assert found["attention"] == kind and [row["seqlen"] for row in found["results"]] == [24, 40]
    for row in found["results"]:
        rates = row["tokens_per_second"]
        assert 0 < rates["min"] <= rates["median"] <= rates["max"] and row["timed_steps"] == 2
        assert 4 < row["loss"] < 5.5 and row["peak_memory_bytes"] > 0  # ln 96 = 4.56
    assert len(run(*TRAIN, f"attention.kind={kind}").stdout.splitlines()) == 3


@pytest.mark.parametrize("command, options, mentions", [
    (ATTENTION, ["--scores", "falling"], ["--scores", "falling", "rising"]),
    (ATTENTION, ["--repeats", "0"], ["--repeats", "0"]),
    (ATTENTION, ["--heads", "4", "--kv-heads", "3"], ["--heads", "4", "3"]),
    (ATTENTION, ["--kv-heads", "0"], ["--kv-heads", "0"]),
    (ATTENTION, ["--heads", "-9"], ["--heads", "-9"]),
    (ATTENTION, ["--topk", "0"], ["--topk", "0"]),
    (ATTENTION, ["--window", "0"], ["--window", "0"]),
    (ATTENTION, ["--sinks", "-1"], ["--sinks", "-1"]),
    (ATTENTION, ["--head-dim", "12"], ["--head-dim", "12"]),
    (ATTENTION, ["--head-dim", "264"], ["--head-dim", "264"]),
    (ATTENTION, ["--seqlen", "0"], ["--seqlen", "0"]),
    (ATTENTION, ["--seqlen", "64,-1"], ["--seqlen", "-1"]),
    (ATTENTION, ["--topk", "1048577"], ["--topk", "1048577", "1048576"]),
    (ATTENTION, ["--window", "1048577"], ["--window", "1048577", "1048576"]),
    (ATTENTION, ["--sinks", "1048577"], ["--sinks", "1048577", "1048576"]),
    (ATTENTION, ["--seqlen", "64,16777217"], ["--seqlen", "16777217", "16777216"]),
    (ATTENTION, ["--heads", "2048"], ["--heads", "2048", "1024"]),
    (ATTENTION, ["--repeats", "1000001"], ["--repeats", "1000001"]),
    (ATTENTION, ["--threads", "4294967297"], ["--threads", "4294967297"]),
    (ATTENTION, ["--dtype", "f8"], ["--dtype", "f8"]),
    (ATTENTION, ["--threads", "-1"], ["--threads", "-1"]),
    (ATTENTION, ["--context", "8"], ["--context"]),
    (MODEL, ["--context", "8,0"], ["--context", "0"]),
    (MODEL, ["--decode-tokens", "0"], ["--decode-tokens", "0"]),
    (MODEL, ["--repeats", "0"], ["--repeats", "0"]),
    (MODEL, ["--batch", "1,0"], ["--batch", "0"]),
    (MODEL, ["--batch", "65537"], ["--batch", "65537", "65536"]),
    (["bench", "model", "--model", "smollm2", "--attention", "dense"], ["--batch", "2"], ["--batch", "sparsek", "dense"]),
    (MODEL, ["--chunk", "0"], ["--chunk", "0"]),
    (MODEL, ["--threads", "2000"], ["--threads", "2000"]),
    (MODEL, ["--dtype", "f8"], ["--dtype", "f8"]),
    (MODEL, ["--topk", "0"], ["--topk", "0"]),
    (MODEL, ["--sinks", "-1"], ["--sinks", "-1"]),
    (MODEL, ["--gate", "open"], ["--gate", "open"]),
    (MODEL, ["--slope", "-1"], ["--slope", "-1"]),
    (MODEL, ["--attention", "dense"], ["--topk"]),
    (TRAIN, ["--seqlen", "0"], ["--seqlen", "0"]),
    (TRAIN, ["--steps", "1"], ["--steps", "1"]),
    (TRAIN, ["--backends", "fast"], ["--backends", "fast", "flash"]),
    (TRAIN, ["attention.topc=8"], ["attention.topc", "attention.topk"]),
    (TRAIN, ["recurrent.chunk=8"], ["recurrent.chunk", "8"]),
    (["bench"], [], []),
], ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) and value and value[0].startswith("--") else "")
def test_wrong_usage_exits_2(command, options, mentions):
    replaced = [option for option in options if option.startswith("--")]
    kept = [part for i, part in enumerate(command) if part not in replaced and (i == 0 or command[i - 1] not in replaced)]
    fails(2, *kept, *options, mentions=mentions)
