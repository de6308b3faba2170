"""GGUF and safetensors readers against PyPI gguf and safetensors: names, shapes and every type's values."""

import json

import gguf
import numpy as np
import pytest
import torch
from data_tool import data_tool
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file


def random_blocks(type_, shape, seed):
    """Blocks with every bit random but the scales: those are finite halves of ordinary size."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rows = np.prod(shape[:-1], dtype=np.int64)
    blocks = rng.integers(0, 256, (rows * shape[-1] // block, size), dtype=np.uint8)
    halves = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}
    for at in halves[type_]:
        scale = rng.normal(0, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def floats(type_, shape, seed):
    values = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    values.flat[:4] = [0.0, -0.0, 1e-39, 65504.0]  # a value that is subnormal in float32, and half's largest
    return gguf.quantize(values, type_)


def write_gguf(path, tensors, alignment=32):
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values(path, name, shape):
    return np.frombuffer(data_tool("values", path, name).stdout, dtype="<f4").reshape(shape)


QUANTISED = [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]


@pytest.mark.parametrize("type_", [Type.F32, Type.F16, Type.BF16, *QUANTISED], ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(512,), (3, 768), (2, 5, 256)])
def test_values_equal_gguf(tmp_path, type_, shape):
    path = tmp_path / "m.gguf"
    make = random_blocks if type_ in QUANTISED else floats
    data = make(type_, shape, seed=len(shape))
    write_gguf(path, {"before": (np.ones(3, dtype=np.float32), Type.F32), "x": (data, type_)}, alignment=64)
    lines = data_tool("tensors", path).stdout.decode().splitlines()
    assert lines == ["before\tF32\t[3]", f"x\t{type_.name}\t[{', '.join(map(str, shape))}]"]
    wanted = gguf.dequantize(data, type_).reshape(shape)
    np.testing.assert_array_equal(values(path, "x", shape), wanted)


def test_type_without_support_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"odd": (np.zeros((2, 22), dtype=np.uint8), Type.Q5_0)})
    result = data_tool("tensors", path, check=False)
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1
    assert "m.gguf" in message and "odd" in message and "Q5_0" in message


def checkpoint(path, shards):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map.update({tensor: name for tensor in tensors})
    if len(shards) > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("num_shards", [1, 3])
def test_safetensors_values(tmp_path, num_shards):
    torch.manual_seed(0)
    shards = [
        {f"{i}.{dtype}": torch.randn(3, 5 + i).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
        for i in range(num_shards)
    ]
    path = checkpoint(tmp_path / "model", shards)
    for tensors in shards:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(values(path, name, tuple(tensor.shape)), tensor.float().numpy())


def refused(path, *words):
    result = data_tool("tensors", path, check=False)
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1, message
    for word in words:
        assert word in message


def test_checkpoint_that_cannot_be_used_is_named(tmp_path):
    refused(tmp_path / "none", "none", "config.json")
    path = checkpoint(tmp_path / "model", [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    (tmp_path / "outside.safetensors").write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "", 7):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(path, "index.json", "'a'", "in this folder")
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    refused(path, "model-00002", "'a'")
    index.write_text(good[: len(good) // 2])
    refused(path, "index.json", "JSON")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(path, "index.json", "weight_map")
    index.write_text(good)
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, "model-00002")
    index.unlink()
    refused(path, "model.safetensors")
    (path / "config.json").write_text("[]")
    refused(path, "config.json", "object")
    (path / "config.json").unlink()
    refused(path, "config.json")


def test_tensor_of_another_dtype_is_named(tmp_path):
    path = checkpoint(tmp_path / "model", [{"counts": torch.arange(3), "x": torch.ones(2)}])
    refused(path, "counts", "I64")
    np.testing.assert_array_equal(values(path, "x", (2,)), [1, 1])
