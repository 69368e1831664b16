"""Time of ``lorascope inspect`` for a large adapter, compared with an import of numpy and safetensors, and with peers.

python benchmarks/inspect_adapter.py --shapes 7b 70b --peers

Prints wall-clock and CPU seconds of the whole process, peak memory, and the ratios of CPU seconds to an interpreter
that only imports numpy and safetensors, and to two other programs that measure the norms and ranks of an adapter (pip
install adaptersentry gradience). The programs take turns, and each number is the smallest of the repeats, because other
jobs on the machine increase it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
    "7b": Shape(32, 4096, 4096, 11008, 16),
    "70b": Shape(80, 8192, 1024, 28672, 64),
}
# Singular values of real adapters decay; a steep decay needs the slower QR route.
FALL = {"gentle": 3.0, "steep": 9.0}


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


def programs(folder: Path, peers: bool) -> dict[str, list[str]]:
    """Return the arguments of the interpreter for each program."""
    found = {
        "imports": ["-c", "import numpy, safetensors"],
        "lorascope": ["-m", "lorascope.cli", "inspect", str(folder)],
    }
    if peers:
        found["adaptersentry"] = ["-m", "adaptersentry", "scan", str(folder / "adapter_model.safetensors")]
        found["gradience"] = ["-m", "gradience", "audit", "--peft-dir", str(folder)]
    return found


def measure(words: list[str]) -> tuple[float, float, float]:
    """Return wall-clock seconds, CPU seconds and peak MB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words[:3])} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b"])
    parser.add_argument("--falls", nargs="+", choices=FALL, default=list(FALL))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.shapes:
        for fall in arguments.falls:
            with tempfile.TemporaryDirectory() as folder:
                file = write(Path(folder), SHAPES[name], FALL[fall])
                print(f"{name}, {fall} spectra, {file.stat().st_size / 2**20:.0f} MB")
                tried = programs(Path(folder), arguments.peers)
                rounds = [[measure(words) for words in tried.values()] for _ in range(arguments.repeats)]
            least = dict(zip(tried, np.min(rounds, axis=0), strict=True))
            for program, (wall, cpu, memory) in least.items():
                ratios = f"{cpu / least['imports'][1]:6.1f} x imports  {cpu / least['lorascope'][1]:5.2f} x lorascope"
                print(
                    f"  {program:<14} wall {wall:6.2f} s  CPU {cpu:6.2f} s  peak {memory:5.0f} MB  {ratios}", flush=True
                )


if __name__ == "__main__":
    main()
