"""Time of ``lorascope inspect`` for a large adapter, compared with an import of numpy and safetensors, and with peers.

The times are CPU seconds of whole processes, which take turns. The peers are two other programs that measure the norms
and ranks of an adapter, if they are installed (``pip install adaptersentry gradience``). A steep spectrum has an
ill-conditioned B, which needs another algorithm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from measurements import MeasuredLine
from paired import median_interval, report


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like model and the rank of its adapter."""

    layers: int
    width: int
    key_width: int
    feed_forward: int
    rank: int

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (out, in) of the linears in a block."""
        d, kv, ff = self.width, self.key_width, self.feed_forward
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        inner = {"gate_proj": (ff, d), "up_proj": (ff, d), "down_proj": (d, ff)}
        return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in inner.items()}


SHAPES = {
    "7B, rank 16": Shape(32, 4096, 4096, 11008, 16),
    "70B, rank 64": Shape(80, 8192, 1024, 28672, 64),
}
# Singular values of real adapters decay; a steep decay needs the slower QR route.
FALL = {"gentle": 3.0, "steep": 9.0}
SECONDS, IMPORTS = {"7B, rank 16": 2.0, "70B, rank 64": 15.0}, {"7B, rank 16": 2.5}
"""Aims of the seconds, and of the ratio to the imports, by shape."""


def factors(shape: Shape, fall: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and bfloat16 values of all factors, layer by layer."""
    draw = np.random.default_rng(0)
    noise = draw.standard_normal(1 << 22, dtype=np.float32)
    decay = np.exp(-fall * np.linspace(0, 1, shape.rank, dtype=np.float32))
    for layer in range(shape.layers):
        for number, (name, (outer, inner)) in enumerate(shape.modules().items()):
            size = np.float32(0.2 + layer / shape.layers * (0.3 + 0.1 * number))
            if (layer, number) == (0, 0):
                size = np.float32(0)
            for factor, rows, columns, scale in (
                ("A", shape.rank, inner, np.float32(inner**-0.5)),
                ("B", outer, shape.rank, size * decay * np.float32(1e-2)),
            ):
                start = int(draw.integers(len(noise) - rows * columns))
                values = noise[start : start + rows * columns].reshape(rows, columns) * scale
                bits = (values.view(np.uint32) >> 16).astype(np.uint16)
                yield f"base_model.model.model.layers.{layer}.{name}.lora_{factor}.weight", bits


def write(folder: Path, shape: Shape, fall: float) -> Path:
    """Write a PEFT folder of this shape and return its weights file."""
    header: dict[str, dict] = {}
    end = 0
    for name, bits in factors(shape, fall):
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [end, end + bits.nbytes]}
        end += bits.nbytes
    text = json.dumps(header).encode()
    file = folder / "adapter_model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, bits in factors(shape, fall):
            stream.write(bits.tobytes())
    config = {"peft_type": "LORA", "r": shape.rank, "lora_alpha": 2 * shape.rank, "base_model_name_or_path": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return file


def programs(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of the interpreter for each program that is installed."""
    found = {"imports": ["-c", "import numpy, safetensors"], "lorascope": inspect(folder)}
    if find_spec("adaptersentry"):
        found["adaptersentry"] = ["-m", "adaptersentry", "scan", str(folder / "adapter_model.safetensors")]
    if find_spec("gradience"):
        found["gradience"] = ["-m", "gradience", "audit", "--peft-dir", str(folder)]
    return found


def inspect(folder: Path) -> list[str]:
    """Return the arguments of the interpreter for ``lorascope inspect``."""
    return ["-m", "lorascope.cli", "inspect", str(folder)]


def measure(words: list[str]) -> tuple[float, float]:
    """Return CPU seconds and peak MB of a process."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words[:3])} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield seconds, memory and ratios for each shape and spectrum; a process has an eighth of the pairs as repeats."""
    repeats = max(3, pairs // 8)
    for name, shape in SHAPES.items():
        for fall, steepness in FALL.items():
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), shape, steepness)
                tried = programs(Path(folder))
                rounds = np.array([[measure(words) for words in tried.values()] for _ in range(repeats)])
            seconds, memory = (dict(zip(tried, rounds[..., column].T, strict=True)) for column in (0, 1))
            own, case = seconds["lorascope"], f"{fall} spectra"
            whole = f"inspect of {name}"
            yield interval(whole, case, own, "s", aim=SECONDS[name])
            yield interval(f"{whole} / the imports", case, own / seconds["imports"], aim=IMPORTS.get(name))
            for peer in [*tried][2:]:
                yield interval(f"{peer} / {whole}", case, seconds[peer] / own, aim=1, at_least=True)
            yield interval(f"peak memory, {whole}", case, memory["lorascope"], "MB")


def interval(what: str, case: str, values: np.ndarray, unit: str = "", **aim: Any) -> MeasuredLine:
    """Return the median of repeats as a line."""
    value, low, high = median_interval(values)
    return MeasuredLine(what=what, case=case, value=value, low=low, high=high, unit=unit, pairs=len(values), **aim)


if __name__ == "__main__":
    report(lines, __doc__)
