"""sparsek needles: what is asked, how it is counted, and that what is out of reach is not found."""
import json

import pytest
from program import TEXT, fails, run

SHORT = ("--model", "smollm2", "--tokens", 900, "--depths", 3, "--samples", 2, "--json")


@pytest.fixture(scope="module")
def haystack(tmp_path_factory):
    path = tmp_path_factory.mktemp("needles") / "text.txt"
    path.write_text(TEXT * 100)
    return path


def needles(*arguments):
    result = run("needles", *arguments)
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout)


@pytest.mark.parametrize("task", ["keys", "passkey"])
def test_dense_finds_what_is_out_of_a_windows_reach(haystack, task):
    dense = needles(haystack, *SHORT, "--task", task, "--attention", "dense")
    window = needles(haystack, *SHORT, "--task", task, "--attention", "window", "--window", 60)
    assert [depth["asked"] for depth in dense["depths"]] == [2, 2, 2] and dense["asked"] == 6
    assert [round(depth["depth"], 3) for depth in dense["depths"]] == [0.167, 0.5, 0.833]
    for depth in dense["depths"]:  # (1 - depth) of the text, needles behind it included; places move to a sentence's end
        assert abs(depth["distance"] - (1 - depth["depth"]) * 900) < 150
    right = sum(depth["right"] for depth in dense["depths"])
    assert right >= 4 and dense["accuracy"] == right / 6
    assert window["accuracy"] == 0
    for found in (dense, window):  # each depth is asked as often as the others
        assert abs(found["token_accuracy"] - sum(depth["token_accuracy"] for depth in found["depths"]) / 3) < 1e-9
        by_place = found["token_accuracy_by_place"]  # SmolLM2's tokenizer: a digit a token; the space before is not asked
        assert len(by_place) == found["digits"] and abs(sum(by_place) / len(by_place) - found["token_accuracy"]) < 1e-9
        assert min(by_place) >= found["accuracy"]
    assert window["token_accuracy_by_place"][0] < 0.5 < dense["token_accuracy_by_place"][0]  # found or not: nothing but the needle tells the first digit
    assert window["token_accuracy"] < 0.6 < dense["token_accuracy"]
    assert dense["accuracy"] <= dense["token_accuracy"] <= 1
    for near, far in zip(dense["depths"], window["depths"]):
        assert near["distance"] == far["distance"]
        assert near["answer_loss"] + 0.5 < far["answer_loss"]


def test_sees_everything_as_dense_does_and_repeats(haystack):
    f32 = ("--model", "smollm2", "--tokens", 300, "--depths", 3, "--samples", 1, "--json", "--dtype", "f32")
    dense = needles(haystack, *f32, "--attention", "dense")
    everything = needles(haystack, *f32, "--topk", 2000, "--window", 64, "--far-distance", "off")
    assert dense["accuracy"] == everything["accuracy"]
    for one, other in zip(dense["depths"], everything["depths"]):
        assert abs(one["answer_loss"] - other["answer_loss"]) < 1e-3
    assert needles(haystack, *f32, "--attention", "dense")["depths"] == dense["depths"]
    assert needles(haystack, *f32, "--attention", "dense", "--seed", 2)["depths"] != dense["depths"]


def test_numbers_have_as_many_digits_as_asked(haystack):
    """An answer's tokens are its digits: what is right of the two answers at a depth comes in steps of one of them."""
    for flags, digits in ((("--digits", 1), 1), ((), 7), (("--digits", 18), 18)):
        result = needles(haystack, *SHORT, "--attention", "dense", *flags)
        assert result["digits"] == digits
        for depth in result["depths"]:
            right = 2 * digits * depth["token_accuracy"]
            assert abs(right - round(right)) < 1e-9
            assert depth["right"] == 2 or right < 2 * digits


def test_says_what_is_wrong(haystack):
    fails(2, "needles", haystack, "--model", "smollm2", "--task", "hay", mentions=["--task", "passkey or keys", "'hay'"])
    fails(2, "needles", haystack, "--model", "smollm2", "--tokens", 500, mentions=["--tokens", "800", "500"])  # of 10 depths
    fails(2, "needles", haystack, "--model", "smollm2", "--digits", 19, mentions=["--digits", "1 to 18", "19"])
    fails(2, "needles", haystack, "--model", "smollm2", "--depths", 65, mentions=["--depths", "64"])
    fails(2, "needles", haystack, "--model", "smollm2", "--tokens", 100000, mentions=["--tokens", "the tokens of the text", "100000"])
