"""Texts of different kinds for measuring quality, all from Debian packages:
bible-kjv, anarchism, debian-handbook, perl-doc, postgresql-doc-15, python3.11-doc (and the C headers and Python sources
that every development machine has). Prints which package is missing.
"""
import gzip
import html.parser
import pathlib
import re
import subprocess
import sys

from common import ROOT

FOLDER = ROOT / "build/texts"
MIN_BYTES = 120_000  # enough for 18K tokens and more


class _Text(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts, self.skipping = [], 0

    def handle_starttag(self, tag, attributes):
        self.skipping += tag in ("script", "style", "head")

    def handle_endtag(self, tag):
        self.skipping -= tag in ("script", "style", "head")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data)


def _html(paths):
    for path in paths:
        parser = _Text()
        opener = gzip.open if path.suffix == ".gz" else open
        parser.feed(opener(path, "rt", encoding="utf-8", errors="replace").read())
        yield re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts))


def _plain(paths):
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


def _glob(folder, pattern):
    return sorted(pathlib.Path(folder).glob(pattern))


# name -> (kind, package, pieces of text)
SOURCES = {
    "bible": ("archaic prose", "bible-kjv",
              lambda: [subprocess.run(["bible", "gen1:1-exo40:38"], check=True, capture_output=True, text=True).stdout]),
    "anarchism": ("essays", "anarchism", lambda: _html(_glob("/usr/share/doc/anarchism/html", "sec[B-D]*.html*"))),
    "handbook": ("system administration handbook", "debian-handbook",
                 lambda: _html(_glob("/usr/share/doc/debian-handbook/html/en-US", "sect.*.html"))),
    "postgres": ("database manual", "postgresql-doc-15",
                 lambda: _html(_glob("/usr/share/doc/postgresql-doc-15/html", "sql-*.html"))),
    "python-manual": ("language manual, reStructuredText", "python3.11-doc",
                      lambda: _plain(_glob("/usr/share/doc/python3.11/html/_sources/library", "a*.rst.txt"))),
    "python-code": ("Python source", "libpython3.11-stdlib",
                    lambda: _plain([pathlib.Path("/usr/lib/python3.11") / f"{name}.py" for name in ("argparse", "ast", "tarfile")])),
    "c-headers": ("C headers", "linux-libc-dev", lambda: _plain(_glob("/usr/include/linux", "[n-v]*.h"))),
    "licences": ("legal text", "base-files",
                 lambda: _plain([pathlib.Path("/usr/share/common-licenses") / name
                                 for name in ("GPL-3", "LGPL-2.1", "GFDL-1.3", "MPL-2.0", "Apache-2.0")])),
}


def prepare():
    """Writes the texts and returns {name: (kind, path)} of those that could be made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, (kind, package, pieces) in SOURCES.items():
        path = FOLDER / f"{name}.txt"
        if not path.exists():
            try:
                text = ""
                for piece in pieces():
                    text += piece + "\n"
                    if len(text) > 4 * MIN_BYTES:
                        break
            except FileNotFoundError:
                text = ""
            if len(text) < MIN_BYTES // 2:
                print(f"texts: {name} left out: install the Debian package {package}", file=sys.stderr)
                continue
            path.write_text(text[: 4 * MIN_BYTES], encoding="utf-8")
        made[name] = (kind, path)
    return made


if __name__ == "__main__":
    for name, (kind, path) in prepare().items():
        print(f"{name:<14} {path.stat().st_size:>8} bytes  {kind}")
