"""The adapters that come with SmolLM2: found and used without being named, and better than what is untrained."""
import json
import os
import shutil
import subprocess

import pytest
from program import PROGRAM, ROOT, TEXT, fails, run

ADAPTER = "adapters/smollm2-135m.safetensors"


def attention(*options, program=PROGRAM, cwd=None, **environment):
    command = [str(program), "inspect", "--model", "smollm2", "--json", *map(str, options)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, timeout=60, env=os.environ | environment)
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)["attention"], result.stderr.decode()


def test_smollm2_takes_its_adapter_from_any_folder(tmp_path):
    for folder in (ROOT, tmp_path):
        text, notices = attention(cwd=folder)
        assert text.startswith("sparsek topk 662 window 358 sinks 4 (means of layers with 448 to 6656 keys) gate soft scorer ") and f"/{ADAPTER} far-distance 1024" in text
        assert not notices


@pytest.mark.parametrize(("options", "expected"), [(["--scorer", "window_mass"], "scorer window_mass slope 2 "), (["--slope", 1], "scorer window_mass slope 1 "),
                                                   (["--attention", "window"], "window window 1020 sinks 4 "),
                                                   (["--scorer", ROOT / "adapters/smollm2-135m-256.safetensors"], "topk 128 window 124 sinks 4 gate soft ")])
def test_other_choices(options, expected):
    assert expected in attention(*options)[0]


def test_a_budget_of_ones_own_is_said():
    text, notices = attention("--topk", 60)
    assert "topk 60 window 358 sinks 4 (means of layers with 320 to 576 keys)" in text and ADAPTER in text
    assert notices == "sparsek: topk 60 in every layer instead of the adapter's own\n"


@pytest.mark.parametrize(("said", "instead", "mentions"), [(b"sparsek-adapter-2", b"sparsek-adapter-1", ["metadata layers", "expected none in format 'sparsek-adapter-1'"]),
                                                           (b'"662"', b'"663"', ["metadata topk and window_size", "662 and 358", "663 and 358"]),
                                                           (b"3580+512", b"9580+512", ["metadata topk and window_size", "862 and 358", "662 and 358"]),
                                                           (b"3580+512", b"3580;512", ["metadata layers", "as 252+256, 508+512"])])
def test_budgets_of_layers_that_contradict_the_file_are_refused(tmp_path, said, instead, mentions):
    whole = (ROOT / ADAPTER).read_bytes()
    assert whole.count(said) == 1 and len(said) == len(instead)
    (tmp_path / "edited.safetensors").write_bytes(whole.replace(said, instead))
    fails(1, "inspect", "--model", "smollm2", "--scorer", tmp_path / "edited.safetensors", mentions=["edited.safetensors", *mentions])


def test_a_program_without_it_says_so(tmp_path):
    alone = tmp_path / "bin" / "sparsek"
    alone.parent.mkdir()
    shutil.copy(PROGRAM, alone)
    text, notices = attention(program=alone, cwd=tmp_path, VIRTUAL_ENV=str(ROOT / ".venv"))
    assert "scorer window_mass" in text
    assert ADAPTER in notices and "untrained" in notices and notices.count("\n") == 1


def test_a_folder_of_shards_needs_none(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert run("tokenize", text, "--model", "smollm2", "--out", tmp_path / "shards").returncode == 0
    result = run("inspect", tmp_path / "shards", "--model", "smollm2", "--document", 0)
    assert result.returncode == 0 and result.stderr == b""


# Against what the program would do without the adapter: untrained scores in their own best split, and the window.
@pytest.mark.parametrize(("name", "begin", "without"), [
    ("smollm2-135m", 1536, [["--scorer", "window_mass"], ["--attention", "window"]]),
    ("smollm2-135m-256", 512, [["--scorer", "window_mass", "--topk", 128, "--window", 124], ["--attention", "window", "--window", 252]])])
def test_better_than_without(tmp_path, name, begin, without):
    text = tmp_path / "docs.txt"
    text.write_text("\n".join((ROOT / path).read_text() for path in ("docs/math.md", "docs/data.md", "docs/training.md")))
    tokens = begin + 1024

    def late_loss(*options):
        result = run("perplexity", text, "--model", "smollm2", "--max-tokens", tokens, "--json", *options)
        assert result.returncode == 0, result.stderr.decode()
        found = json.loads(result.stdout)
        assert found["tokens"] == tokens
        late = [(bucket["to"] - bucket["from"], bucket["loss"]) for bucket in found["loss_by_position"] if bucket["from"] >= begin]
        return sum(width * loss for width, loss in late) / sum(width for width, _ in late)

    trained, others = late_loss("--scorer", ROOT / f"adapters/{name}.safetensors"), [late_loss(*options) for options in without]
    print(name, trained, others)
    assert trained < min(others) - 0.005
