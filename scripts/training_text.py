#!/usr/bin/env python3
"""Training text from Debian packages: manuals, prose and code, one document a file (docs/adapting.md).

    python3 scripts/training_text.py OUT [--packages FOLDER]

Downloads packages by name with `apt-get download` (Debian 12; nothing is installed and no root is needed), unpacks them with dpkg and writes

    OUT/train/KIND/*.txt      what to train on
    OUT/manuals/*.txt         held out: other documents of the manuals that are trained on
    OUT/other/*.txt           held out: kinds of their own
    OUT/SOURCES.json          packages with versions, documents and bytes of each source

Held out is what bench/quality.py reads (a Bible, which is no source here, and those of SOURCES below with `held_out`): figures of that
program stay figures of unseen text. Pieces (pages, files, sections) that follow each other become one document of 64 to 256 kB, so that
most documents fill rows of 8K tokens and more. A paragraph of 200 characters and more occurs once in all of OUT; held-out text comes
first, so that nothing trained on repeats it. The same packages give the same bytes. Standard library alone.
"""
import argparse
import glob
import gzip
import hashlib
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

LEAST, MOST = 64_000, 256_000  # bytes of a document made of pieces
DISTINCT = 200  # characters of a paragraph that may occur once
WORDS = 0.65  # of a piece's characters are letters and white space at least: others are tables of numbers

BLOCKS = set("p div section article h1 h2 h3 h4 h5 h6 ul ol dl dd dt li table tr pre blockquote hr br".split())
NOT_TEXT = set("script style head nav svg footer".split())
# Navigation of DocBook, Sphinx, SQLite and AsciiDoc pages.
NOT_TEXT_CLASSES = set("navheader navfooter related sphinxsidebar footer headerlink toctree-wrapper toc TOC fancy_toc nosearch".split())
VOID = set("area base br col embed hr img input link meta source track wbr".split())


class PageText(html.parser.HTMLParser):
    """The text of a page: a block a paragraph, <pre> as it stands, white space elsewhere one blank."""

    def __init__(self):
        super().__init__()
        self.parts, self.open, self.hidden, self.preformatted = [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        if tag in BLOCKS:
            self.parts.append("\n" if tag in ("li", "tr", "br", "dd", "dt") else "\n\n")
        if tag == "li":
            self.parts.append("- ")
        if tag in ("td", "th"):
            self.parts.append(" ")
        if tag in VOID:
            return
        classes = dict(attributes).get("class") or ""
        hides = tag in NOT_TEXT or bool(NOT_TEXT_CLASSES & set(classes.split()))
        self.open.append((tag, hides))
        self.hidden += hides
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag):
        if tag not in [name for name, _ in self.open]:
            return
        while True:  # elements whose end tag is left out end with their parent
            name, hides = self.open.pop()
            self.hidden -= hides
            self.preformatted -= name == "pre"
            if name == tag:
                break
        if tag in BLOCKS and tag not in ("li", "tr", "dd", "dt"):
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def page_text(source):
    parser = PageText()
    parser.feed(source)
    text = re.sub(r"\n[ \t]+(?=\n)", "\n", "".join(parser.parts))
    text = re.sub(r"(?<=\n) (?=\S)", "", text)
    return re.sub(r"(?m)^-\s+", "- ", text)  # a list's mark on the line of its paragraph


def read(path):
    opener = gzip.open if path.suffix == ".gz" else open
    data = opener(path, "rb").read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def files(patterns, leave_out=r"(?!)"):
    """Pieces of the files that patterns, with blanks between them, name, in the order of their paths."""

    def pieces(root):
        names = [name for pattern in patterns.split() for name in glob.glob(f"{root}/{pattern}", recursive=True)]
        for path in sorted(map(pathlib.Path, names)):
            relative = str(path.relative_to(root))
            if path.is_file() and not re.search(leave_out, relative):
                yield relative, page_text(read(path)) if ".htm" in path.name else read(path)

    return pieces


def code(patterns, leave_out=r"(?!)", comment="#"):
    """The same for sources: each begins with its path, without the licence that its first comment is."""

    def pieces(root):
        for name, text in files(patterns, leave_out)(root):
            begin = re.match(r"(?s)\s*(/\*.*?\*/|(?:(?://|#|;)[^\n]*\n)+)", text)
            if begin and re.search(r"(?i)copyright|licen[cs]e", begin[0]):
                text = text[begin.end():]
            yield name, f"{comment} {name}\n{text}"

    return pieces


def in_order(first, leave_out=r"(?!)"):
    """Pages of a DocBook manual in the order in which its "next" links read."""

    def pieces(root):
        path = next(pathlib.Path(root).glob(first), None)
        seen = set()
        while path and path not in seen and path.exists():
            seen.add(path)
            source = read(path)
            if not re.search(leave_out, path.name):
                yield path.name, page_text(source)
            following = re.search(r'<link rel="next" href="([^"#]+)', source)
            if not following:
                return
            path = path.parent / following[1]

    return pieces


