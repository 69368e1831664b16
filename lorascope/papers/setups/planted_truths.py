"""Planted truths: teachers whose update of a small decoder is known, text sampled from them, and the gap to them.

A teacher is the base of ``planted_teacher`` plus one update per changed module; a mixture of tasks has one per task.
Students start at the base and learn the teachers' text. Their gap is the KL divergence from the teacher's to their own
next-token distribution, which is exact given the contexts. A truth favors a method, or it is the one that does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lorascope.adapters.delta import host_weight
from lorascope.array_types import Float, Int
from lorascope.inputs import tasks
from lorascope.methods.method import Step
from lorascope.observe import Observer
from lorascope.papers.judging.truth_names import (
    ALL_BLOCKS,
    ALL_NEURONS,
    ATTENTION_RANK_2,
    FEW_NEURONS,
    MIXTURES,
    ONE_UPDATE,
    OTHER_ENTRIES,
    OWN_ENTRIES,
    RANK_2,
    RANK_24,
    SHARED_A,
    TASKS,
    TWO_BLOCKS,
    UNEVEN,
    UNRELATED,
    task_name,
)
from lorascope.papers.setups.planted_teacher import BLOCKS, LENGTH, VOCABULARY, student, token_word
from lorascope.schema import module_table
from lorascope.schema.module_roles import ATTENTION, FFN
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import fourier

UNEVEN_RANKS = (0, 1, 3, 4)
"""Ranks of the updates where modules need different ranks; each is used in a quarter of the modules."""
STRENGTH = 0.75
"""Singular value of an update's components, relative to the largest singular value of the base weight."""
PREFIX = 7
"""Number of tokens that begin the texts of a mixture: six copies of the task's, and a random one."""
COEFFICIENTS, NEURONS = 192, 9
"""Number of Fourier coefficients and of neurons per module in the sparse truths."""
ENTRY_OFFSET = 100_000
"""Added to a seed for the entries of Fourier coefficients that the student does not have."""
CHANGED_BLOCKS, DEEP = (1, 5), 8
"""Blocks that change in LISA's truth, the same for all seeds, and the number of blocks of its base."""

Updates = Mapping[str, Float[Tensor, "out in"]]


class Rows(NamedTuple):
    """Number of sampled texts per split: of a single task, of every task of a mixture, and of its only task."""

    train: int
    validation: int
    test: int


SINGLE, MIXED, ISOLATED = Rows(3000, 200, 400), Rows(1000, 50, 100), Rows(4000, 50, 100)
_OFFSETS = Rows(0, 40_000, 50_000)  # of the seed with which a split is sampled

_GAP = Quantity("gap", "nats", "task", definition="KL divergence from the teacher's next-token distribution, test text")
register("train on the text of a planted truth, with observe=[gap(...)]", gap=_GAP)


@dataclass(frozen=True)
class Truth:
    """A planted truth: the updates of its teachers.

    Parameters
    ----------
    draw : callable
        ``draw(base, seed)`` returns the updates by module of each task's teacher, of one teacher without tasks.
    blocks : int
        Number of blocks of the base.
    """

    draw: Callable[[nn.Module, int], Sequence[Updates]]
    blocks: int = BLOCKS


