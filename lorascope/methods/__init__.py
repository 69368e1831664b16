"""Fine-tuning methods, one file per paper; a new method adds its import line here."""

from lorascope.methods.adalora import AdaLoRA
from lorascope.methods.adapprox import Adapprox, AdapproxOptimizer
from lorascope.methods.alora import ALoRA
from lorascope.methods.autolora import AutoLoRA
from lorascope.methods.base import METHODS
from lorascope.methods.fourierft import FourierFT
from lorascope.methods.full import Full
from lorascope.methods.hydralora import HydraLoRA
from lorascope.methods.lisa import LISA
from lorascope.methods.lora import LoRA
from lorascope.methods.neft import NeFT

__all__ = [
    "LISA",
    "METHODS",
    "ALoRA",
    "AdaLoRA",
    "Adapprox",
    "AdapproxOptimizer",
    "AutoLoRA",
    "FourierFT",
    "Full",
    "HydraLoRA",
    "LoRA",
    "NeFT",
]
