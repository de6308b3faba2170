"""Models, adapters and texts that do not fit together, the BOS rule, and Ctrl-C while writing."""
import json
import os
import signal
import subprocess

import gguf
import pytest
import tokenizers
from program import PROGRAM, TEXT, fails, run, write_adapter
from test_parity import SIZES, tiny_model, write_gguf


def vocabulary(size):
    """Every byte, one merge, and fillers."""
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + ["th"]
    return tokens + [f"<filler {i}>" for i in range(size - len(tokens))]


def add_tokenizer(size, add_bos=False):
    """For write_gguf's `extra`. Token 300 is BOS."""
    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary(size))
        writer.add_token_types([1] * size)
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(300)
        writer.add_add_bos_token(add_bos)
    return extra


@pytest.mark.parametrize("command", [["perplexity"], ["generate", "--file"]], ids=["perplexity", "generate"])
def test_a_tokenizer_of_another_model_exits_1(tmp_path, text, command):
    size = SIZES["vocab_size"]
    write_gguf(tmp_path / "more.gguf", tiny_model("llama"), extra=add_tokenizer(size + 5))
    fails(1, *command, text, "--model", tmp_path / "more.gguf", mentions=["more.gguf", str(size), str(size + 5)])
    folder = tmp_path / "folder"
    tiny_model("llama").save_pretrained(folder)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary(size + 5))}, [("t", "h")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    fails(1, *command, text, "--model", folder, mentions=[str(folder), str(size), str(size + 5)])
    write_gguf(tmp_path / "padded.gguf", tiny_model("llama"), extra=add_tokenizer(size - 5))  # more rows than tokens: padding
    assert run("perplexity", text, "--model", tmp_path / "padded.gguf", "--max-tokens", 8).returncode == 0


def test_bos_stands_before_what_is_read(tmp_path):
    whole, rest = tmp_path / "whole.txt", tmp_path / "rest.txt"
    whole.write_text("z" * 100 + TEXT)
    rest.write_text(TEXT)
    found = {}
    for add_bos in (False, True):
        model = tmp_path / f"{add_bos}.gguf"
        write_gguf(model, tiny_model("llama"), extra=add_tokenizer(SIZES["vocab_size"], add_bos))
        read = lambda file, *options: json.loads(run("perplexity", file, "--model", model, "--json", *options).stdout)  # noqa: E731
        skipped, direct = read(whole, "--skip-tokens", 100), read(rest)
        assert skipped["loss"] == direct["loss"] and skipped["tokens"] == direct["tokens"]
        assert read(whole, "--skip-tokens", 100, "--max-tokens", 50)["tokens"] == 50  # BOS is one of them
        assert read(whole)["tokens"] == direct["tokens"] + 100
        found[add_bos] = direct
    assert found[True]["tokens"] == found[False]["tokens"] + 1 and found[True]["loss"] != found[False]["loss"]


@pytest.mark.parametrize("field, value", [("dim", 64), ("num_layers", 29), ("num_kv_heads", 1), ("vocab_size", 320),
                                          ("architecture", "qwen3")])
def test_an_adapter_of_another_model_exits_1(tmp_path, text, field, value):
    path = write_adapter(tmp_path / "other.safetensors", 0, **{field: value})
    for command in (["perplexity", text], ["generate", "--prompt", "x"], ["inspect"]):
        message = fails(1, *command, "--model", "smollm2", "--scorer", path, mentions=["other.safetensors", "another model", field])
        assert str(value) in message


def test_unreadable_texts_exit_1(tmp_path):
    fails(1, "generate", "--file", tmp_path, "--model", "smollm2", mentions=[str(tmp_path), "directory"])
    if os.geteuid() == 0:
        pytest.skip("root reads files of mode 000 too")
    path = tmp_path / "secret.txt"
    path.write_text(TEXT)
    path.chmod(0)
    fails(1, "perplexity", path, "--model", "smollm2", mentions=["secret.txt", "denied"])


def test_interrupt_while_writing(tmp_path):
    """What was written is whole and ends with a newline; one line says why it ended."""
    process = subprocess.Popen([str(PROGRAM), "generate", "--model", "smollm2", "--prompt", "Once upon a time", "--max-tokens",
                                "1000000", "--ignore-end"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = os.read(process.stdout.fileno(), 1)  # text arrives while it is written
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    text = (first + out).decode()
    assert text.endswith("\n") and len(text) > 1
    assert err.count(b"\n") == 1 and b"interrupted" in err