class Draws:
    """Random draws of one teacher: numbers of its updates from torch, choices of modules and neurons from numpy."""

    def __init__(self, base: nn.Module, seed: int, targets: str | tuple[str, ...] = "all-linear") -> None:
        self.base, self.targets = base, module_table.match(module_table.describe(base), targets)
        self.generator = torch.Generator().manual_seed(seed)
        self.choices = np.random.default_rng(seed)

    def weight(self, module: str) -> Float[Tensor, "out in"]:
        """Return the base weight of a module."""
        return host_weight(self.base.get_submodule(module)).detach()

    def unit(self, module: str) -> float:
        """Return the norm of one component of a module's update."""
        return STRENGTH * float(torch.linalg.matrix_norm(self.weight(module), 2))

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def orthonormal(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        """Return the Q factor of a normal matrix."""
        return torch.linalg.qr(self.normal(rows, columns))[0]

    def low_rank(self, module: str, rank: int, norm: float) -> Float[Tensor, "out in"]:
        """Return an update of this rank with equal singular values, scaled to a Frobenius norm."""
        out_features, in_features = self.weight(module).shape
        left, right = self.orthonormal(out_features, rank), self.orthonormal(in_features, rank)
        return left @ right.T * (norm / math.sqrt(max(rank, 1)))

    def dense(self, module: str, norm: float) -> Float[Tensor, "out in"]:
        """Return a normal update, scaled to a Frobenius norm."""
        return _scale(self.normal(*self.weight(module).shape), norm)


def _scale(update: Float[Tensor, "out in"], norm: float) -> Float[Tensor, "out in"]:
    return update * (norm / float(torch.linalg.matrix_norm(update)))


def _same_rank(rank: int, targets: Any, strength: float) -> Callable[[nn.Module, int], list[Updates]]:
    """Return the draw of updates of one rank, whose norm is ``strength`` times that of a component."""

    def draw(base: nn.Module, seed: int) -> list[Updates]:
        draws = Draws(base, seed, targets)
        return [{name: draws.low_rank(name, rank, strength * draws.unit(name)) for name in draws.targets}]

    return draw


def uneven_ranks(base: nn.Module, seed: int) -> dict[str, int]:
    """Return the rank of every module's update where modules need different ranks."""
    draws = Draws(base, seed)
    # Every rank is equally frequent, so all teachers have the same total rank.
    ranks = draws.choices.permutation(np.resize(UNEVEN_RANKS, len(draws.targets)))
    return dict(zip(draws.targets, ranks.tolist(), strict=True))


def _uneven_updates(base: nn.Module, seed: int) -> list[Updates]:
    draws, updates = Draws(base, seed), {}
    for name, rank in uneven_ranks(base, seed).items():
        updates[name] = draws.low_rank(name, rank, math.sqrt(rank) * draws.unit(name))
    return [updates]


def _two_blocks(base: nn.Module, seed: int) -> list[Updates]:
    draws, layers = Draws(base, seed), module_table.describe(base).set_index("module")["layer"]
    names = [name for name in draws.targets if layers[name] in CHANGED_BLOCKS]
    return [{name: draws.dense(name, 2 * draws.unit(name)) for name in names}]


def _shared_a(base: nn.Module, seed: int) -> Sequence[Updates]:
    draws = Draws(base, seed, FFN)
    updates: list[dict[str, Tensor]] = [{} for _ in range(TASKS)]
    for name in draws.targets:
        out_features, in_features = draws.weight(name).shape
        shared = draws.orthonormal(in_features, 4).T  # A of all tasks, with orthonormal rows
        for of_task in updates:
            of_task[name] = _scale(draws.orthonormal(out_features, 4) @ shared, 2 * draws.unit(name))
    return updates


def _one_update(base: nn.Module, seed: int) -> list[Updates]:
    (updates,) = _same_rank(12, FFN, 2.0)(base, seed)
    return [updates] * TASKS  # the teachers are equal, but texts of a task begin with its word


def _unrelated(base: nn.Module, seed: int) -> list[Updates]:
    draws = Draws(base, seed, FFN)
    return [{name: draws.low_rank(name, 4, 2 * draws.unit(name)) for name in draws.targets} for _ in range(TASKS)]


def _coefficients(offset: int) -> Callable[[nn.Module, int], list[Updates]]:
    """Return the draw of Fourier coefficients at the entries of the student of a seed, plus an offset."""

    def draw(base: nn.Module, seed: int) -> list[Updates]:
        draws, updates = Draws(base, seed, ATTENTION), {}
        for name in draws.targets:
            out_features, in_features = shape = draws.weight(name).shape
            spectrum = torch.zeros(shape, dtype=torch.complex128)
            rows, columns = fourier.entries((out_features, in_features), COEFFICIENTS, seed + offset)
            # Complex, because the transform of real numbers has another layout.
            spectrum[rows, columns] = draws.normal(COEFFICIENTS).to(torch.complex128)
            updates[name] = _scale(torch.fft.ifft2(spectrum).real.float(), 2 * draws.unit(name))
        return [updates]

    return draw


def changed_neurons(base: nn.Module, seed: int) -> dict[str, tuple[int, ...]]:
    """Return the neurons of every feed-forward module that change where few of them do."""
    draws, neurons = Draws(base, seed, FFN), {}
    for name in draws.targets:
        count = max(draws.weight(name).shape)  # a module has more neurons than inputs or outputs of the block
        neurons[name] = tuple(sorted(draws.choices.choice(count, NEURONS, replace=False).tolist()))
    return neurons


def _few_neurons(base: nn.Module, seed: int) -> list[Updates]:
    draws, updates = Draws(base, seed, FFN), {}
    for name, neurons in changed_neurons(base, seed).items():
        update, weight = torch.zeros_like(draws.weight(name)), draws.weight(name)
        if weight.shape[0] > weight.shape[1]:
            update[list(neurons)] = draws.normal(NEURONS, weight.shape[1])
        else:
            update[:, list(neurons)] = draws.normal(weight.shape[0], NEURONS)
        updates[name] = _scale(update, 2 * draws.unit(name))
    return [updates]


def _all_neurons(base: nn.Module, seed: int) -> list[Updates]:
    draws = Draws(base, seed, FFN)
    return [{name: draws.dense(name, 2 * draws.unit(name)) for name in draws.targets}]


TRUTHS = {
    RANK_2: Truth(_same_rank(2, "all-linear", math.sqrt(2))),
    RANK_24: Truth(_same_rank(24, "all-linear", math.sqrt(2))),
    UNEVEN: Truth(_uneven_updates),
    TWO_BLOCKS: Truth(_two_blocks, DEEP),
    ALL_BLOCKS: Truth(_same_rank(2, "all-linear", 1.0), DEEP),
    SHARED_A: Truth(_shared_a),
    ONE_UPDATE: Truth(_one_update),
    UNRELATED: Truth(_unrelated),
    OWN_ENTRIES: Truth(_coefficients(0)),
    OTHER_ENTRIES: Truth(_coefficients(ENTRY_OFFSET)),
    ATTENTION_RANK_2: Truth(_same_rank(2, ATTENTION, 2.0)),
    FEW_NEURONS: Truth(_few_neurons),
    ALL_NEURONS: Truth(_all_neurons),
}
"""Truths by name."""


def teachers(truth: str, seed: int) -> list[nn.Module]:
    """Build the teacher of every task: the base with the task's updates merged into its weights."""
    blocks, models = TRUTHS[truth].blocks, []
    for updates in TRUTHS[truth].draw(student(blocks), seed):
        model = student(blocks)
        with torch.no_grad():
            for name, update in updates.items():
                host_weight(model.get_submodule(name)).add_(update)
        models.append(model)
    return models


@dataclass(frozen=True)
class Examples:
    """Sampled texts of one task by split, and the teacher's log-probabilities after each context of the scored splits.

    Parameters
    ----------
    tokens : mapping split -> tensor (text, position)
        Token numbers.
    log_probabilities : mapping split -> tensor (text, position - 1, token)
        Of validation and test.
    """

    # Splits have different numbers of texts, so the dimension has no name.
    tokens: Mapping[str, Int[Tensor, "_ length"]]
    log_probabilities: Mapping[str, Float[Tensor, "_ contexts vocabulary"]]


@cache
def examples(truth: str, seed: int, number: int = 0, isolated: bool = False) -> Examples:
    """Sample the texts of a task's teacher; there are more of them if the task is not part of a mixture."""
    is_mixture = truth in MIXTURES
    counts = SINGLE
    if is_mixture:
        counts = ISOLATED if isolated else MIXED
    model = teachers(truth, seed)[number]
    tokens, log_probabilities = {}, {}
    for split, count, offset in zip(Rows._fields, counts, _OFFSETS, strict=True):
        tokens[split] = _sample_texts(model, seed + offset, count, number + 1 if is_mixture else None)
        if split != "train":
            log_probabilities[split] = _log_probabilities(model, tokens[split])
    return Examples(tokens, log_probabilities)


def _sample_texts(model: Any, seed: int, count: int, task_number: int | None) -> Int[Tensor, "texts length"]:
    """Sample examples token by token after their first tokens; padding is never sampled."""
    with torch.random.fork_rng(devices=[]):  # ``generate`` has no argument for a generator
        torch.manual_seed(seed)
        first = torch.randint(1, VOCABULARY, (count, 1))
        if task_number is not None:
            first = torch.randint(TASKS + 1, VOCABULARY, (count, 1))  # the words of the tasks only begin a text
            copies = torch.full((count, PREFIX - 1), task_number)
            first = torch.cat([copies, first], dim=1)
        # The default samples from the 50 most likely tokens only.
        sampling = GenerationConfig(
            do_sample=True, top_k=0, max_length=LENGTH, suppress_tokens=[0], pad_token_id=0
        )  # fmt: skip
        return model.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling)


