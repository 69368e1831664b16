"""Time of the scores of all feed-forward neurons between two checkpoints, compared with copying all their tensors.

The two files have two layers of LLaMA-7B shape, including attention, and are in the page cache. The copy reads one
tensor after the other in its dtype and frees it. Peak memory is measured in a fresh process, relative to the memory
after its imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from measurements import MeasuredLine
from paired import compare, report

from lorascope.diagnosis.neuron_scores import neuron_scores
from lorascope.files.safetensors_io import TensorFile
from lorascope.updates.linalg import one_thread

LAYERS, WIDTH, FEED_FORWARD = 2, 4096, 11008
SHAPES = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
SHAPES |= {"mlp.gate_proj": (FEED_FORWARD, WIDTH), "mlp.up_proj": (FEED_FORWARD, WIDTH)}
SHAPES |= {"mlp.down_proj": (WIDTH, FEED_FORWARD)}
SIZES = {"F32": 4, "BF16": 2}
ROLES = {"all three": ("ffn_in", "ffn_gate", "ffn_out"), "input, output": ("ffn_in", "ffn_out")}
CHANGE, AIM = 1e-2, 1.5
# Peak memory of this program only: the peak in getrusage starts from the parent's memory.
PEAK = """
import re, sys
from pathlib import Path
from lorascope.diagnosis.neuron_scores import neuron_scores
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
before = peak()
neuron_scores(*sys.argv[1:])
print((peak() - before) / 1024)
"""


def weights(change: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and values of all tensors, changed by a fraction of their size."""
    draw = np.random.default_rng(0)
    noise = draw.standard_normal(1 << 26, dtype=np.float32) * np.float32(0.02)
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            start, other = draw.integers(len(noise) - np.prod(shape), size=2)
            values = noise[start : start + np.prod(shape)].reshape(shape)
            moved = noise[other : other + np.prod(shape)].reshape(shape)
            yield f"model.layers.{layer}.{name}.weight", values + np.float32(change) * moved


def write(file: Path, dtype: str, change: float) -> None:
    """Write a checkpoint as one safetensors file, tensor by tensor."""
    header, end = {}, 0
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            size = int(np.prod(shape)) * SIZES[dtype]
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            header[f"model.layers.{layer}.{name}.weight"] = entry
            end += size
    text = json.dumps(header).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, values in weights(change):
            bits = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
            stream.write(bits.data)


def copy(*files: Path) -> None:
    """Copy every tensor into new memory."""
    for file in map(TensorFile, files):
        for name in file:
            np.array(file.unread(name).stored)


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield ratio and memory for each dtype and set of neurons; a ratio has half the pairs."""
    for dtype, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder, one_thread():
            files = Path(folder) / "base.safetensors", Path(folder) / "tuned.safetensors"
            for file, change in zip(files, (0.0, CHANGE), strict=True):
                write(file, dtype, change)
            for label, roles in ROLES.items():
                scores, copies = partial(neuron_scores, *files, roles), partial(copy, *files)
                ratio = compare(scores, copies, max(3, pairs // 2), warmup=1)
                yield ratio.line(f"scores of two layers / copying them, {label}", dtype, AIM)
            peak = subprocess.run([sys.executable, "-c", PEAK, *files], capture_output=True, check=True).stdout
            layer = float(sum(map(np.prod, SHAPES.values()))) * size / 2**20
            yield MeasuredLine(what="peak memory / one layer", case=dtype, value=float(peak) / layer, pairs=1, aim=1)


if __name__ == "__main__":
    report(lines, __doc__)
