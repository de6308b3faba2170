"""What the benchmarks on a GPU share: which card, and parts of which one may fail while the rest goes on."""
import gc
import subprocess

import torch


def attempt(what, *arguments):
    """What it returns, or {"failed": reason}."""
    try:
        return what(*arguments)
    except Exception as error:  # whatever a peer's libraries throw
        text = str(error).splitlines()
        return {"failed": f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def device():
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return {"name": torch.cuda.get_device_name(), "driver": driver.stdout.split("\n")[0].strip(), "cuda": torch.version.cuda, "torch": torch.__version__}