@torch.no_grad()
def _log_probabilities(model: Any, tokens: Int[Tensor, "texts length"]) -> Float[Tensor, "texts contexts vocabulary"]:
    was_training = model.training
    model.eval()  # LoRA of a student may have dropout
    pieces = [model(piece).logits[:, :-1].double().log_softmax(-1) for piece in tokens.split(100)]
    model.train(was_training)
    return torch.cat(pieces)


def sampled_task(truth: str, seed: int, single_task: int | None = None) -> tasks.Task:
    """Return the text of a truth's teachers as a task with splits.

    The groups of a mixture are its tasks. ``single_task`` is the number of one of them, from 0, to learn only that one.
    """
    tables = []
    # Splits are given, because equal texts of two tasks would otherwise be in one split.
    for number in task_numbers(truth, single_task):
        for split, tokens in examples(truth, seed, number, single_task is not None).tokens.items():
            lines = [" ".join(map(token_word, row)) for row in tokens.tolist()]
            tables.append(pd.DataFrame({"text": lines, "split": split, "group": task_name(number)}))
    table = pd.concat(tables, ignore_index=True)
    if table["group"].nunique() == 1:
        del table["group"]
    return tasks.from_frame(table, f"teacher {seed}, {truth}")


def task_numbers(truth: str, single_task: int | None = None) -> Sequence[int]:
    """Return the numbers of the tasks that a student learns."""
    if single_task is not None:
        return (single_task,)
    return range(TASKS if truth in MIXTURES else 1)


