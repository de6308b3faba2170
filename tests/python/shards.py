"""Token shards read with numpy alone, by docs/data.md."""
import json
import pathlib

import numpy as np

HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("token_bytes", "<u4"), ("vocab_size", "<i8"), ("num_tokens", "<i8"),
                   ("num_documents", "<i8"), ("tokenizer", "S64"), ("reserved", "S24")])


def read_shard(path):
    data = pathlib.Path(path).read_bytes()
    header = np.frombuffer(data, HEADER, 1)[0]
    assert header["magic"] == b"SPKTOKEN" and header["version"] == 1
    tokens = np.frombuffer(data, f"<u{header['token_bytes']}", header["num_tokens"], HEADER.itemsize).astype(np.int32)
    at = HEADER.itemsize + (tokens.size * int(header["token_bytes"]) + 7) // 8 * 8
    begins = np.frombuffer(data, "<i8", header["num_documents"], at)
    keys = np.frombuffer(data, "<u8", header["num_documents"], at + begins.nbytes)
    assert at + begins.nbytes + keys.nbytes == len(data)
    return tokens, begins, keys


def read_shards(folder):
    """(tokens of all shards, begins of all documents in them, keys)."""
    shards = [read_shard(pathlib.Path(folder) / shard["file"]) for shard in manifest(folder)["shards"]]
    offsets = np.cumsum([0] + [tokens.size for tokens, _, _ in shards])
    return (np.concatenate([tokens for tokens, _, _ in shards]),
            np.concatenate([begins + offset for (_, begins, _), offset in zip(shards, offsets)]),
            np.concatenate([keys for _, _, keys in shards]))


def documents(folder):
    tokens, begins, _ = read_shards(folder)
    return np.split(tokens, begins[1:])


def manifest(folder):
    return json.loads((pathlib.Path(folder) / "manifest.json").read_text())


def same_bytes(a, b):
    """The two folders hold the same files."""
    names = [sorted(p.relative_to(x).as_posix() for p in pathlib.Path(x).rglob("*")) for x in (a, b)]
    return names[0] == names[1] and all((pathlib.Path(a) / n).read_bytes() == (pathlib.Path(b) / n).read_bytes() for n in names[0])
