"""A build from the bundle: without network, with the packages it replaces hidden, in an empty folder."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Under /usr/include and the library folder: what the bundle replaces.
HEADERS = ("fmt", "nlohmann", "CLI", "toml++", "gtest", "gmock", "pcre2.h", "utf8proc.h", "zlib.h", "zconf.h")
LIBRARIES = ("libfmt.*", "libpcre2-8.*", "libutf8proc.*", "libz.a", "libgtest*", "libgmock*")


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)


def done(*command: object, **options: object) -> str:
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bundle")
    done(ROOT / "scripts/bundle.sh", "--without-cuda", folder / "bundle.tar.gz")
    done("tar", "-xf", folder / "bundle.tar.gz", cwd=folder)
    return folder / "sparsek-bundle"


def test_says_what_it_is(bundle: pathlib.Path) -> None:
    done("sha256sum", "-c", "--quiet", "SHA256SUMS", cwd=bundle)
    listed = {line.split()[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()}
    files = {f"./{path.relative_to(bundle)}" for path in bundle.rglob("*") if path.is_file()}
    assert listed == files - {"./SHA256SUMS"}
    manifest = (bundle / "MANIFEST").read_text()
    for line in (r"sparsek \d", r"commit \w+", r"g\+\+ \d", r"package libfmt-dev \d", r"package libpcre2-dev \d"):
        assert re.search(f"^{line}", manifest, re.MULTILINE), manifest
    assert sum(path.stat().st_size for path in bundle.rglob("*")) < 20 << 20


def shut_off(folder: pathlib.Path) -> list[str]:
    """A command prefix that takes away the network and what the bundle replaces; empty where the system forbids that."""
    nothing = folder / "nothing"
    nothing.mkdir()
    (folder / "empty").touch()
    libraries = pathlib.Path(done("pkg-config", "--variable=libdir", "libpcre2-8").strip())
    hidden = [pathlib.Path("/usr/include") / name for name in HEADERS]
    hidden += [path.resolve() for pattern in LIBRARIES for path in libraries.glob(pattern)]
    mounts = [f"mount --bind {nothing if path.is_dir() else folder / 'empty'} {path}" for path in hidden if path.exists()]
    namespaces = ["unshare", "--net", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    prefix = namespaces + ["bash", "-ec", "; ".join(mounts) + '; exec "$@"', "bash"]
    return prefix if run(*prefix, "true").returncode == 0 else []


def test_builds_without_the_packages(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    alone = shut_off(tmp_path)
    build = tmp_path / "build"
    done(*alone, "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DSPARSEK_BUNDLE={bundle}",
         f"-DSPARSEK_PYTHON={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug", cwd=tmp_path)  # fmt: skip
    # Between them they use every package but gmock's headers.
    targets = ("data_test", "src/cli/CMakeFiles/sparsek.dir/arguments.cc.o", "src/train/CMakeFiles/sparsek_train.dir/config_toml.cc.o")
    compiled = os.environ | {"CCACHE_DISABLE": "1"}  # a cache's answer may come from files that are not here
    done(*alone, "ninja", "-C", build, "-j", os.cpu_count(), *targets, env=compiled)
    done(*alone, build / "tests/data/data_test")
    lines = done("ninja", "-C", build, "-t", "deps").splitlines()
    read = {os.path.normpath(build / line.strip()) for line in lines if line.startswith(" ")}
    for name in HEADERS:
        pattern = re.compile(rf"/{re.escape(name)}(/|$)")
        found = {path for path in read if pattern.search(path.removeprefix(str(ROOT)))}
        assert (found or name == "gmock") and all(path.startswith(f"{bundle}/") for path in found), (name, found)
    needed = done("ldd", build / "tests/data/data_test")
    assert not re.search("pcre2|utf8proc|fmt|gtest|gmock", needed), needed


def test_refuses_other_kernels(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def configure(folder: pathlib.Path, cuda: str) -> str:
        result = run("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DSPARSEK_BUNDLE={folder}",
                     f"-DSPARSEK_CUDA={cuda}", f"-DSPARSEK_PYTHON={sys.executable}")  # fmt: skip
        assert result.returncode != 0, result.stdout
        return " ".join(result.stderr.split())

    stale = tmp_path / "stale"
    shutil.copytree(bundle, stale)
    (stale / "lib/libsparsek_cuda.a").touch()
    with (stale / "MANIFEST").open("a") as manifest:
        manifest.write("cuda_sources 0123\n")
    message = configure(stale, "ON")
    assert "expected CUDA libraries of these sources" in message and "found cuda_sources 0123" in message, message
    message = configure(tmp_path, "OFF")
    assert f"found no MANIFEST in {tmp_path}" in message, message
