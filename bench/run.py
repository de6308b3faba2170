"""All CPU benchmarks, one after the other; --peers adds llama.cpp."""
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
for script in (["attention.py"], ["model.py", *sys.argv[1:]], ["memory.py"], ["quality.py"],
               ["quality.py", "--sweep"], ["quality.py", "--slopes"], ["quality.py", "--context"], ["parity.py"]):
    print(f"== {' '.join(script)}", flush=True)
    subprocess.run([sys.executable, FOLDER / script[0], *script[1:]], check=True)
