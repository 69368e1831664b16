"""Reader of PEFT RandLoRA folders.

The update is a sum of n products of rank r with random factors, which all modules share, scaled by two trained
matrices, ``randlora_lambda`` (r, n) and ``randlora_gamma`` (n, smaller side):

    dW = alpha / r sum_j B_j diag(lambda_j) A diag(gamma_j), transposed if a weight has more inputs than outputs

The random factors are stored as ``base_model.randlora_A`` (r, 1, smallest side) and ``base_model.randlora_B``
(largest side, bases, r), and a second time under every module, unless ``save_projection`` is false. Then they are drawn
from ``projection_prng_key``, which requires the shapes of all modules. Shapes are read from the base model.

Source: Albert et al. (arXiv 2502.00987), equation 5. The rows of the right factor are ordered by component, then by
base, and the columns of the left one by base, then by component, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.safetensors_io import TensorFile, round_to_bfloat16
from lorascope.files.typed_json import Finite, Positive, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_shapes, peft_factors, shared_factor
from lorascope.formats.peft_lora import CONFIG, MAX_VALUES, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS
from lorascope.updates.linalg import as_float64
from lorascope.updates.random_projection import uniform

Bases = tuple[Float[np.ndarray, "r 1 smaller"], Float[np.ndarray, "larger n r"]]


class RandLoraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 32
    randlora_alpha: Finite = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "RANDLORA", "RandLoRA (PEFT)", needs="base")
def read_randlora(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened RandLoRA folder."""
    settings = to_typed(config, RandLoraConfig, path / CONFIG)
    rank, transposed = settings.r, bool(settings.fan_in_fan_out)
    found, others = peft_factors(path, files, "randlora_lambda|randlora_gamma")
    weights = base_with_shapes(path, config, base, "RandLoRA")
    shapes = {module: weights.shape(module, transposed) for module in found}
    outer, inner = (max(sides[axis] for sides in shapes.values()) for axis in (0, 1))
    smaller, larger = sorted((outer, inner))
    if settings.save_projection:
        A, B = (shared_factor(path, files, f"randlora_{name}") for name in "AB")
        wanted = {"randlora_A": f"{rank} 1 {smaller}", "randlora_B": f"{larger} {-(-smaller // rank)} {rank}"}
        check_shapes(path, "all modules", {"randlora_A": A, "randlora_B": B}, wanted)
        bases = partial(_read_bases, A.file, A.name, B.file, B.name)
    else:
        if larger * (smaller + rank) > MAX_VALUES:
            raise unreadable(path, f"random factors must have <= {MAX_VALUES} values")
        bases = partial(draw_bases, settings, smaller, larger)
    parts = {}
    for module, factors in found.items():
        side, scale = min(shapes[module]), settings.randlora_alpha / rank
        dimensions = {"randlora_lambda": "r n", "randlora_gamma": "n smaller"}
        check_shapes(path, module, factors, dimensions, r=rank, n=-(-side // rank), smaller=side)
        build = partial(_sum_of_bases, bases, shapes[module], scale)
        parts[module] = StoredFactors(factors, shapes[module], side, build, scale, transposed, thin=False)
    others = tuple(name for name in others if not name.endswith(("randlora_A", "randlora_B")))
    return AdapterFiles(path, dict(config), parts, others, files, "RandLoRA", named_base(config) is None)


def _read_bases(A_file: TensorFile, A: str, B_file: TensorFile, B: str) -> Bases:
    return A_file[A], B_file[B]


@lru_cache(maxsize=1)
def draw_bases(settings: RandLoraConfig, smaller: int, larger: int) -> Bases:
    """Draw the random factors as PEFT does with torch's generator on the CPU, divided by their standard deviations."""
    words, rank = np.random.RandomState(settings.projection_prng_key % SEEDS), settings.r
    n = -(-smaller // rank)
    if settings.sparse or settings.very_sparse:
        fraction = 1 / (2 * (np.sqrt(smaller) if settings.very_sparse else 3))
        drawn = [uniform(words, shape) for shape in ((rank, 1, smaller), (larger, n, rank))]
        A, B = (np.greater(X, 1 - fraction).astype(np.float32) - np.less(X, fraction) for X in drawn)
        return A / A.std(ddof=1, dtype=np.float64), B / B.std(ddof=1, dtype=np.float64)
    A = _draw(words, (rank, 1, smaller))
    return _standardize(A), _standardize(np.concatenate([_draw(words, (larger, 1, rank)) for _ in range(n)], axis=1))


def _draw(words: np.random.RandomState, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw one random factor in bfloat16, as PEFT does; devices without bfloat16 draw others, in float16."""
    bound = math.sqrt(3) * math.sqrt(2 / 6) / math.sqrt(shape[2])
    drawn, largest = round_to_bfloat16(uniform(words, shape, bound)), round_to_bfloat16(np.array([bound], np.float32))
    return np.where(drawn == largest, -largest, drawn)  # the upper end of the interval is excluded


def _standardize(values: np.ndarray) -> np.ndarray:
    deviation = np.array([values.std(ddof=1, dtype=np.float64)], np.float32)
    return round_to_bfloat16(values / round_to_bfloat16(deviation))


def _sum_of_bases(
    bases: Callable[[], Bases], sides: tuple[int, int], scale: float, arrays: dict[str, np.ndarray]
) -> Dense:
    A, B = map(as_float64, bases())
    weights, gamma = as_float64(arrays["randlora_lambda"]), as_float64(arrays["randlora_gamma"])
    smaller, larger, n = min(sides), max(sides), weights.shape[1]
    left = B[:larger, :n].reshape(larger, -1)
    right = (weights[:, :, None] * A[:, :, :smaller] * gamma).reshape(-1, smaller)
    product = scale * (left @ right)
    return Dense(product if sides[1] == smaller else product.T)
