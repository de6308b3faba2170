"""Writes small seed inputs for the fuzz targets, a folder for each, under the folder given."""

import pathlib
import struct
import sys

import gguf
import numpy as np
from safetensors.numpy import save
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def write_gguf(path, pre, with_tensors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:60], "th", "<|im_start|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 61 + [3])
    writer.add_token_merges(["t h"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(61)
    writer.add_chat_template(CHATML)
    if with_tensors:
        writer.add_tensor("norm", np.ones(8, dtype=np.float32))
        types = gguf.GGMLQuantizationType
        for type_ in (types.Q4_1, types.Q8_0, types.Q6_K):
            _, size = gguf.GGML_QUANT_SIZES[type_]
            writer.add_tensor(type_.name, np.ones((2, size), dtype=np.uint8), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(path, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>", "<|im_start|>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat 12 12\n"], trainer)
    tokenizer.save(str(path), pretty=False)


def main(folder):
    for name in ("gguf", "safetensors", "tokenizer_json", "bpe", "shard", "json_line"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, pre in enumerate(("gpt-2", "smollm", "llama-bpe", "qwen2")):
        write_gguf(folder / "gguf" / f"{pre}.gguf", pre, with_tensors=i % 2 == 0)

    arrays = {"a": np.ones((2, 3), dtype=np.float32), "b": np.ones(4, dtype=np.float16), "c": np.arange(2)}
    (folder / "safetensors" / "plain").write_bytes(save(arrays, metadata={"format": "pt"}))
    (folder / "safetensors" / "empty").write_bytes(save({}))

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    write_tokenizer(folder / "tokenizer_json" / "gpt2", byte_level)
    digits = pre_tokenizers.Digits(individual_digits=True)
    write_tokenizer(folder / "tokenizer_json" / "smollm", pre_tokenizers.Sequence([digits, byte_level]))
    for name, numbers in (("llama3", "{1,3}"), ("qwen2", "")):
        split = pre_tokenizers.Split(Regex(WORDS % numbers), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        write_tokenizer(folder / "tokenizer_json" / name, pre_tokenizers.Sequence([split, plain]), normalizers.NFC())
    (folder / "tokenizer_json" / "template").write_text(CHATML)

    texts = [
        "the cat's 12345 they'll  \n\n x", "e\u0301 \u1100\u1161\u11a8 \u304b\u3099 \u0e01\u0e33",
        "\U0001f468\u200d\U0001f469",
        "<|end|><|end|>><|en", "aaaaaaaaaaaaaaaaaaaaaaaaa the", "\u00a0\u2028 \t\r\n\u180e", "\0\x7f",
    ]  # fmt: skip
    for i, text in enumerate(texts):
        for kind in range(5):
            (folder / "bpe" / f"{i}-{kind}").write_bytes(bytes([kind + 5 * i]) + text.encode())
    for token_bytes, vocabulary in ((2, 300), (4, 70000)):
        header = struct.pack("<8sIIqqq64s24x", b"SPKTOKEN", 1, token_bytes, vocabulary, 3, 2, b"a" * 64)
        tokens = np.array([1, 2, 299], dtype=f"<u{token_bytes}").tobytes()
        ends = struct.pack("<qqQQ", 0, 2, 5, 6)
        (folder / "shard" / f"u{token_bytes}").write_bytes(header + tokens.ljust(-(-len(tokens) // 8) * 8, b"\0") + ends)
    lines = [
        r'{"text": "a\ud83d\ude00\n", "n": [1, -0.5e+3, true, null, {"text": ""}]}', r'{"te\u0078t":"\ud83d"}', " ",
    ]  # fmt: skip
    for i, line in enumerate(lines):
        (folder / "json_line" / f"{i}").write_bytes(bytes([i]) + line.encode())
    (folder / "bpe" / "invalid").write_bytes(b"\x07\xe2\x82\xff\xed\xa0\x80a\xf0\x9f")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
