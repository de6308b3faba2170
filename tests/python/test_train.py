"""sparsek train as a program: killed at random moments and resumed, ended by a signal, wrong configurations."""
import hashlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time
import tomllib

import pytest

import program
from data_tool import data_tool

TINY = ["data.task=recall", "data.recall_pairs=3", "data.recall_keys=6", "data.recall_values=6", "data.recall_noise=6", "data.batch=2",
        "data.seqlen=64", "model.vocab_size=61", "model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.num_heads=4",
        "model.num_kv_heads=2", "model.head_dim=8", "model.init_std=0.1", "attention.topk=6", "attention.window_size=8",
        "attention.num_sinks=1", "scorer.hidden=8", "run.dtype=f32", "run.log_every=1", "run.threads=1", "validation.every=100",
        "validation.batches=2", "checkpoint.every=5"]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line.get("validation_loss")) for line in lines}


def tensors(folder, step):
    path = folder / "checkpoints" / f"step-{step:08}" / "tensors.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("more", [[], ["recurrent.chunk=24", "recurrent.bptt_chunks=2"]], ids=["whole", "recurrent"])
def test_killed_at_random_moments(tmp_path, more):
    steps, kills = 300, 10
    command = [str(program.PROGRAM), "train", *TINY, *more, f"run.steps={steps}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    assert subprocess.run([*command, f"run.folder={whole}"], capture_output=True).returncode == 0
    seconds = time.monotonic() - begin
    moments = random.Random(20240617)
    for _ in range(kills):
        process = subprocess.Popen([*command, f"run.folder={killed}", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, max(seconds / 2, 0.5)))
        process.kill()
        process.wait()
    assert subprocess.run([*command, f"run.folder={killed}", "--resume"], capture_output=True).returncode == 0
    assert losses(whole) == losses(killed)
    assert tensors(whole, steps) == tensors(killed, steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends_well(tmp_path, number):
    command = [str(program.PROGRAM), "train", *TINY, "run.steps=100000", "checkpoint.every=0", f"run.folder={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"--resume" in errors
    saved = list((tmp_path / "checkpoints").iterdir())
    assert len(saved) == 1 and (saved[0] / "state.json").exists()


def test_print_config_gives_the_same_run(tmp_path):
    text = program.run("train", *TINY, "optimiser.lr=0.002", "--print-config").stdout
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    assert program.run("train", path, "--print-config").stdout == text
    assert b"lr = 0.002" in text


@pytest.mark.parametrize("path", sorted((program.ROOT / "examples/train").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_understood(path):
    result = program.run("train", path, "--print-config")
    assert result.returncode == 0, result.stderr.decode()


def test_wrong_configurations(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optimiser]\nlearning_rate = 1\n")
    program.fails(2, "train", path, mentions=["run.toml:2", "optimiser.learning_rate", "did you mean"])
    path.write_text("[data]\nbatch = \"two\"\n")
    program.fails(2, "train", path, mentions=["run.toml:2", "data.batch", "expected a whole number, found text"])
    program.fails(2, "train", *TINY, "run.step=3", mentions=["did you mean run.steps?"])
    program.fails(2, "train", *TINY, "run.device=cuda", mentions=["run.device"])
    assert "--" not in program.fails(2, "train", *TINY, "optimiser.lr=-1", mentions=["optimiser.lr"])
    program.fails(1, "train", tmp_path / "none.toml", mentions=["none.toml"])
    program.fails(2, "adapt", "--model", tmp_path, "--loss", "most", mentions=["--loss", "'most'"])


def shards(folder):
    """Token shards of two texts, and the text that perplexity reads."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(24):
        (texts / f"{i:02}.txt").write_text(program.TEXT * 4 + f"This was text number {i}.\n")
    assert program.run("tokenize", texts, "--model", program.MODEL, "--out", folder / "shards").returncode == 0
    return folder / "shards", texts / "00.txt"


@pytest.mark.parametrize("more", [["data.seqlen=96", "data.batch=2"], ["recurrent.chunk=64", "recurrent.bptt_chunks=2", "data.batch=2"]],
                         ids=["packed", "chunks"])
def test_from_shards(tmp_path, more):
    data, _ = shards(tmp_path)
    command = ["train", *[key for key in TINY if not key.startswith("data.")], "model.vocab_size=49152", f"data.train={data}",
               "data.validation_fraction=0.3", "optimiser.lr=1e-2", "optimiser.warmup_steps=2", *more]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert program.run(*command, "run.steps=20", f"run.folder={whole}").returncode == 0
    assert program.run(*command, "run.steps=20", f"run.folder={resumed}").returncode == 0
    newest = resumed / "checkpoints" / "step-00000020"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert program.run(*command, "run.steps=20", f"run.folder={resumed}", "--resume").returncode == 0
    assert losses(whole) == losses(resumed)
    assert tensors(whole, 20) == tensors(resumed, 20)
    assert losses(whole)[20][0] < losses(whole)[1][0] - 1
    program.fails(1, *command, f"run.folder={tmp_path / 'other'}", "model.vocab_size=1000", mentions=["1000", "49152"])
    program.fails(1, *command, f"run.folder={tmp_path / 'other'}", f"data.train={tmp_path / 'none'}", mentions=["none"])


def test_says_when_shards_are_others(tmp_path):
    data, _ = shards(tmp_path)
    command = ["train", *[key for key in TINY if not key.startswith("data.")], "model.vocab_size=49152", f"data.train={data}", "data.validation_fraction=0.3",
               "data.seqlen=96", "data.batch=2", f"run.folder={tmp_path / 'run'}"]
    assert program.run(*command, "run.steps=1").returncode == 0
    same = program.run(*command, "run.steps=2", "--resume")
    assert same.returncode == 0 and b"other shards" not in same.stderr, same.stderr.decode()
    shutil.rmtree(data)
    (tmp_path / "texts" / "00.txt").write_text("Another beginning.\n" + program.TEXT * 4)
    assert program.run("tokenize", tmp_path / "texts", "--model", program.MODEL, "--out", data).returncode == 0
    other = program.run(*command, "run.steps=3", "--resume")
    assert other.returncode == 0 and other.stderr.count(b"holds other shards than when") == 2, other.stderr.decode()


def test_says_when_validation_counts_rows_twice(tmp_path):
    data, _ = shards(tmp_path)
    command = ["train", *[key for key in TINY if not key.startswith("data.")], "model.vocab_size=49152", f"data.train={data}", f"data.validation={data}",
               "data.seqlen=96", "data.batch=2", "run.steps=1", "validation.every=1"]
    once = program.run(*command, "validation.batches=2", f"run.folder={tmp_path / 'once'}")
    again = program.run(*command, "validation.batches=40", f"run.folder={tmp_path / 'again'}")
    assert once.returncode == again.returncode == 0, again.stderr.decode()
    assert b"more than once" not in once.stderr
    assert b"validation: 40 batches of 2 rows are 80 rows, the held-out text fills " in again.stderr


def test_shards_of_another_tokenizer(tmp_path):
    data, _ = shards(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    digits = json.loads((data / "manifest.json").read_text())["job"]["tokenizer"]["sha256"]
    wrong = digits[::-1]
    for path in other.iterdir():
        path.write_bytes(path.read_bytes().replace(digits.encode(), wrong.encode()))
    run = tmp_path / "run"
    program.fails(1, "adapt", "--model", program.MODEL, "--data", other, "--out", run, mentions=[digits, wrong, "tokenizer"])
    program.fails(1, "train", f"data.train={data}", f"data.validation={other}", f"run.folder={run}", mentions=[digits, wrong, "tokenizer"])
    assert not run.exists()


def test_adapt_takes_what_is_not_an_option_from_its_file(tmp_path):
    path = tmp_path / "lr=1.toml"
    path.write_text('[trainable]\npart = "lora"\n[loss]\nkl = 0.5\n[run]\nfolder = "mine"\n[data]\ntrain = "none"\n')
    command = ["adapt", "--model", program.MODEL, "--config", path, "--print-config"]
    keys = tomllib.loads(program.run(*command).stdout.decode())
    assert (keys["trainable"]["part"], keys["loss"]["kl"], keys["run"]["folder"]) == ("lora", 0.5, "mine")
    keys = tomllib.loads(program.run(*command, "--train", "full", "--loss", "kl", "--out", "there").stdout.decode())
    assert (keys["trainable"]["part"], keys["loss"], keys["run"]["folder"]) == ("full", {"next_token": 0, "kl": 1, "teacher": "", "rows": 2048}, "there")
    keys = tomllib.loads(program.run("adapt", "--model", program.MODEL, "--data", "none", "--print-config").stdout.decode())
    assert (keys["trainable"]["part"], keys["loss"]["kl"], keys["run"]["folder"]) == ("scorer", 1, "adapt-scorer")
    recipe = tomllib.loads((program.ROOT / "examples/train/adapt_smollm2_scorer.toml").read_text())  # what it does without a file
    of_smollm2 = {"layers", "far_distance", "lookup_heads", "lookup_slope"}  # what was measured of its layers and heads
    for section in ("attention", "scorer", "loss", "warm_start"):
        assert {key: value for key, value in recipe[section].items() if key not in of_smollm2}.items() <= keys[section].items(), section
    assert keys["optimiser"]["scale_lr"] == recipe["optimiser"]["scale_lr"]
    lora = tomllib.loads(program.run("adapt", "--model", program.MODEL, "--data", "none", "--train", "lora", "attention.topk=9", "--print-config").stdout.decode())
    assert (lora["loss"]["next_token"], lora["loss"]["kl"], lora["attention"]["topk"]) == (1, 0, 9)
    again = tomllib.loads(program.run("adapt", "--model", program.MODEL, "--data", "none", "scorer.adapter=a.safetensors", "--print-config").stdout.decode())
    assert (keys["warm_start"]["steps"], again["warm_start"]["steps"]) == (60, 0)  # which would undo what its scorers have learned
    path.write_text('[data]\ntask = "recall"\n')
    assert tomllib.loads(program.run("train", path, "--print-config").stdout.decode())["data"]["task"] == "recall"


def test_examples_of_the_help_texts(tmp_path):
    """Each is understood as it stands: --print-config ends it there."""
    seen = 0
    for name in ("train", "adapt"):
        lines = program.run(name, "--help").stdout.decode().split("Examples:")[1].splitlines()
        for words in (line.split() for line in lines if line.strip().startswith("sparsek ")):
            assert words[1] == name
            result = subprocess.run([str(program.PROGRAM), *words[1:], "--print-config"], cwd=program.ROOT, capture_output=True)
            assert result.returncode == 0 and tomllib.loads(result.stdout.decode())["run"]["steps"] > 0, result.stderr
            seen += 1
    assert seen == 6


def test_adapted_scorers_are_read_by_the_other_commands(tmp_path):
    data, text = shards(tmp_path)
    run = tmp_path / "run"
    result = program.run("adapt", "--model", program.MODEL, "--data", data, "--out", run, "--loss", "both", "run.steps=2", "data.seqlen=192", "data.batch=1",
                         "attention.topk=16", "attention.window_size=40", "scorer.hidden=8", "validation.batches=1", "run.log_every=1",
                         "warm_start.steps=1", timeout=900)
    assert result.returncode == 0, result.stderr
    adapter = run / "model" / "adapter.safetensors"
    assert "validation: loss" in (run / "model" / "README.md").read_text()
    assert not (run / "model" / "config.json").exists()  # the base stays as it is
    result = program.run("perplexity", text, "--model", program.MODEL, "--scorer", adapter, "--json")
    assert result.returncode == 0, result.stderr
    read = json.loads(result.stdout)
    assert "topk 16 window 40" in read["attention"] and read["loss"] < 8


def test_a_trained_model_reads_text_by_its_folder(tmp_path):
    """A base's tokenizer goes along, the adapter is found beside the weights, and transformers opens the folder."""
    transformers = pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text(program.TEXT * 30)
    shards = tmp_path / "shards"
    assert program.run("tokenize", text, "--model", "smollm2", "--out", shards).returncode == 0
    trained = program.run("train", "model.base=smollm2", "trainable.part=lora", f"data.train={shards}", f"data.validation={shards}", "data.seqlen=48",
                          "run.steps=1", "run.dtype=f32", "validation.batches=1", "attention.topk=20", "attention.window_size=24", "scorer.hidden=8",
                          f"run.folder={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr.decode()
    model = tmp_path / "run/model"
    assert "- tokenizer: the base's" in (model / "README.md").read_text()
    found = json.loads(program.run("perplexity", text, "--model", model, "--max-tokens", 300, "--json").stdout)
    assert found["attention"] == f"sparsek topk 20 window 24 sinks 4 gate soft scorer {model}/adapter.safetensors far-distance 48"
    base = json.loads(program.run("perplexity", text, "--model", "smollm2", "--max-tokens", 300, "--json", "--scorer", model / "adapter.safetensors").stdout)
    assert found["tokens"] == base["tokens"] == 300 and abs(found["loss"] - base["loss"]) < 0.5  # one step away
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    begin = program.run("inspect", shards, "--model", "smollm2", "--document", 0).stdout.decode()
    assert tokenizer.decode(tokenizer(program.TEXT)["input_ids"]) == program.TEXT and program.TEXT[:20] in begin
    assert tokenizer.eos_token in ("<|im_end|>", "<|endoftext|>")
    assert data_tool("info", model).stdout == data_tool("info", program.MODEL).stdout  # BOS, end tokens, missing bytes
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


# A teacher is named as a base is; its words have to be the trained model's.
def test_a_teacher_by_name(tmp_path):
    result = program.run("train", *TINY, "loss.kl=1", "loss.teacher=smollm2", f"run.folder={tmp_path / 'run'}", "run.steps=1")
    assert result.returncode == 2, result.stderr.decode()
    assert b"loss.teacher" in result.stderr and b"vocabulary of 61, found 49152" in result.stderr
