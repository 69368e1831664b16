"""First edition: the statistics of the 21 claims that it decided, on a small encoder and small decoders.

Its verdicts follow from its registration. All other claims of it were withdrawn, retired, or replaced by the second
edition; see ``docs/edition-1.md``. An effect is the statistic of the claim minus its control, one value per seed, per
seed and test row, or per pair of seeds. Accuracies are fractions, and losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd

from lorascope.analysis.planted_ranks import mean_rank_error, rank_correlation
from lorascope.analysis.rank_allocations import depth_thirds, kendall_tau
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.statistics import Accuracy, Combined, Constant, OfRun, Reads, Statistic

# Accuracies are on the sentiment of English sentences. Word counts are a baseline without a neural network, the same
# for every seed. The two runs of a pair never share a seed: a smaller random A equals the first rows of a larger one.
FULL, LORA, WORDS = "full fine-tuning", "LoRA, rank 8", "TF-IDF, logistic regression"


@dataclass(frozen=True)
class DirectionChange(Statistic):
    """Increase in training of phi(1, 1), between the A's of LoRA of rank 8 and of rank 64 with other seeds.

    The table ``phi`` has the squared cosine of the first right singular vectors, mean over modules, before and after
    training, for each pair of runs.
    """

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        pairs = pd.concat([evidence.table("phi", LORA, seed) for seed in seeds])
        changes = pairs.assign(change=pairs["end"] - pairs["start"]).pivot(
            index="seed", columns="other_seed", values="change"
        )
        return changes.reindex(index=list(seeds), columns=list(seeds)).to_numpy()


def _log_amplification(table: pd.DataFrame) -> float:
    """Compute log10 of the norm of W between eight directions of the update, over that between random ones."""
    return float((np.log10(table["update"]) - np.log10(table["random"])).mean())


# AdaLoRA starts with rank 12 in each of 36 modules, and ends with 8 on average.
ADALORA = "AdaLoRA, from rank 12 to 8"


def _top_fraction(table: pd.DataFrame) -> float:
    """Compute the fraction of the total rank in the top third of the layers."""
    return float(table["value"].where(depth_thirds(table) == "top", 0).sum() / table["value"].sum())


def _rank_tau(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute Kendall's tau-b between the ranks of two runs; 0 if all ranks of one are equal."""
    ranks = first.merge(second, on="module", suffixes=("_1", "_2"))[["value_1", "value_2"]]
    # Equal ranks have no order: the agreement is not defined, and counts as none.
    return float(np.nan_to_num(kendall_tau(ranks.to_numpy(np.float64).T)[0, 1]))


@dataclass(frozen=True)
class OfRunPairs(Statistic):
    """Value of each pair of runs of an arm with different seeds, from a kept table: (seed, seed)."""

    value: Callable[[pd.DataFrame, pd.DataFrame], float]
    table: str
    arm: str

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        tables = [evidence.table(self.table, self.arm, seed) for seed in seeds]
        values = np.full((len(seeds), len(seeds)), np.nan)
        for i, j in combinations(range(len(seeds)), 2):
            values[i, j] = values[j, i] = self.value(tables[i], tables[j])
        return values


# 1536 coefficients have as many parameters as LoRA of rank 2 in the query and value weights, which are 384 x 384. The
# other bases are scaled to the expected norm of a Fourier update. In the toy task, all adapters have 128 parameters.
FOURIER, FEW = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients"
RANDOM, ORTHOGONAL = f"{FOURIER}, random basis", f"{FOURIER}, orthogonal basis"
BANDS = tuple(f"{FOURIER}, band around {center}" for center in (0, 100, 240))
TOY_FOURIER, TOY_RANDOM = "FourierFT", "random basis"
TOY_LORA = ("LoRA, rank 1, lr 0.01", "LoRA, rank 1, lr 0.1")


def _gain(arm: str, control: str) -> Combined:
    """Return the accuracy of an arm minus that of another one, as fractions: (seed, row)."""
    return (Accuracy(arm) - Accuracy(control)) / 100.0


@dataclass(frozen=True)
class BestBandElsewhere(Statistic):
    """Accuracy of the band with the best mean on the other seeds, minus that of uniform entries: (seed,)."""

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        *bands, uniform = (Accuracy(arm)(evidence, seeds).mean(axis=1) / 100 for arm in (*BANDS, FOURIER))
        accuracies = np.stack(bands)
        # A choice on the seed itself would favor the best of several by chance. Sums order arms as means do.
        on_other_seeds = accuracies.sum(axis=1, keepdims=True) - accuracies
        return np.take_along_axis(accuracies, on_other_seeds.argmax(axis=0)[None], axis=0)[0] - uniform


def _best_accuracy(table: pd.DataFrame) -> float:
    """Return the best training accuracy on eight classes of points, with an adapter of 128 parameters."""
    return float(table["best_accuracy"].item())


def _log_epochs(table: pd.DataFrame) -> float:
    """Return log10 of the epochs until all points were right, or of all epochs."""
    return float(np.log10(table["epochs"].item()))


