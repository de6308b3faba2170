"""The program as its users meet it: output, exit codes, one-line errors, and nothing half-written."""
import json
import os
import pathlib
import resource
import signal
import struct
import subprocess
import time

import pytest
import torch
from program import MODEL, PROGRAM, TEXT, fails, run, write_adapter


def test_perplexity_prints_one_object(text):
    result = run("perplexity", text, "--model", "smollm2", "--json", "--topk", 60, "--window", 64)
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    assert {"tokens", "loss", "loss_by_position", "tokens_per_second", "state_bytes", "peak_rss_bytes", "attention"} <= set(found)
    buckets = found["loss_by_position"]
    assert buckets[0]["from"] == 0 and buckets[-1]["to"] == found["tokens"] and found["tokens"] > 1500
    assert all(a["to"] == b["from"] for a, b in zip(buckets, buckets[1:]))
    weights = [b["to"] - b["from"] - (b["from"] == 0) for b in buckets]  # token 0 is no target
    mean = sum(w * b["loss"] for w, b in zip(weights, buckets)) / sum(weights)
    assert abs(mean - found["loss"]) < 1e-9


def test_chunk_size_does_not_change_the_loss(text):
    losses = [json.loads(run("perplexity", text, "--model", "smollm2", "--json", "--dtype", "f32", "--topk", 60, "--window", 64,
                             "--max-tokens", 600, "--chunk", chunk).stdout)["loss"] for chunk in (512, 37)]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_skip_tokens_reads_what_follows(text):
    whole = json.loads(run("perplexity", text, "--model", "smollm2", "--json").stdout)["tokens"]
    rest = json.loads(run("perplexity", text, "--model", "smollm2", "--json", "--skip-tokens", 1000).stdout)["tokens"]
    assert rest == whole - 1000


def test_generate_from_standard_input_and_json():
    result = run("generate", "--model", "smollm2", "--file", "-", "--max-tokens", 8, "--json", stdin=b"The capital of France is")
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    assert found["text"].startswith(" Paris")
    assert found["generated_tokens"] == 8 and found["stop_reason"] == "max tokens"


def test_generate_same_seed_same_text():
    command = ["generate", "--model", "smollm2", "--prompt", "Once upon a time", "--max-tokens", 12, "--temperature", 1.2]
    assert run(*command, "--seed", 5).stdout == run(*command, "--seed", 5).stdout
    assert run(*command, "--seed", 5).stdout != run(*command, "--seed", 6).stdout


def test_generate_stops_at_a_stop_sequence():
    result = run("generate", "--model", "smollm2", "--prompt", "1, 2, 3, 4, 5, 6, 7,", "--max-tokens", 40, "--stop", "10", "--json")
    found = json.loads(result.stdout)
    assert "10" not in found["text"] and found["stop_reason"] == "stop sequence"


