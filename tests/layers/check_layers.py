"""Checks that includes follow the arrows of docs/architecture.md and that paths quoted in the docs exist."""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What each folder of src/ may include. The longest prefix of a file's folder decides.
ALLOWED = {
    "base": {"base"},
    "kernels": {"base", "kernels"},
    "kernels/reference": {"base", "kernels/params.h", "kernels/reference"},
    "kernels/cpu": {"base", "kernels/params.h", "kernels/cpu"},
    "data": {"base", "data"},
    "ops": {"base", "kernels", "ops"},
    "model": {"base", "kernels", "ops", "data", "model"},
    "eval": {"base", "data", "model", "eval", "ops"},
    "infer": {"base", "data", "model", "ops", "infer"},
    "train": {"base", "kernels/params.h", "data", "ops", "model", "eval", "train"},
    "cli": {"base", "data", "model", "ops", "eval", "infer", "train", "cli", "kernels"},
}
FOLDERS = {path.split("/")[0] for path in ALLOWED}
FORBIDDEN_BELOW_OPS = re.compile(r"^(torch|ATen|c10)/")


def allowed_for(folder):
    while folder not in ALLOWED:
        folder = folder.rpartition("/")[0]
        if not folder:
            return None
    return ALLOWED[folder]


def main():
    problems = []
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix not in {".h", ".cc", ".cu", ".cuh"}:
            continue
        relative = path.relative_to(ROOT / "src").as_posix()
        allowed = allowed_for(str(pathlib.PurePosixPath(relative).parent))
        if allowed is None:
            problems.append(f"src/{relative}: its folder is not in the table of tests/layers/check_layers.py")
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if not match:
                continue
            included = match[1]
            if included.split("/")[0] in FOLDERS and (ROOT / "src" / included).exists():
                if not any(included == entry or included.startswith(entry + "/") for entry in allowed):
                    problems.append(f"src/{relative}:{number}: includes {included}, which lies to its right")
                if "kernels/reference" in included and not relative.startswith("kernels/reference"):
                    problems.append(f"src/{relative}:{number}: only tests link the reference")
            if relative.split("/")[0] in {"base", "kernels", "data"} and FORBIDDEN_BELOW_OPS.match(included):
                problems.append(f"src/{relative}:{number}: includes {included}: no torch below ops")
    # What git holds, not what lies here: a file that a command made (or that waits to be added) is missing in a clone. The documents
    # name what commands write under build/ too; that is nobody's to keep.
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines())
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if not document.exists():
            continue
        for quoted in re.findall(r"`([\w./-]+\.(?:h|cc|py|md|sh|json|txt|cmake|toml))`", document.read_text()):
            if "/" in quoted and not quoted.startswith("build/") and not tracked & {quoted, f"src/{quoted}"}:
                problems.append(f"{document.relative_to(ROOT)}: quotes `{quoted}`, which git does not hold")
    print("\n".join(problems) or "layers: includes follow the arrows, quoted paths exist")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
