"""Training text from packages: pages become paragraphs, what repeats is left out, pieces become documents; and facts that come up again."""
import importlib.util
import pathlib
import random
import re
import struct
import subprocess
import sys
import zlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


training, retrieval = load("training_text"), load("retrieval_text")


def test_page_is_its_text():
    page = """<html><head><title>no</title></head><body><div class="navheader">Prev <a>Up</a></div><h1>Head</h1>
      <p>One  <b>two</b>
      three.<p>Four<ul><li><p>first</p></li><li>second</ul><pre>  kept
    as it   is</pre><script>no()</script><table><tr><td>a</td><td>b</td></tr></table><br>end</body></html>"""
    text = training.clean(training.page_text(page), set())
    assert text == "Head\n\nOne two three.\n\nFour\n\n- first\n\n- second\n\n  kept\n    as it   is\n\na b\n\nend\n"


def test_paragraphs_occur_once_and_are_clean():
    seen, long = set(), "word " * 60
    assert training.clean(f"a\r\n\x00b  \n\n\n{long}\n \n{long}\n\nshort", seen) == f"a\nb\n\n{long.strip()}\n\nshort\n"
    assert training.clean(f"short\n\n{long.replace(' ', chr(10))}", seen) == "short\n"  # the same words on other lines


def test_pieces_become_documents():
    piece = "".join(f"sentence number {i} of this piece.\n\n" for i in range(900))  # about 30 kB
    pieces = [(f"{folder}/{i}", piece) for folder in "ab" for i in range(3)] + [("b/short", "x"), ("b/table", "0x1f, 0x20, 0x21,\n" * 9000)]
    made = list(training.documents(pieces, set()))
    assert [name for name, _ in made] == ["a/0", "b/0"]
    assert all(training.LEAST <= len(text) <= training.MOST for _, text in made)
    many = list(training.documents([(f"a/{i}", piece) for i in range(30)], set()))
    assert len(many) > 2 and all(len(text) <= training.MOST for _, text in many)
    chosen = training.chosen(many, 600_000)
    assert sum(len(text) for _, text in chosen) <= 600_000 and len(chosen) >= 2
    assert [name for name, _ in chosen] == [name for name, _ in many if name in dict(chosen)]  # in their order


def test_sources_begin_with_their_path_and_without_a_licence(tmp_path):
    (tmp_path / "a.c").write_text("/* Copyright X */\nint a;\n")
    (tmp_path / "b.c").write_text("/* what it does */\nint b;\n")
    assert [text for _, text in training.code("*.c", comment="//")(tmp_path)] == ["// a.c\n\nint a;\n", "// b.c\n/* what it does */\nint b;\n"]


def test_pages_that_lie_elsewhere_are_none(tmp_path):
    """So that the script can say which package has changed."""
    assert list(training.in_order("no/index.html")(tmp_path)) == list(training.novels("no/*.rdb")(tmp_path)) == []


def test_novels_are_read_from_the_package(tmp_path):
    def vector(*lines):
        return b"X\n" + b"".join(b"\x00\x04\x00\x09" + struct.pack(">I", len(line)) + line for line in lines)

    stored = [vector(b"EMMA", b"", b"Emma Woodhouse, handsome"), vector(b"PERSUASION", b"Sir Walter")]
    (tmp_path / "novels.rdb").write_bytes(b"".join(struct.pack(">I", len(data)) + zlib.compress(data) for data in stored))
    assert list(training.novels("*.rdb")(tmp_path)) == [("Emma", "EMMA\n\nEmma Woodhouse, handsome"), ("Persuasion", "PERSUASION\nSir Walter")]