def test_chat_answers():
    result = run("generate", "--model", "smollm2", "--chat", "--prompt", "Say hello.", "--max-tokens", 16, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["generated_tokens"] > 0


def test_inspect_shows_the_plan():
    found = json.loads(run("inspect", "--model", "smollm2", "--json").stdout)
    assert found["architecture"] == "llama" and found["layers"] == 30
    states = {row["state_bytes"] for row in found["memory_plan"]}
    assert len(states) == 1  # the same at every length
    dense = [row["dense_cache_bytes"] for row in found["memory_plan"]]
    assert dense[1] == 16 * dense[0]
    assert run("inspect", "--model", "smollm2").returncode == 0


def test_slope_is_an_adapters_slope(tmp_path, text):
    command = ["perplexity", text, "--model", "smollm2", "--json", "--max-tokens", 500]
    losses = []
    for slope in (0, 7.5):
        untrained = json.loads(run(*command, "--topk", 60, "--window", 64, "--slope", slope).stdout)
        adapter = json.loads(run(*command, "--scorer", write_adapter(tmp_path / "a.safetensors", slope)).stdout)
        assert untrained["attention"] == f"sparsek topk 60 window 64 sinks 4 gate hard scorer window_mass slope {slope} far-distance 128"
        assert untrained["loss"] == adapter["loss"]
        losses.append(untrained["loss"])
    assert losses[0] != losses[1]


def test_slope_in_every_command():
    inspected = json.loads(run("inspect", "--model", "smollm2", "--json", "--scorer", "key_norm", "--slope", 0.5).stdout)
    assert "scorer key_norm slope 0.5 " in inspected["attention"]
    generated = run("generate", "--model", "smollm2", "--prompt", "x", "--max-tokens", 1, "--slope", 3, "--json")
    assert "slope 3 " in json.loads(generated.stdout)["attention"]
    timed = run("bench", "model", "--model", "smollm2", "--context", 4, "--decode-tokens", 1, "--slope", 0, "--json")
    assert "slope 0 " in json.loads(timed.stdout)["attention"]


def test_help_and_version():
    assert run("--help").returncode == 0
    assert run("generate", "--help").returncode == 0
    assert run("--version").stdout.strip()


@pytest.mark.parametrize("options, mentions", [
    (["--topk", "0"], ["--topk", "0"]),
    (["--window", "0"], ["--window", "0"]),
    (["--chunk", "0"], ["--chunk", "0"]),
    (["--sinks", "-1"], ["--sinks", "-1"]),
    (["--dtype", "f8"], ["--dtype", "f8", "bf16"]),
    (["--device", "tpu"], ["--device", "tpu", "cuda:N"]),
    (["--device", "cuda:"], ["--device", "cuda:", "cuda:N"]),
    (["--device", "cuda:-1"], ["--device", "cuda:-1"]),
    (["--device", "cuda:99"], ["--device", "found"]),
    (["--attention", "sparse"], ["--attention", "sparse", "sparsek"]),
    (["--gate", "open"], ["--gate", "open"]),
    (["--far-distance", "far"], ["--far-distance", "far", "off"]),
    (["--threads", "-2"], ["--threads", "-2"]),
    (["--max-tokens", "1"], ["--max-tokens", "1"]),
    (["--no-such-option"], ["--no-such-option"]),
    (["--topk", "many"], ["--topk", "'many'"]),
    (["--topk", "99999999999999999999"], ["--topk", "'99999999999999999999'"]),
    (["--topk", "8", "--topk", "9"], ["--topk"]),
    (["--topk"], ["--topk"]),
    (["--max-tokens", "9223372036854775807", "--attention", "dense"], ["--max-tokens", "'9223372036854775807'"]),
    (["--far-distance", "99999999999999999999"], ["--far-distance", "'99999999999999999999'"]),
    (["more.txt"], ["'more.txt'"]),
    (["--attention", "window", "--topk", "8"], ["--topk"]),
    (["--attention", "window", "--slope", "1"], ["--slope"]),
    (["--slope", "-1"], ["--slope", "-1"]),
    (["--slope", "nan"], ["--slope", "nan"]),
    (["--slope", "1", "--scorer", "a.safetensors"], ["--slope", "adapter"]),
])
def test_wrong_usage_exits_2(text, options, mentions):
    fails(2, "perplexity", text, "--model", "smollm2", *options, mentions=mentions)


def test_a_gpu_that_cannot_be_used(text):
    """What is missing and what to do: a torch with CUDA, a driver and its GPU, or our kernels."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for command in (["perplexity", text], ["generate", "--file", text], ["bench", "model"]):
        message = fails(2, *command, "--model", "smollm2", "--device", "cuda", mentions=["--device: expected", "leave --device out"])
        assert ("with CUDA" if torch.version.cuda is None else "GPU") in message


def test_wrong_usage_of_generate():
    fails(2, "generate", "--model", "smollm2", mentions=["--prompt"])
    fails(2, "generate", "--model", "smollm2", "--prompt", "x", "--top-p", "0", mentions=["--top-p"])
    fails(2, "generate", "--model", "smollm2", "--prompt", "x", "--stop", "", mentions=["--stop"])
    for option in ("--max-tokens", "--top-k", "--repetition-window"):
        fails(2, "generate", "--model", "smollm2", "--prompt", "x", option, 2**40 + 1, mentions=[option, str(2**40 + 1)])
    fails(2, "generate", "--model", "smollm2", "--prompt", "x", "--repetition-penalty", "1e5", mentions=["--repetition-penalty", "100"])
    fails(2, "generate", "--model", "smollm2", "--prompt", "x", "--seed", "-1", mentions=["--seed", "'-1'"])
    fails(2, "generate", "--model", "smollm2", "--prompt", "x", "--system", "y", mentions=["--system", "--chat"])
    fails(2, "generate", "--model", "smollm2", "--file", "", mentions=["--file", "empty"])
    fails(2, "generate", "--model", "", "--prompt", "x", mentions=["--model", "empty"])


def test_wrong_commands():
    fails(2, mentions=["generate, perplexity, needles, inspect, tokenize, train, adapt, bench", "none"])
    fails(2, "", mentions=["generate"])
    fails(2, "summarise", mentions=["generate", "'summarise'"])
    fails(2, "--summarise", mentions=["'--summarise'"])
    fails(2, "perplexity", mentions=["perplexity", "file"])
    fails(2, "perplexity", "x", mentions=["--model"])
    fails(2, "bench", mentions=["attention, model"])


def truncated(tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(pathlib.Path(MODEL).read_bytes()[:size])
    return path


def test_bad_models_exit_1(tmp_path, text):
    missing = tmp_path / "missing.gguf"
    fails(1, "perplexity", text, "--model", missing, mentions=["missing.gguf"])
    empty = tmp_path / "empty.gguf"
    empty.touch()
    fails(1, "perplexity", text, "--model", empty, mentions=["empty.gguf", "empty"])
    magic = tmp_path / "magic.gguf"
    magic.write_bytes(b"GGML" + bytes(100))
    fails(1, "perplexity", text, "--model", magic, mentions=["magic.gguf", "GGUF"])
    version = tmp_path / "version.gguf"
    version.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, 0) + bytes(64))
    fails(1, "perplexity", text, "--model", version, mentions=["version.gguf", "2"])
    counts = tmp_path / "counts.gguf"
    counts.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64))
    fails(1, "perplexity", text, "--model", counts, mentions=["counts.gguf"])
    for size in (30, 5000, 2_000_000, 60_000_000):
        fails(1, "perplexity", text, "--model", truncated(tmp_path, size), mentions=["short.gguf"])
    fails(1, "perplexity", text, "--model", tmp_path, mentions=["config.json"])


def test_nan_weights_exit_1(tmp_path, text):
    data = bytearray(pathlib.Path(MODEL).read_bytes())
    data[-64:] = b"\xff" * 64  # the end of the last tensor: NaN scales or NaN floats
    path = tmp_path / "nan.gguf"
    path.write_bytes(data)
    fails(1, "perplexity", text, "--model", path, mentions=["nan.gguf"])
    data[-2048:] = struct.pack("<512f", *[3e38] * 512)  # of output_norm: finite, the logits are not, whatever the token
    path = tmp_path / "large.gguf"
    path.write_bytes(data)
    fails(1, "perplexity", text, "--model", path, mentions=["large.gguf", "damaged"])
    fails(1, "generate", "--prompt", "x", "--model", path, mentions=["large.gguf", "damaged"])


def test_bad_texts_exit_1(tmp_path):
    fails(1, "perplexity", tmp_path / "none.txt", "--model", "smollm2", mentions=["none.txt"])
    fails(1, "perplexity", "", "--model", "smollm2", mentions=["empty path"])
    closed = subprocess.run([str(PROGRAM), "perplexity", "-", "--model", "smollm2"], capture_output=True, preexec_fn=lambda: os.close(0))
    assert closed.returncode == 1 and b"standard input" in closed.stderr and b"closed" in closed.stderr
    fails(1, "perplexity", tmp_path, "--model", "smollm2", mentions=[str(tmp_path)])
    short = tmp_path / "short.txt"
    short.write_text("x")
    fails(1, "perplexity", short, "--model", "smollm2", mentions=["short.txt", "2 tokens"])
    fails(1, "generate", "--model", "smollm2", "--file", "-", mentions=["empty"], stdin=b"")


def test_bad_adapters_exit_1(tmp_path, text):
    fails(1, "perplexity", text, "--model", "smollm2", "--scorer", tmp_path / "none.safetensors", mentions=["none.safetensors"])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    fails(1, "perplexity", text, "--model", "smollm2", "--scorer", broken, mentions=["broken.safetensors"])


def address_space(limit_bytes):
    """For subprocess' preexec_fn: `ulimit -v`."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def virtual_bytes(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmSize:")))


def test_dense_that_cannot_fit_is_refused_before_the_run(tmp_path, text):
    """SmolLM2's dense cache takes 23,040 bytes a token; nothing is loaded or read when the whole text's will not fit."""
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.write(TEXT.encode() * 400)
        file.truncate(1 << 42)  # sparse: the file takes no room
    dense = ["--model", "smollm2", "--attention", "dense"]
    for command in (["perplexity", huge, *dense], ["generate", "--file", huge, *dense]):
        message = fails(1, *command, mentions=["smollm2", "MiB", "tokens", "--attention sparsek", "--max-tokens", "--chunk"])
        assert "--topk" not in message and "--window" not in message
    fails(1, "generate", "--prompt", "x", *dense, "--max-tokens", 2**40, mentions=[f"{2**40 + 1} tokens", "lower --max-tokens"])
    assert run("perplexity", huge, *dense, "--max-tokens", 64).returncode == 0  # --max-tokens is what will be read

    million = tmp_path / "million.txt"
    million.write_text(TEXT * 25000)  # 23 GB of cache
    limited = dict(capture_output=True, timeout=120, preexec_fn=address_space(8 << 30))
    command = [str(PROGRAM), "perplexity", str(million), "--model", "smollm2"]
    refused = subprocess.run([*command, "--attention", "dense"], **limited)
    assert refused.returncode == 1 and refused.stdout == b"", refused.stderr
    assert refused.stderr.count(b"\n") == 1 and b"tokens" in refused.stderr and b"MiB" in refused.stderr
    allowed = subprocess.run([*command, "--max-tokens", "64"], **limited)
    assert allowed.returncode == 0, allowed.stderr


def test_dense_cache_is_allocated_once(text):
    """A guess of the file's length that is slightly low does not make the cache a quarter longer."""
    found = json.loads(run("perplexity", text, "--model", "smollm2", "--attention", "dense", "--json").stdout)
    assert found["tokens"] <= found["state_bytes"] / 23040 <= found["tokens"] * 1.06 + 64
    stream = json.loads(run("perplexity", "-", "--model", "smollm2", "--attention", "dense", "--json", "--max-tokens", 2000000,
                            stdin=b"one two three four five six").stdout)
    assert stream["state_bytes"] <= 512 * 23040  # --max-tokens is no promise that so many come


def test_dense_from_a_stream_stops_before_memory_runs_out():
    process = subprocess.Popen([str(PROGRAM), "perplexity", "-", "--model", "smollm2", "--attention", "dense"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(TEXT.encode() * 30)  # the first piece: after it everything is loaded and every thread runs
    process.stdin.flush()
    sizes = [0, 1]
    while sizes[-1] != sizes[-4:][0]:
        time.sleep(0.5)
        sizes.append(virtual_bytes(process))
    room = virtual_bytes(process) + (104 << 20)  # 64 MiB of it are reserved for threads: 1,800 tokens of cache
    resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
    out, err = process.communicate(TEXT.encode() * 400, timeout=120)
    assert process.returncode == 1 and out == b"", err
    assert err.count(b"\n") == 1 and b"dense attention" in err and b"tokens" in err and b"MiB" in err


def test_bytes_that_are_no_text_are_read(tmp_path):
    path = tmp_path / "bytes.bin"
    path.write_bytes(bytes(range(256)) * 8)
    result = run("perplexity", path, "--model", "smollm2", "--json", "--max-tokens", 500)
    assert result.returncode == 0, result.stderr.decode()


def test_interrupt_ends_cleanly(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 20000)
    process = subprocess.Popen([str(PROGRAM), "perplexity", str(path), "--model", "smollm2", "--json"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert json.loads(out)["complete"] is False and b"interrupted" in err
    last = json.loads(out)["loss_by_position"][-1]
    assert last["from"] < last["to"] <= json.loads(out)["tokens"]


def test_closed_output_is_an_error():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([str(PROGRAM), "generate", "--model", "smollm2", "--prompt", "Hello", "--max-tokens", "4"],
                                stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert result.returncode == 1 and b"standard output" in result.stderr


def test_names_from_files_cannot_break_the_line(tmp_path, text):
    name = b"evil\x1b[2J\nsecond line"
    key = b"general.architecture"
    path = tmp_path / "evil.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(name)) + name
                     + bytes(64))
    message = fails(1, "inspect", "--model", path)
    assert message.count("\n") == 1 and "\x1b" not in message


@pytest.mark.parametrize("command", [["inspect"], ["perplexity"]])
def test_a_full_disk_is_an_error(text, command):
    arguments = [*command, *([str(text)] if command == ["perplexity"] else []), "--model", "smollm2", "--json"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run([str(PROGRAM), *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert result.returncode == 1 and b"standard output" in result.stderr


def test_interrupt_while_reading_a_long_prompt():
    process = subprocess.Popen([str(PROGRAM), "generate", "--model", "smollm2", "--attention", "dense", "--prompt", "word " * 24000],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"", err.decode()
    assert err.count(b"\n") == 1 and int(err.split()[-2]) < 24000, err.decode()


def test_interrupt_reaches_a_named_pipe_nobody_writes_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen([str(PROGRAM), "perplexity", str(tmp_path / "pipe"), "--model", "smollm2"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"" and err.count(b"\n") == 1, err.decode()


def test_interrupt_reaches_a_waiting_read():
    process = subprocess.Popen([str(PROGRAM), "generate", "--model", "smollm2", "--file", "-"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)
    assert process.returncode == 130
