"""Adapters as files (src/model/adapter.h): what their metadata says of budgets, and the same scorers with other budgets."""
import json


def read(path):
    """Header without metadata, metadata, and the bytes of the tensors. SystemExit names a file that is no adapter."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + size])
        metadata = header.pop("__metadata__")
        budgets(metadata)
    except OSError as error:
        raise SystemExit(f"{path}: expected an adapter, found {error.strerror.lower()}") from None
    except (ValueError, KeyError, AttributeError):
        raise SystemExit(f"{path}: expected an adapter as sparsek train writes it, found another file") from None
    return header, metadata, data[8 + size:]


def budgets(metadata):
    """(topk, window) of each layer."""
    if "layers" in metadata:
        return [tuple(map(int, layer.split("+"))) for layer in metadata["layers"].split(",")]
    return [(int(metadata["topk"]), int(metadata["window_size"]))] * int(metadata["num_layers"])


def text(layers):
    """As attention.layers and the metadata have it."""
    return ", ".join(f"{topk}+{window}" for topk, window in layers)


def write(path, layers, header, metadata, tensors):
    """The adapter with these budgets: format 2, topk and window_size are means."""
    metadata = metadata | {"format": "sparsek-adapter-2", "layers": text(layers)}
    for key, values in zip(("topk", "window_size"), zip(*layers)):
        metadata[key] = str((2 * sum(values) + len(values)) // (2 * len(values)))
    written = json.dumps({"__metadata__": metadata, **header}).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(len(written).to_bytes(8, "little") + written + tensors)
