"""Reads the machine code of the CUDA objects of a build: no kernel may spill or use local memory, and every kernel that
is built for matrix instructions must hold them. Needs no GPU.

    .venv/bin/python tests/kernels/cuda/check_machine_code.py build/cuda
"""
import glob
import json
import pathlib
import re
import shutil
import subprocess
import sys

# Kernels (of functions whose name matches) and the instruction without which they would be on a slower path.
MATRIX_KERNELS = [
    (re.compile(r"sm90::(attention_(fwd|bwd|bwd_dq)|window_(lse|mass))_kernel"), "HGMMA"),
    (re.compile(r"portable::.*attention.*kernel|^mass::(lse|mass)_kernel|decode::attend_kernel"), "HMMA"),
]
# The slowest file should compile in a minute on one core; the margin is for machines that do other work meanwhile.
MAX_SECONDS_A_FILE, MAX_SECONDS = 100, 480


def tool(name):
    beside_torch = glob.glob(f"{sys.prefix}/lib/python3*/site-packages/nvidia/cu13/bin/{name}")
    found = beside_torch[0] if beside_torch else shutil.which(name)
    if found is None:
        sys.exit(f"check_machine_code: {name} is not installed: run scripts/setup.sh cuda")
    return found


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def demangled(name):
    return output_of("c++filt", name).strip()


def kernels_of(path):
    """Per (architecture, kernel): its REG/STACK/LOCAL and the instructions that it holds."""
    kernels, arch, name = {}, None, None
    for line in output_of(tool("cuobjdump"), "--dump-resource-usage", str(path)).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "STACK:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            kernels[arch, name] = {**usage, "instructions": {}}
            name = None
    for line in output_of(tool("cuobjdump"), "--dump-sass", str(path)).splitlines():
        if match := re.match(r"\s*code for (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            instructions = kernels[arch, name]["instructions"]
            instructions[match[1]] = instructions.get(match[1], 0) + 1
    return kernels


def problems_of(arch, name, kernel):
    where = f"{demangled(name).split('(')[0]} ({arch})"
    instructions = kernel["instructions"]
    local = instructions.get("LDL", 0) + instructions.get("STL", 0)
    if kernel["STACK"] or kernel["LOCAL"] or local:
        yield f"{where}: wanted no local memory, found {kernel['STACK'] + kernel['LOCAL']} bytes and {local} accesses"
    if not instructions:
        yield f"{where}: found no instructions; did the format of cuobjdump change?"
    for pattern, wanted in MATRIX_KERNELS:
        if pattern.search(demangled(name).replace("void ", "").replace("sparsek::cuda::", "")) and not instructions.get(wanted):
            yield f"{where}: wanted {wanted} instructions, found none"


def objects_of(build):
    """Of the library's files that belong to the build today; what earlier ones left behind is not read, nor are tests."""
    commands = json.loads((build / "compile_commands.json").read_text())
    compiled = (re.search(r" -o (src/\S+\.cu\.o)", command["command"]) for command in commands)
    return sorted(build / match[1] for match in compiled if match)


def compile_seconds(build):
    """Of the CUDA objects that the build folder's last build compiled, by file."""
    seconds = {}
    for line in (build / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, target, *_ = line.split("\t")
        if target.endswith(".cu.o"):
            seconds[target] = (int(end) - int(start)) / 1000
    return seconds


def main():
    build = pathlib.Path(sys.argv[1])
    objects = objects_of(build)
    if not objects:
        sys.exit(f"check_machine_code: no CUDA objects under {build}/src: configure with `cmake --preset cuda` and build")
    problems, kernels, matrix = [], 0, 0
    for path in objects:
        for (arch, name), kernel in kernels_of(path).items():
            kernels += 1
            matrix += any(kernel["instructions"].get(wanted) for _, wanted in MATRIX_KERNELS)
            problems += problems_of(arch, name, kernel)
    seconds = compile_seconds(build)
    if seconds:
        slowest = max(seconds, key=seconds.get)
        print(f"compiled in {sum(seconds.values()):.0f} s, slowest {pathlib.Path(slowest).name} {seconds[slowest]:.0f} s: {slowest}")
        if seconds[slowest] > MAX_SECONDS_A_FILE:
            problems.append(f"{slowest}: wanted at most {MAX_SECONDS_A_FILE} s of compilation, took {seconds[slowest]:.0f} s")
        if sum(seconds.values()) > 2 * MAX_SECONDS:  # two cores
            problems.append(f"wanted at most {MAX_SECONDS} s of compilation on two cores, took {sum(seconds.values()):.0f} s of files")
    for problem in problems:
        print(problem)
    print(f"machine code: {len(objects)} objects, {kernels} kernels, {matrix} with matrix instructions, {len(problems)} problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