def novels(pattern):
    """Jane Austen's novels as R's package stores them: a compressed character vector of lines a novel."""

    def pieces(root):
        path = next(pathlib.Path(root).glob(pattern), None)
        data = path.read_bytes() if path else b""
        while data:
            unpacker = zlib.decompressobj()
            vector = unpacker.decompress(data[4:])  # before each: its length unpacked
            data = unpacker.unused_data
            lines, at = [], 0
            for mark in re.finditer(rb"\x00[\x00\x04]\x80?\x00\x09(....)", vector, re.S):  # an R string: flags, type 9, length
                length = int.from_bytes(mark[1], "big")
                if mark.start() >= at and length <= 200:
                    lines.append(vector[mark.end():mark.end() + length].decode("utf-8", "replace"))
                    at = mark.end() + length
            yield lines[0].title(), "\n".join(lines)

    return pieces


def source(kind, package, pieces, mb, held_out=None):
    return {"kind": kind, "package": package, "pieces": pieces, "mb": mb, "held_out": held_out}


PG, PY = "usr/share/doc/postgresql-doc-15/html", "usr/share/doc/python3.11/html/_sources"
LINUX = "usr/share/doc/linux-doc-6.1/Documentation"
# held_out names the folder that takes the source instead of train; mb: at most so much of it, whole documents chosen by hash.
SOURCES = [
    source("python", "python3.11-doc", files(f"{PY}/library/a*.rst.txt"), 9, "manuals"),
    source("linux", "linux-doc-6.1", files(f"{LINUX}/process/**/*.rst* {LINUX}/RCU/**/*.rst*"), 9, "manuals"),
    source("postgres", "postgresql-doc-15", files(f"{PG}/sql-*.html"), 9, "manuals"),
    source("handbook", "debian-handbook", files("usr/share/doc/debian-handbook/html/en-US/*.html", "index"), 1, "other"),
    source("essays", "anarchism", files("usr/share/doc/anarchism/markdown/sec[B-D]*.md.gz"), 1, "other"),
    source("python-code", "libpython3.11-stdlib", code(" ".join(f"usr/lib/python3.11/{name}.py" for name in ("argparse", "ast", "tarfile"))), 1, "other"),

    source("manuals", "python3.11-doc", files(f"{PY}/**/*.rst.txt", r"library/a|license|copyright|changelog"), 7),
    source("manuals", "linux-doc-6.1", files(f"{LINUX}/**/*.rst*", r"translations|/process/|/RCU/|\.(jpg|svg|png)"), 9),
    source("manuals", "postgresql-doc-15", in_order(f"{PG}/index.html", r"^sql-|^release-|^biblio|bookindex"), 7),
    source("reference", "git-doc", files("usr/share/doc/git/html/**/*.txt", "RelNotes"), 1.6),
    source("reference", "vim-runtime", files("usr/share/vim/vim90/doc/*.txt", "version|todo"), 2),
    source("reference", "perl-doc", files("usr/share/perl/**/pod/*.pod", r"delta|perl(ja|ko|cn|tw|toc|hist)"), 2.5),
    source("reference", "debian-policy", files("usr/share/doc/debian-policy/policy.txt.gz"), 1),
    source("reference", "developers-reference", files("usr/share/developers-reference/developers-reference.txt.gz"), 1),
    source("reference", "debian-reference-en", files("usr/share/debian-reference/ch*.en.html"), 1),
    source("reference", "bash-doc", files("usr/share/doc/bash/bashref.html"), 1),
    source("reference", "bind9-doc", files("usr/share/doc/bind9-doc/arm/*.html", "genindex|search|notes"), 0.6),
    source("reference", "sqlite3-doc", files("usr/share/doc/sqlite3/*.html", "changes|release|sitemap|keyword"), 1.5),
    source("reference", "python-django-doc", files(" ".join(f"usr/share/doc/python-django-doc/html/{name}/**/*.html" for name in ("intro", "ref", "topics", "howto"))), 1.5),
    source("prose", "r-cran-janeaustenr", novels("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"), 9),
    source("prose", "anarchism", files("usr/share/doc/anarchism/markdown/*.md.gz", r"/sec[B-D]"), 3.5),
    source("prose", "cfi-en", files("usr/share/doc/cfi-en/html/ch*web.htm"), 1),
    source("prose", "jargon-text", files("usr/share/doc/jargon-text/jargon.txt.gz"), 2),
    source("prose", "debian-faq", files("usr/share/doc/debian/FAQ/*.en.html"), 1),
    source("prose", "debian-history", files("usr/share/doc/debian-history/docs/*.en.html"), 1),
    source("prose", "fortunes", files("usr/share/games/fortunes/*", r"\.|ascii-art|art$"), 1),
    source("code", "libpython3.11-stdlib", code("usr/lib/python3.11/**/*.py", "argparse|/ast|tarfile|lib2to3/|_encodings|encodings/"), 3),
    source("code", "golang-1.19-src", code("usr/share/go-1.19/src/**/*.go", "_test|testdata|/z[a-z]+_|tables|vendor|rewrite|opGen", "//"), 3),
    source("code", "gnulib", code("usr/share/gnulib/lib/**/*.[ch]", "uniname|unictype|tables|test", "//"), 2),
    source("code", "libeigen3-dev", code("usr/include/eigen3/Eigen/**/*.h", "(?!)", "//"), 1.2),
    source("code", "perl-modules-5.36", code("usr/share/perl/5.36*/**/*.pm", "unicore|Unicode|Module/CoreList"), 1),
]