def gaps(model: Any, truth: str, seed: int, split: str, single_task: int | None = None) -> Float[np.ndarray, "tasks"]:
    """Compute the gap of a model to the teacher of each task, in nats, as a mean over the contexts of a split.

    In a mixture, the tokens that begin a text are not scored.
    """
    divergences = []
    first = PREFIX - 1 if truth in MIXTURES else 0
    for number in task_numbers(truth, single_task):
        of_task = examples(truth, seed, number, single_task is not None)
        expected = of_task.log_probabilities[split][:, first:]
        log_probabilities = _log_probabilities(model, of_task.tokens[split])[:, first:]
        divergences.append(float((expected.exp() * (expected - log_probabilities)).sum(-1).mean()))
    return np.array(divergences)


@cache
def base_gaps(truth: str, seed: int, split: str, single_task: int | None = None) -> Float[np.ndarray, "tasks"]:
    """Compute the gaps of the base, where all students start."""
    return gaps(student(TRUTHS[truth].blocks), truth, seed, split, single_task)


@dataclass(kw_only=True)
class gap(Observer):
    """Observer that records the gap to the teachers of a truth after the last step of a phase.

    Parameters
    ----------
    truth : str
        Name of the truth, a key of ``TRUTHS``.
    seed : int
        Seed of the teacher.
    split : str
        "test", or "validation" to choose a rate.
    after : int, optional
        Further step after which the gap is recorded.
    single_task : int, optional
        Number of the only task of a mixture that the student learns.
    """

    truth: str
    seed: int
    split: str = "test"
    after: int | None = None
    single_task: int | None = None

    def __call__(self, step: Step) -> list[Item]:
        """Return the gap of each task; no records at other steps."""
        if not step.last and step.finished != self.after:
            return []
        values = gaps(step.model, self.truth, self.seed, self.split, self.single_task)
        return [Record("gap", values, index=np.array(task_numbers(self.truth, self.single_task)))]