def test_packages_are_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    """An interrupted unpacking is begun anew; which of two archives is meant is not guessed."""
    (tmp_path / "doc_1.9_all.deb").write_bytes(b"")
    interrupt = [True]

    def run(command, **_):
        if "-x" in command:
            (command[-1] / "usr").mkdir(parents=True)
            if interrupt.pop() if interrupt else False:
                raise KeyboardInterrupt
            (command[-1] / "usr/whole").write_text("")
        return subprocess.CompletedProcess(command, 0, stdout="1.9\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        training.unpack("doc", tmp_path)
    root, version = training.unpack("doc", tmp_path)
    assert (root / "usr/whole").exists() and version == "1.9"
    (tmp_path / "doc_1.10_all.deb").write_bytes(b"")
    with pytest.raises(SystemExit, match="doc_1.10_all.deb"):
        training.unpack("doc", tmp_path)


def test_documents_of_another_run_are_not_mixed_in(tmp_path):
    training.refuse_documents_of_another_run(tmp_path)
    (tmp_path / "train/code").mkdir(parents=True)
    (tmp_path / "train/code/old-0007.txt").write_text("")
    with pytest.raises(SystemExit, match="train/code"):
        training.refuse_documents_of_another_run(tmp_path)


@pytest.mark.parametrize("options, least_far", [((), 20_000), (("--length", "160000", "--farthest", "90000", "--pending", "40"), 60_000)], ids=("near", "far"))
def test_facts_come_up_again_at_a_distance(tmp_path, options, least_far):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("\n\n".join(f"Paragraph {i}: " + "filler " * 60 for i in range(200)))
    for out in ("one", "two"):
        subprocess.run([sys.executable, ROOT / "scripts/retrieval_text.py", tmp_path / out, "--text", tmp_path / "text", "--documents", "2", *options], check=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 2
    distances = []
    for name in names:
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
        facts, times = {}, {}
        for match in re.finditer(r"(?m)^(?!Paragraph).+$", text):
            distances += [match.start() - facts[match[0]]] if match[0] in facts else []
            facts[match[0]] = match.start()
            times[match[0]] = times.get(match[0], 0) + 1
        assert min(times.values()) >= 2  # none is told in vain
        values = [fact.split(" ")[-1] for fact in facts]
        assert len(facts) > 20 and len({fact.rpartition(" ")[0] for fact in facts}) > 0.9 * len(facts)
        assert len(set(values)) > len(values) // 2
    assert len(distances) > 40 and min(distances) >= retrieval.NEAREST - 500
    assert max(distances) > least_far


def make_retrieval(out, text, *options):
    return subprocess.run([sys.executable, ROOT / "scripts/retrieval_text.py", out, "--text", text, *options], capture_output=True, text=True)


def test_facts_again_into_the_text_itself_are_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {i}: " + "filler " * 60 for i in range(200)))
    out = tmp_path / "facts"
    found = []
    for _ in range(2):
        assert make_retrieval(out, tmp_path, "--documents", "2").returncode == 0
        found.append([path.read_bytes() for path in sorted(out.iterdir())])
    assert found[0] == found[1] and len(found[0]) == 2
    fewer = make_retrieval(out, tmp_path, "--documents", "1")
    assert fewer.returncode == 2 and "retrieval-0001.txt: expected no documents of another run" in fewer.stderr
    assert [path.read_bytes() for path in sorted(out.iterdir())] == found[0]


@pytest.mark.parametrize("options", [("--farthest", "1999"), ("--length", "30000"), ("--documents", "0"), ("--pending", "0")], ids=str)
def test_facts_out_of_range_are_refused(tmp_path, options):
    (tmp_path / "a.txt").write_text("filler " * 60)
    result = make_retrieval(tmp_path / "facts", tmp_path, *options)
    assert result.returncode == 2 and "expected --farthest of 2000 or more, a longer --length" in result.stderr
    assert not (tmp_path / "facts").exists()


def test_facts_take_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 60)
    assert make_retrieval(tmp_path / "facts", tmp_path, "--documents", "1").returncode == 0
    empty = make_retrieval(tmp_path / "more", tmp_path / "facts" / "none")
    assert empty.returncode == 2 and "found none" in empty.stderr


def test_practice_is_not_what_is_measured():
    source = (ROOT / "src/eval/needles.cc").read_text()
    words = set(re.search(r"kWords = \{(.*?)\};", source, re.S)[1].replace('"', "").replace(",", " ").split())
    rng = random.Random(1)
    told = " ".join(sentence + value(rng) for sentence, value in retrieval.KINDS)
    assert len(words) == 64 and not re.search("pass key|magic|special", told)
    subjects = {*retrieval.PLACES, *retrieval.PEOPLE, *retrieval.THINGS}
    assert not words & subjects