def unpack(package, folder):
    """(folder with the package's files, version)"""
    if not glob.glob(f"{folder}/{package}_*.deb"):
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archives = [pathlib.Path(path) for path in glob.glob(f"{folder}/{package}_*.deb")]
    if len(archives) != 1:
        sys.exit(f"{folder}: expected one archive of {package}, found {sorted(path.name for path in archives)}; keep the one that is meant")
    archive = archives[0]
    root = folder / archive.stem
    if not root.exists():
        partial = root.with_name(root.name + ".partial")  # what an interrupted run leaves
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
        partial.rename(root)
    return root, subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True).stdout.strip()


def clean(text, seen):
    """Without control characters, trailing blanks, and the paragraphs that `seen` holds; adds the others to it."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\ufeff", ""))
    kept = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"[ \t]+(?=\n|$)", "", text)):
        if len(paragraph) >= DISTINCT:
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(paragraph for paragraph in kept if paragraph).strip() + "\n"


def documents(pieces, seen):
    """(name of the first piece, text) of documents: pieces in order until a folder ends after LEAST bytes or MOST are full."""
    name, parts, size, folder = "", [], 0, None
    for piece, text in pieces:
        text = clean(text, seen)
        if len(text) < 400 or sum(c.isalpha() or c.isspace() for c in text) < WORDS * len(text):
            continue
        length, beside = len(text.encode()), str(pathlib.PurePath(piece).parent)
        if parts and (size + length > MOST or (size >= LEAST and beside != folder)):
            yield name, "\n\n".join(parts)
            parts, size = [], 0
        name = name if parts else piece
        parts.append(text)
        size, folder = size + length, beside
    if parts:
        yield name, "\n\n".join(parts)


def chosen(made, limit):
    """Documents in their order, at most `limit` bytes of them: those with the smallest hash of their name."""
    left, keep = limit, set()
    for name, text in sorted(made, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
        if len(text.encode()) <= left:
            left -= len(text.encode())
            keep.add(name)
    return [(name, text) for name, text in made if name in keep]


def refuse_documents_of_another_run(out):
    """They would stay among the new ones: the names of a run depend on its packages."""
    for entry in SOURCES:
        folder = out / (entry["held_out"] or f"train/{entry['kind']}")
        if any(folder.glob("*.txt")):
            sys.exit(f"{folder}: expected no documents yet, found some; remove the folder, or name another one")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--packages", type=pathlib.Path, help="where packages are kept and unpacked (OUT/packages)")
    arguments = parser.parse_args()
    packages = arguments.packages or arguments.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    refuse_documents_of_another_run(arguments.out)
    seen, rows = set(), []
    for entry in SOURCES:
        folder = arguments.out / (entry["held_out"] or f"train/{entry['kind']}")
        folder.mkdir(parents=True, exist_ok=True)
        root, version = unpack(entry["package"], packages)
        made = chosen(list(documents(entry["pieces"](root), seen)), entry["mb"] * 1_000_000)
        if not made:
            sys.exit(f"{entry['package']} {version}: expected documents of kind {entry['kind']}, found none: its files lie elsewhere in "
                     "this version; correct their pattern in SOURCES")
        size = 0
        for number, (_, text) in enumerate(made):
            name = f"{entry['kind']}-" if entry["held_out"] else ""
            (folder / f"{name}{entry['package']}-{number:04}.txt").write_text(text, encoding="utf-8")
            size += len(text.encode())
        rows.append({"folder": str(folder.relative_to(arguments.out)), "package": entry["package"], "version": version,
                     "documents": len(made), "bytes": size})
        print(f"{rows[-1]['folder']:<18} {entry['package']:<22} {len(made):>4} documents {size / 1e6:>6.2f} MB", flush=True)
    (arguments.out / "SOURCES.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