_best, _logged = partial(OfRun, _best_accuracy, "course"), partial(OfRun, _log_epochs, "course")

# Neurons are chosen after a third of the steps, by their cosine distance from the base. NeFT of 3% and 6% reversed also
# trains those that rotate least.
NEFT, REVERSED = "NeFT, 9%", "NeFT, 3% and 6% reversed"


def _overlap(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the overlap of two selections of neurons, as a fraction of the smaller one."""
    return len(first.merge(second, on=["module", "neuron"])) / min(len(first), len(second))


def _pooled_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the chance overlap of random selections from all modules together."""
    # A neuron of the smaller selection is in the larger one with this probability.
    return max(len(first), len(second)) / float(first["pool"].iloc[0])


def _module_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the chance overlap of random selections with as many neurons in every module."""
    counts, other_counts = first["module"].value_counts(), second["module"].value_counts()
    sizes = pd.concat([first, second]).groupby("module")["size"].first()
    return float((counts * other_counts / sizes).sum() / min(len(first), len(second)))


def _mean_shift(table: pd.DataFrame) -> float:
    """Return the mean shift of neurons in utilization rank from NeFT of 3% with the same seed, as a fraction."""
    return float(table["value"].item())


# Optimizers pre-train a small GPT-2 on the sentences, each at the best of three learning rates. Allocators learn from
# teachers whose update has a known rank in every module.
ADAPPROX, CAME = "Adapprox, pre-training", "CAME, pre-training"
PLANTED_ADALORA, PLANTED_AUTOLORA, PLANTED_ALORA = (f"{name}, planted" for name in ("AdaLoRA", "AutoLoRA", "ALoRA"))
UNIFORM = "LoRA, uniform ranks"
UNIFORM_DISTANCE = 1.5
"""Mean distance of rank 2 from the planted ranks 0, 1, 3 and 4, each in a quarter of the modules."""


@dataclass(frozen=True)
class RowLikelihood(Statistic):
    """Log-likelihood of each test row in nats, so that higher is better: (seed, row)."""

    arm: str

    def reads(self) -> Reads:
        return {("nll", self.arm): ()}

    def __call__(self, evidence: StudyEvidence, seeds: Sequence[int]) -> np.ndarray:
        return -np.stack([evidence.table("nll", self.arm, seed)["nll"].to_numpy(np.float64) for seed in seeds])


def _mean_log_likelihood(table: pd.DataFrame) -> float:
    """Compute the mean log-likelihood of the test rows, which differ between seeds."""
    return -float(table["nll"].to_numpy(np.float64).mean())


_correlation, _distance = partial(OfRun, rank_correlation, "recovery"), partial(OfRun, mean_rank_error, "recovery")
_likelihood = partial(OfRun, _mean_log_likelihood, "nll")

CARRIED: dict[str, Statistic] = {
    "lora.words": _gain(LORA, WORDS),
    "lora.direction": DirectionChange(),
    "lora.amplify": OfRun(_log_amplification, "amplification", LORA),
    # The top third has two of six layers, so ranks that do not depend on the module give a third to it.
    "adalora.top": OfRun(_top_fraction, "ranks", ADALORA) - Constant(1 / 3),
    "adalora.stable": OfRunPairs(_rank_tau, "ranks", ADALORA),
    "fourierft.more": _gain(FOURIER, FEW),
    "fourierft.random": _gain(FOURIER, RANDOM),
    "fourierft.orthogonal": _gain(FOURIER, ORTHOGONAL),
    "fourierft.band": BestBandElsewhere(),
    "expressiveness.more": _best(TOY_FOURIER) - Combined(np.maximum, tuple(map(_best, TOY_LORA))),
    "expressiveness.frequencies": _logged(TOY_RANDOM) - _logged(TOY_FOURIER),
    "neft.over_full": _gain(NEFT, FULL),
    "neft.stable": OfRunPairs(_overlap, "selected", NEFT) - OfRunPairs(_pooled_chance, "selected", NEFT),
    "neft.layers": OfRunPairs(_overlap, "selected", NEFT) - OfRunPairs(_module_chance, "selected", NEFT),
    "neft.use": OfRun(_mean_shift, "shift", REVERSED) - OfRun(_mean_shift, "shift", NEFT),
    "adapprox.pre_came": RowLikelihood(ADAPPROX) - RowLikelihood(CAME),
    "planted.adalora_correlation": _correlation(PLANTED_ADALORA),
    "planted.adalora_distance": Constant(UNIFORM_DISTANCE) - _distance(PLANTED_ADALORA),
    "planted.adalora_loss": _likelihood(PLANTED_ADALORA) - _likelihood(UNIFORM),
    "planted.autolora_loss": _likelihood(PLANTED_AUTOLORA) - _likelihood(UNIFORM),
    "planted.alora_correlation": _correlation(PLANTED_ALORA),
}
"""Effects of the claims whose verdicts are carried over, by id."""
