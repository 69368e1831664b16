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
from collections.abc import Collection, Mapping
from functools import lru_cache

import numpy as np

from lorascope.array_types import Float
from lorascope.files.small_floats import round_to_bfloat16
from lorascope.files.typed_json import Finite, Positive, unreadable
from lorascope.formats.peft_factors import MAX_VALUES
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS
from lorascope.updates.linalg import as_float64
from lorascope.updates.random_projection import uniform_like_torch

Bases = tuple[Float[np.ndarray, "r 1 smaller"], Float[np.ndarray, "larger n r"]]


class RandLoRA(PeftFormat, frozen=True):
    """PEFT's RandLoRA: sum of products of random factors with trained scales."""

    kind, needs = "RandLoRA", "shapes"
    tensors = {"randlora_lambda": "r n", "randlora_gamma": "n smaller"}
    shared = {"randlora_A": "r 1 smallest", "randlora_B": "largest bases r"}
    frozen = ("randlora_A", "randlora_B")
    r: Positive = 32
    randlora_alpha: Finite = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    fan_in_fan_out: bool | None = None

    @property
    def scale(self) -> float:
        return self.randlora_alpha / self.r

    def common_sizes(self, shapes: Collection[tuple[int, int]]) -> dict[str, int]:
        # PEFT compares the largest number of outputs with the largest number of inputs.
        smallest, largest = sorted(map(max, zip(*shapes, strict=True)))
        return {"smallest": smallest, "largest": largest, "bases": -(-smallest // self.r)}

    def shared_tensors(self) -> Mapping[str, str]:
        return self.shared if self.save_projection else {}

    def required(self, module: PeftModule) -> dict[str, str]:
        n = -(-min(module.shape) // self.r)
        return {"randlora_lambda": f"r {n}", "randlora_gamma": f"{n} {min(module.shape)}"}

    def check(self, module: PeftModule) -> None:
        largest, smallest = module.sizes["largest"], module.sizes["smallest"]
        if not self.save_projection and largest * (smallest + self.r) > MAX_VALUES:
            raise unreadable(module.path, f"random factors must have <= {MAX_VALUES} values")

    def update(self, arrays: Arrays, module: PeftModule) -> Dense:
        if self.save_projection:
            A, B = arrays["randlora_A"], arrays["randlora_B"]
        else:
            A, B = map(as_float64, _draw_random_bases(self, module.sizes["smallest"], module.sizes["largest"]))
        scales, gamma = arrays["randlora_lambda"], arrays["randlora_gamma"]
        smaller, larger = sorted(module.shape)
        left = B[:larger, : scales.shape[1]].reshape(larger, -1)
        right = (scales[:, :, None] * A[:, :, :smaller] * gamma).reshape(-1, smaller)
        product = self.scale * (left @ right)
        return Dense(product if module.shape[1] == smaller else product.T)


@lru_cache(maxsize=1)
def _draw_random_bases(settings: RandLoRA, smaller: int, larger: int) -> Bases:
    """Draw the random factors as PEFT does with torch's generator on the CPU, divided by their standard deviations."""
    words, rank = np.random.RandomState(settings.projection_prng_key % SEEDS), settings.r
    n = -(-smaller // rank)
    if settings.sparse or settings.very_sparse:
        # Entries are -1, 0 or 1; a fraction of 1/6, or 1 / (2 sqrt(d)), is -1, and the same is 1.
        fraction = 1 / (2 * (np.sqrt(smaller) if settings.very_sparse else 3))
        signs = [uniform_like_torch(words, shape) for shape in ((rank, 1, smaller), (larger, n, rank))]
        A, B = (np.greater(X, 1 - fraction).astype(np.float32) - np.less(X, fraction) for X in signs)
        return A / A.std(ddof=1, dtype=np.float64), B / B.std(ddof=1, dtype=np.float64)
    # PEFT draws A first, then the bases of B one by one.
    A = _draw(words, (rank, 1, smaller))
    return _standardize(A), _standardize(np.concatenate([_draw(words, (larger, 1, rank)) for _ in range(n)], axis=1))


def _draw(words: np.random.RandomState, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw one random factor in bfloat16, as PEFT does; devices without bfloat16 draw others, in float16."""
    # torch's kaiming_uniform_ with a = sqrt(5) has the gain sqrt(2 / (1 + a^2)).
    bound = math.sqrt(3) * math.sqrt(2 / 6) / math.sqrt(shape[2])
    values = round_to_bfloat16(uniform_like_torch(words, shape, bound))
    largest = round_to_bfloat16(np.array([bound], np.float32))
    return np.where(values == largest, -largest, values)  # the upper end of the interval is excluded


def _standardize(values: np.ndarray) -> np.ndarray:
    # torch's std divides by n - 1, and its result has the dtype of the values.
    deviation = np.array([values.std(ddof=1, dtype=np.float64)], np.float32)
    return round_to_bfloat16(values / round_to_bfloat16(deviation))
