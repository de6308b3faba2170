"""What the program is linked with."""
import re
import subprocess

from program import PROGRAM


# Some builds of torch export parts of a C++ library of their own, which would be taken instead of the system's.
def test_the_cxx_library_is_asked_before_torch():
    shown = subprocess.run(["readelf", "-d", str(PROGRAM)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", shown)
    cxx = next(i for i, name in enumerate(needed) if name.startswith("libstdc++.so"))
    torch = [i for i, name in enumerate(needed) if re.match(r"lib(torch|c10)", name)]
    assert torch and cxx < min(torch), needed
