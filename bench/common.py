"""What the benchmarks share: the program, the machine and commit in every result, and where results go."""
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "build/release/sparsek"
RESULTS = ROOT / "bench/results"


def environment():
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    git = lambda *args: subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True).stdout.strip()
    unpacked = ROOT / "COMMIT"  # written where the sources travel without their history (scripts/bundle.sh)
    return {
        "commit": unpacked.read_text().strip() if unpacked.exists() else git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()}, {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def sparsek(*arguments, program=PROGRAM):
    """Runs the program with --json and gives the object it prints."""
    command = [str(program), *map(str, arguments), "--json"]
    environment = {"OMP_PROC_BIND": "true", **os.environ}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise RuntimeError(f"exit code {result.returncode}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(result.stdout)


def save(name, command, results, output=None, quiet=False):
    """Writes bench/results/NAME.json, or the file `output`."""
    path = pathlib.Path(output) if output else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "environment": environment(), **results}, indent=1) + "\n")
    if not quiet:
        print(f"wrote {path}")


def loss_from(result, begin):
    """Mean loss of the targets at positions >= begin of a `perplexity --json` object."""
    parts = [(bucket["to"] - bucket["from"], bucket["loss"]) for bucket in result["loss_by_position"] if bucket["from"] >= begin]
    return sum(width * loss for width, loss in parts) / sum(width for width, _ in parts)
