"""CPU attention beside torch's scaled_dot_product_attention, both in one process (`sparsek bench attention`).

    python bench/attention.py    -> bench/results/attention_cpu.json
"""
from common import save, sparsek

RUNS = {
    "forward bf16": ["--dtype", "bf16", "--seqlen", "1024,2048,4096,8192,16384,32768,131072"],
    "forward f32": ["--dtype", "f32", "--seqlen", "1024,2048,4096,8192,16384,32768,131072"],
    "forward+backward bf16": ["--dtype", "bf16", "--backward", "--seqlen", "2048,8192,32768"],
    "forward+backward f32": ["--dtype", "f32", "--backward", "--seqlen", "2048,8192,32768"],
    "forward bf16, rising scores": ["--dtype", "bf16", "--scores", "rising", "--no-dense", "--seqlen", "32768"],
    "forward f32, rising scores": ["--dtype", "f32", "--scores", "rising", "--no-dense", "--seqlen", "32768"],
}


def main():
    results = {}
    for name, options in RUNS.items():
        dense_to_32k = "131072" in options[-1]
        if dense_to_32k:  # dense at 128K would take minutes and say nothing new
            results[name] = sparsek("bench", "attention", *options[:-1], options[-1].replace(",131072", ""))
            results[name]["results"] += sparsek("bench", "attention", *options[:-1], "131072", "--no-dense")["results"]
        else:
            results[name] = sparsek("bench", "attention", *options)
        for row in results[name]["results"]:
            dense = f"  dense {row['dense']['median_ms']:.1f} ms  ratio {row['dense_over_sparsek']:.1f}" if "dense" in row else ""
            print(f"{name:<28} T {row['seqlen']:>7}: {row['sparsek']['median_ms']:.2f} ms, select {row['select']['median_ms']:.2f}, "
                  f"window_mass {row['window_mass']['median_ms']:.2f}{dense}", flush=True)
    save("attention_cpu", "python bench/attention.py", {"runs": results})


if __name__ == "__main__":
    main()
