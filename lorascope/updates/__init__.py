"""Weight updates: their forms, ranks, subspaces and the rotation of neurons."""

from lorascope.updates.fourier import Fourier
from lorascope.updates.kronecker import Kronecker
from lorascope.updates.linalg import (
    effective_rank,
    energy_rank,
    entropy_rank,
    participation_rank,
    phi,
    phi_matrix,
    principal_angles,
    projected_norm,
    stable_rank,
    subspace_similarity,
)
from lorascope.updates.low_rank import LowRank, Mixture, Residual, change_norms, spectra
from lorascope.updates.neuron_angles import NeuronChange, factored_change, neuron_change
from lorascope.updates.random_projection import RandomProjection
from lorascope.updates.weight_decomposed import WeightDecomposed
from lorascope.updates.weight_update import FORMS, Dense, Update, constant_factors, form_named, from_factors

__all__ = [
    "FORMS",
    "Dense",
    "Fourier",
    "Kronecker",
    "LowRank",
    "Mixture",
    "NeuronChange",
    "RandomProjection",
    "Residual",
    "Update",
    "WeightDecomposed",
    "change_norms",
    "constant_factors",
    "effective_rank",
    "energy_rank",
    "entropy_rank",
    "factored_change",
    "form_named",
    "from_factors",
    "neuron_change",
    "participation_rank",
    "phi",
    "phi_matrix",
    "principal_angles",
    "projected_norm",
    "spectra",
    "stable_rank",
    "subspace_similarity",
]


def __dir__() -> list[str]:
    return __all__
