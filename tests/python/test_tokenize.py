"""A corpus to token shards: the ids, the order, the same bytes however the run went, and what is wrong with inputs."""
import gzip
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tokenizers
from program import PROGRAM, ROOT, TEXT, fails, run
from shards import documents, manifest, read_shards, same_bytes
from test_tokenizer import generated, smollm2  # noqa: F401  (a fixture)

END = 0  # <|endoftext|> of SmolLM2
# GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
PRINTABLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
ALPHABET = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def tokenize(out, *inputs, code=0, **options):
    words = [word for name, value in options.items() for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [value]))]
    result = run("tokenize", *inputs, "--model", "smollm2", "--out", out, *words)
    assert result.returncode == code, result.stderr.decode()
    return result


def write_lines(path, rows, **dump):
    path.write_text("".join(json.dumps(row, **dump) + "\n" for row in rows))
    return path


def words(seed, size):
    """Text whose pieces do not repeat."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(size // 6))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some MB of every kind of input; what they hold in order as the second value."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "b" / "deep").mkdir(parents=True)
    texts = []
    rows = [{"id": i, "text": generated(random.Random(i), 30 * i).replace("<|", "<") or "x", "meta": {"text": "not this", "list": [1, -2.5e3, None]}}
            for i in range(60)]
    write_lines(folder / "a.jsonl", rows)
    texts += [row["text"] for row in rows]
    (folder / "b" / "deep" / "long.txt").write_text(words(1, 2_600_000), newline="")
    texts.append(words(1, 2_600_000))
    (folder / "b" / "one.md").write_text("# One\n")
    texts.append("# One\n")
    (folder / "b" / "three.rst").write_text("")  # no document
    (folder / "b" / "two.txt.gz").write_bytes(gzip.compress(b"first member, ") + gzip.compress(b"second member\n") + bytes(20))
    texts.append("first member, second member\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        for i in range(3000):
            texts.append(words(i, 900))
            file.write(json.dumps({"text": texts[-1]}, ensure_ascii=False) + "\r\n\n")
    rows = [{"text": words(10_000 + i, 1500)} for i in range(1400)]
    write_lines(folder / "d.jsonl", rows)
    texts += [row["text"] for row in rows]
    (folder / "d.jsonl").write_text((folder / "d.jsonl").read_text().rstrip("\n"))  # no newline at the end
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "b" / "image.png").write_text("no text")
    return folder, texts


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    tokenize(out, corpus[0], shard_mib=1, threads=1)
    return out


def test_ids_and_documents_equal_tokenizers(corpus, shards, smollm2):  # noqa: F811
    tokenizer, _ = smollm2
    found = documents(shards)
    assert len(found) == len(corpus[1])
    encoded = tokenizer.encode_batch(corpus[1], add_special_tokens=False)
    for i, (ids, wanted) in enumerate(zip(found, encoded)):
        assert np.array_equal(ids, wanted.ids + [END]), f"document {i}"
    told = manifest(shards)
    assert told["documents"] == len(found) and told["tokens"] == sum(map(len, found)) and told["empty_documents"] == 1
    assert told["text_bytes"] == sum(len(text.encode()) for text in corpus[1])
    assert len(told["shards"]) > 8


def test_hashes_are_those_of_the_files(corpus, shards):
    for shard in manifest(shards)["shards"]:
        data = (shards / shard["file"]).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
    listing = (shards / "inputs.ndjson").read_bytes()
    assert hashlib.sha256(listing).hexdigest() == manifest(shards)["inputs"]["sha256"]
    lines = [json.loads(line) for line in listing.splitlines()]
    assert [line["path"] for line in lines] == sorted(line["path"] for line in lines)
    for line in lines:
        data = pathlib.Path(line["path"]).read_bytes()
        assert len(data) == line["bytes"]
        assert hashlib.sha256(data[line.get("begin", 0):line.get("end")]).hexdigest() == line["sha256"]
    assert sum(line["documents"] for line in lines) == manifest(shards)["documents"]
    ranges = [(line["begin"], line["end"]) for line in lines if line["path"].endswith("d.jsonl")]
    assert len(ranges) > 1 and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(corpus, shards, tmp_path, threads):
    tokenize(tmp_path / "out", corpus[0], shard_mib=1, threads=threads)
    assert same_bytes(shards, tmp_path / "out")


def test_shard_size_changes_no_token(corpus, shards, tmp_path):
    tokenize(tmp_path / "out", corpus[0])
    assert len(manifest(tmp_path / "out")["shards"]) == 1
    for a, b in zip(read_shards(shards), read_shards(tmp_path / "out")):
        assert np.array_equal(a, b)


def start(out, corpus, threads=2):
    return subprocess.Popen([str(PROGRAM), "tokenize", str(corpus), "--model", "smollm2", "--out", str(out), "--shard-mib", "1",
                             "--threads", str(threads)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(out):
    """The shards that a record says are finished, as (inode, time)."""
    names = [p.name.removesuffix(".json") for p in (out / "progress").glob("0*.json")]
    return {name: (s.st_ino, s.st_mtime_ns) for name in names if (p := out / f"shard-{name}.tokens").exists() and (s := p.stat())}


def test_killed_at_any_moment_the_shards_are_the_same(corpus, shards, tmp_path):
    rng = random.Random(2406)
    begin = time.monotonic()
    tokenize(tmp_path / "whole", corpus[0], shard_mib=1)
    duration = time.monotonic() - begin  # the moments follow the machine's speed
    kills = 0
    for attempt in range(7):
        out = tmp_path / f"{attempt}"
        before = {}
        for _ in range(6):
            process = start(out, corpus[0], threads=rng.choice([1, 2, 3]))
            time.sleep(rng.random() * duration)
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if (out / "manifest.json").exists():
                break
            now = finished(out)
            assert before.items() <= now.items()  # what was finished is not made again
            before = now
        result = tokenize(out, corpus[0], shard_mib=1, json=True)
        assert json.loads(result.stdout)["resumed_shards"] >= len(before)
        assert same_bytes(shards, out)
    assert kills >= 3  # else the moments were all too late, and nothing was tested


def test_goes_on_inside_a_document(corpus, shards, tmp_path):
    """Killed when two of the three shards of one document are there."""
    for threads in (1, 2):
        out = tmp_path / f"{threads}"
        process = start(out, corpus[0] / "b" / "deep")
        while len(finished(out) if (out / "progress").exists() else {}) < 2 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        tokenize(out, corpus[0] / "b" / "deep", shard_mib=1, threads=threads)
    assert same_bytes(tmp_path / "1", tmp_path / "2")
    tokens, begins, _ = read_shards(tmp_path / "1")
    assert begins.tolist() == [0] and len(manifest(tmp_path / "1")["shards"]) == 3
    assert np.array_equal(tokens, documents(shards)[60])


def test_interrupted_it_says_so_and_goes_on(corpus, shards, tmp_path):
    process = start(tmp_path / "out", corpus[0], threads=1)
    while not (tmp_path / "out" / "progress" / "job.json").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"", err
    assert err.count(b"\n") == 1 and b"interrupted" in err and b"again" in err
    assert not list((tmp_path / "out").rglob("*.part"))
    tokenize(tmp_path / "out", corpus[0], shard_mib=1)
    assert same_bytes(shards, tmp_path / "out")


def test_a_full_disk_loses_nothing_finished(tmp_path):
    """A limit on the size of files stands for the disk: the first file's shard is under it, the second's is not."""
    small, large = tmp_path / "a.txt", tmp_path / "b.txt"
    small.write_text(words(1, 900_000))
    large.write_text(words(2, 3_000_000))
    command = [str(PROGRAM), "tokenize", str(small), str(large), "--model", "smollm2", "--out", str(tmp_path / "out"), "--shard-mib", "2"]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    result = subprocess.run([*command, "--threads", "1"], capture_output=True, timeout=60, preexec_fn=limit)
    assert result.returncode == 1 and result.stdout == b""
    assert result.stderr.count(b"\n") == 1 and b"shard-000001" in result.stderr and b"kept" in result.stderr, result.stderr
    assert list(finished(tmp_path / "out")) == ["000000-0000"] and not list((tmp_path / "out").rglob("*.part"))
    again = json.loads(subprocess.run([*command, "--json"], capture_output=True, timeout=60).stdout)
    assert again["resumed_shards"] == 1
    tokenize(tmp_path / "direct", small, large, shard_mib=2)
    assert same_bytes(tmp_path / "out", tmp_path / "direct")


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small disk")
    try:
        (tmp_path / "a.txt").write_text(words(1, 9_000_000))
        message = fails(1, "tokenize", tmp_path / "a.txt", "--model", "smollm2", "--out", disk / "out", "--shard-mib", 1,
                        mentions=["No space left", "kept"])
        assert message and finished(disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_finished_folder_is_left_alone(corpus, shards, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    result = tokenize(shards, corpus[0], shard_mib=1)
    assert b"nothing to do" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in shards.iterdir()} == before
    fails(1, "tokenize", corpus[0], "--model", "smollm2", "--out", shards, "--shard-mib", 2, mentions=["shard_bytes", "2097152", "1048576"])
    fails(1, "tokenize", corpus[0] / "a.jsonl", "--model", "smollm2", "--out", shards, "--shard-mib", 1, mentions=["inputs"])
    fails(1, "tokenize", corpus[0], "--model", "smollm2", "--out", corpus[0], mentions=["empty folder"])
    assert {p: p.stat().st_mtime_ns for p in shards.iterdir()} == before


def test_two_runs_at_once_are_refused(corpus, tmp_path):
    process = start(tmp_path / "out", corpus[0], threads=1)
    while not (tmp_path / "out" / "progress" / "job.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    fails(1, "tokenize", corpus[0], "--model", "smollm2", "--out", tmp_path / "out", "--shard-mib", 1, mentions=["another run"])
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0


def test_memory_does_not_grow_with_a_document(tmp_path):
    """One document, and one line, of 64 MB."""
    text = words(3, 1_000_000) + "\n"
    (tmp_path / "long.txt").write_text(text * 64)
    write_lines(tmp_path / "line.jsonl", [{"text": text * 64}])
    found = {}
    (tmp_path / "short.txt").write_text(text * 4)
    for name, shards in (("short.txt", 1), ("long.txt", 16), ("line.jsonl", 16)):
        found[name] = json.loads(tokenize(tmp_path / name[:4], tmp_path / name, shard_mib=4, threads=1, json=True).stdout)
        assert found[name]["documents"] == 1 and found[name]["shards"] == shards
    peaks = [f["peak_rss_bytes"] >> 20 for f in found.values()]
    assert max(peaks) < peaks[0] + 16, peaks
    assert np.array_equal(read_shards(tmp_path / "long")[0], read_shards(tmp_path / "line")[0])


def test_options_of_documents(tmp_path, smollm2):  # noqa: F811
    tokenizer, _ = smollm2
    text_of = lambda ids: b"".join(bytes([ALPHABET[c] for c in tokenizer.id_to_token(int(i))]) for i in ids).decode()  # noqa: E731
    rows = [{"body": "a<|im_start|>b"}, {"body": "\ud83d alone \udc00 and \U0001f469"}, {"body": ""}]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    tokenize(tmp_path / "text", tmp_path / "a.jsonl", field="body")
    first, second = documents(tmp_path / "text")
    assert text_of(first[:-1]) == "a<|im_start|>b" and 1 not in first.tolist() and first[-1] == END
    assert text_of(second[:-1]) == "\ufffd alone \ufffd and \U0001f469"
    assert manifest(tmp_path / "text")["empty_documents"] == 1
    tokenize(tmp_path / "parsed", tmp_path / "a.jsonl", field="body", parse_special=True, end_token="<|im_end|>")
    assert documents(tmp_path / "parsed")[0].tolist() == tokenizer.encode("a<|im_start|>b").ids + [2]
    tokenize(tmp_path / "bare", tmp_path / "a.jsonl", field="body", end_token="none")
    assert END not in read_shards(tmp_path / "bare")[0].tolist()


def test_inputs_by_pattern_suffix_and_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.py", "d.txt.bak"):
        (tmp_path / name).write_text(name)
    def texts(out):
        return [json.loads(line)["path"].rsplit("/", 1)[1] for line in (tmp_path / out / "inputs.ndjson").read_text().splitlines()]
    tokenize(tmp_path / "1", f"{tmp_path}/*.t?t", f"{tmp_path}/a.txt")
    assert texts("1") == ["a.txt", "b.txt"]
    tokenize(tmp_path / "2", tmp_path / "b.txt", f"{tmp_path}/*", suffix=".py")
    assert texts("2") == ["b.txt", "a.txt", "c.py"]
    fails(1, "tokenize", tmp_path / "c.py", "--model", "smollm2", "--out", tmp_path / "3", mentions=["c.py", "--suffix"])
    fails(1, "tokenize", f"{tmp_path}/*.rst", "--model", "smollm2", "--out", tmp_path / "3", mentions=["*.rst", "match"])
    assert not (tmp_path / "3").exists()


def test_a_tokenizer_file_and_a_model_are_one_tokenizer(tmp_path, smollm2):  # noqa: F811
    tokenizer, _ = smollm2
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(TEXT)
    tokenize(tmp_path / "model", tmp_path / "a.txt")
    result = run("tokenize", tmp_path / "a.txt", "--model", tmp_path / "tokenizer.json", "--out", tmp_path / "file")
    assert result.returncode == 0, result.stderr.decode()
    assert same_bytes(tmp_path / "model", tmp_path / "file")


@pytest.mark.parametrize("line, mentions", [
    (b'{"text": "a"', ["end of the line"]),
    (b'{"text": "a"} x', ["'x'"]),
    (b'{"text": 7}', ["'text'", "'7'"]),
    (b'{"text": null}', ["'text'", "string"]),
    (b'{"other": "a"}', ["'text'", "none"]),
    (b'{"text": "a", "text": "b"}', ["'text'", "twice"]),
    (b'["text"]', ["object"]),
    (b'{"text": "\\x"}', ["escape"]),
    (b'{"text": "a\tb"}', ["control", "\\x09"]),
    (b'{"a": 01, "text": "b"}', ["'1'"]),
    (b'{"a": ' + b"[" * 100 + b"]" * 100 + b', "text": "b"}', ["nested", "64"]),
])
def test_bad_lines(tmp_path, line, mentions):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    message = fails(1, "tokenize", path, "--model", "smollm2", "--out", tmp_path / "out", mentions=["bad.jsonl, line 3", *mentions])
    assert "\t" not in message
    tokenize(tmp_path / "skipped", path, skip_bad_lines=True)
    assert manifest(tmp_path / "skipped")["skipped_lines"] == 1 and len(documents(tmp_path / "skipped")) == 2
    path.write_bytes(b'{"text": "first"}\n')
    tokenize(tmp_path / "out", path)  # nothing was finished, so the folder serves for what was mended


def test_the_line_is_named_in_a_file_that_is_split(tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [json.dumps({"text": words(i, 1000)}) for i in range(4000)]
    rows[3456] = '{"text": "broken}'
    path.write_text("\n".join(rows))
    fails(1, "tokenize", path, "--model", "smollm2", "--out", tmp_path / "out", "--shard-mib", 1, mentions=["long.jsonl, line 3457:"])


def test_bad_corpora_exit_1(tmp_path):
    def refused(*inputs, mentions):
        fails(1, "tokenize", *inputs, "--model", "smollm2", "--out", tmp_path / "out", mentions=mentions)
    refused(tmp_path / "none.txt", mentions=["none.txt", "No such file"])
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", mentions=["empty", ".jsonl", "none"])
    refused("", mentions=["empty path"])
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "empty" / "b.jsonl").write_text("\n\n")
    refused(tmp_path / "empty", mentions=["at least one document", "1 empty document"])
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", mentions=["pipe.txt", "regular file"])
    refused("-", mentions=["-"])
    packed = gzip.compress(words(1, 50_000).encode())
    for name, data, problem in (("plain", b"no gzip", "gzip"), ("short", packed[:-3000], "truncated"), ("sum", packed[:-5] + b"12345", "damaged"),
                                ("nothing", b"", "empty"), ("rest", packed + b"rest", "damaged")):
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(data)
        refused(path, mentions=[path.name, problem])
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "a file").write_text("x")
    fails(1, "tokenize", tmp_path / "good.txt", "--model", "smollm2", "--out", tmp_path / "a file", mentions=["a file"])
    if os.geteuid() != 0:
        (tmp_path / "good.txt").chmod(0)
        refused(tmp_path / "good.txt", mentions=["good.txt", "denied"])


def test_wrong_usage(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    def refused(*options, mentions):
        fails(2, "tokenize", tmp_path / "a.txt", "--model", "smollm2", *options, mentions=mentions)
    refused(mentions=["--out"])
    refused("--out", "", mentions=["--out", "empty"])
    refused("--out", tmp_path / "o", "--threads", "-1", mentions=["--threads", "-1"])
    refused("--out", tmp_path / "o", "--shard-mib", "0", mentions=["--shard-mib", "0"])
    refused("--out", tmp_path / "o", "--end-token", "<stop>", mentions=["--end-token", "<stop>"])
    fails(2, "tokenize", mentions=["inputs"])
    assert not (tmp_path / "o").exists()


def test_a_file_that_changes_is_noticed(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(words(1, 9_000_000))
    process = start(tmp_path / "out", f"{tmp_path}/?.txt", threads=1)
    while not finished(tmp_path / "out"):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (tmp_path / "b.txt").write_text(words(2, 9_000_000))
    fails(1, "tokenize", f"{tmp_path}/?.txt", "--model", "smollm2", "--out", tmp_path / "out", "--shard-mib", 1, mentions=["inputs", "another"])


def test_inspect_counts_and_verifies(corpus, shards, tmp_path):
    lengths = [len(ids) for ids in documents(shards)]
    found = json.loads(run("inspect", shards, "--json").stdout)
    assert found["documents"] == len(lengths) and found["tokens"] == sum(lengths) and found["verified"] is False
    assert found["length"] == {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)}
    for row in found["lengths"]:
        inside = [length for length in lengths if row["from"] <= length < row["to"]]
        assert row["documents"] == len(inside) and row["tokens"] == sum(inside)
    assert sum(row["documents"] for row in found["lengths"]) == len(lengths)
    result = run("inspect", shards, "--verify", "--model", "smollm2")
    assert result.returncode == 0 and b"hashes are right" in result.stdout
    for i in (60, 61):
        assert run("inspect", shards, "--model", "smollm2", "--document", i).stdout.decode() == corpus[1][i] + "<|endoftext|>"


def test_inspect_refuses_what_is_damaged_or_of_another_model(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    victim = copy / manifest(copy)["shards"][2]["file"]
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    assert run("inspect", copy).returncode == 0  # what no header shows
    wanted = manifest(copy)["shards"][2]["sha256"]
    fails(1, "inspect", copy, "--verify", mentions=[victim.name, "sha256", wanted, hashlib.sha256(data).hexdigest()])
    victim.write_bytes(data[:-8])
    fails(1, "inspect", copy, mentions=[victim.name, "truncated"])
    victim.unlink()
    fails(1, "inspect", copy, mentions=[victim.name, "No such file"])
    other = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(ALPHABET))}, []))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = tokenizers.decoders.ByteLevel()
    other.save(str(tmp_path / "tokenizer.json"))
    fails(1, "inspect", shards, "--model", tmp_path / "tokenizer.json",
          mentions=["tokenizer.json", "vocabulary 256", "vocabulary 49152", manifest(shards)["job"]["tokenizer"]["sha256"]])
    fails(1, "inspect", tmp_path, mentions=["manifest.json", "sparsek tokenize"])
    fails(2, "inspect", mentions=["--model", "neither"])
    fails(2, "inspect", "--model", "smollm2", "--verify", mentions=["shards"])
    fails(2, "inspect", shards, "--document", 0, mentions=["--document", "--model"])
    fails(2, "inspect", shards, "--model", "smollm2", "--document", 10**6, mentions=["--document", "4462"])


def test_examples_of_help_and_docs_run(tmp_path):
    for name in ("docs", "README.md", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [found for command in ("tokenize", "inspect")
                for found in re.findall(r"^ +sparsek ([a-z]+ .*)$", run(command, "--help").stdout.decode(), re.MULTILINE)]
    assert len(commands) >= 5
    documented = re.findall(r"^    sparsek (.*)$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert len(documented) >= 2
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXT}).encode()))
    for command in [*commands, *(command.replace("shards", "documented") for command in documented)]:
        environment = os.environ | {"VIRTUAL_ENV": str(ROOT / ".venv")}
        result = subprocess.run([str(PROGRAM), *shlex.split(command)], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert result.returncode == 0, result.stderr.decode()
