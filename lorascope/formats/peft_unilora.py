"""Reader of PEFT Uni-LoRA folders.

The entries of A (r, in) and B (out, r) are values of one vector that all modules share, ``unilora_theta_d``, at
``unilora_indices_A`` and ``unilora_indices_B``, times ``unilora_scales_A`` and ``unilora_scales_B``. The update is B A.
Without ``save_indices`` the folder has only the vector, and PEFT merges it.

Source: Li et al. (arXiv 2506.00799), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule, Sizes
from lorascope.updates import LowRank


class UniLoRA(PeftFormat, frozen=True):
    """PEFT's Uni-LoRA: product of factors whose entries are values of one vector."""

    kind = "Uni-LoRA"
    tensors = {
        "unilora_indices_A": "r in",
        "unilora_indices_B": "out r",
        "unilora_scales_A": "r in",
        "unilora_scales_B": "out r",
    }
    shared = {"unilora_theta_d": "length*"}
    frozen = ("unilora_scales_A", "unilora_scales_B")
    r: Positive = 4
    save_indices: bool = False
    fan_in_fan_out: bool | None = None

    def requires_peft(self, files: Iterable[TensorFile]) -> bool:
        return not self.save_indices

    def check(self, module: PeftModule) -> None:
        for side in "AB":
            module.check_indices(f"unilora_indices_{side}", module.sizes["length"])

    def rank(self, sizes: Sizes) -> int:
        return self.r

    def update(self, arrays: Arrays) -> LowRank:
        theta = arrays["unilora_theta_d"].reshape(-1)
        A, B = (theta[arrays[f"unilora_indices_{side}"]] * arrays[f"unilora_scales_{side}"] for side in "AB")
        return LowRank(B, A)
