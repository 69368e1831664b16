"""Variants of the nine methods that only figures show: budgets, numbers of experts, blocks and neurons, and ablations.

No claim reads these arms. Each takes the rate of the registered arm that it varies, and has three seeds. Almost all
learn planted teachers, with the sizes of a small decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lorascope.analysis import norms, selected_neurons, subspace_similarity
from lorascope.papers import adalora, adapprox, alora, autolora, fourierft, hydralora, lisa, neft
from lorascope.papers.arms import Arm, ComputedArm, KeptTable
from lorascope.papers.judging import truth_names
from lorascope.papers.planted_pairs import STEPS, Student, planted_arms
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.module_roles import ATTENTION, FFN
from lorascope.updates.linalg import as_float64
from lorascope.updates.weight_update import Dense

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

UNEVEN, EVEN = truth_names.UNEVEN, truth_names.RANK_2
BUDGETS = (1, 2, 4, 8)
"""Ranks per module at which ALoRA is compared with LoRA."""
TYPES = {"q": "q", "k": "k", "v": "v", "o": "o", "ffn_in": "up", "ffn_gate": "gate", "ffn_out": "down"}
"""Roles of AdaLoRA's figure 1 -> their names in labels."""
SEVERAL = {"q and k": ("q", "k"), "q and v": ("q", "v"), "attention": ATTENTION}
"""Types of weight that LoRA's table 5 adapts together, by their names in labels."""
TEACHERS = (300, 301)
"""Seeds of the teachers that several runs learn."""
EXPERTS, SPLITS = (1, 2, 4, 8), {1: 16, 2: 8, 4: 4, 8: 2}
"""Numbers of experts of rank 4; numbers of LoRAs with a total rank of 16 -> rank of each."""
BLOCKS, INTERVALS = (0, 1, 2, 4), (5, 10, 40, STEPS)
"""Numbers of blocks that LISA trains at a time, and steps between two draws."""
NEURONS, MORE_NEURONS = 36, (36, 72, 108)
"""NeFT's neurons, 3% of all, and numbers of further ones: the next, or those that rotate least."""
COEFFICIENTS = {48: 0, 96: 1, 192: 2, 384: 4, 768: 8}
"""Numbers of FourierFT's coefficients -> rank of LoRA with as many parameters."""
EVALUATED = 20
"""Steps between two evaluations of the arms that have validation losses."""


def study_arms() -> list[Arm | ComputedArm]:
    """Return the arms that only figures show."""
    planted = [*_allocators(), *_placements(), *_experts(), *_blocks(), *_neurons(), *_coefficients()]
    return [*planted, *_on_text(), *_guided()]


def _allocators() -> list[Arm]:
    """Return budgets of ALoRA and LoRA, and the allocators with one part changed, on uneven planted ranks."""
    from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, LoRA

    everywhere: Any = {"targets": "all-linear"}
    moved = ALoRA(init_rank=2, alpha=8.0, warm_steps=STEPS // 5)
    allocated = AdaLoRA(init_rank=4, target_rank=2, alpha=64.0, **everywhere)
    searched = AutoLoRA(rank=4, alpha=16.0, selection_lr=1e-2, **everywhere)
    students: dict[str, Student | Method] = {}
    for rank in BUDGETS:
        if rank != 2:  # registered
            students[f"ALoRA, rank {rank}"] = replace(moved, init_rank=rank, alpha=4.0 * rank)
            students[f"LoRA, rank {rank}"] = LoRA(rank=rank, alpha=4.0 * rank, **everywhere)
    students |= {
        f"{alora.MOVED}, random scores": replace(moved, scores="random"),
        f"{alora.MOVED}, sensitivity": replace(moved, scores="sensitivity"),
        f"{adalora.ALLOCATED}, sensitivity": replace(allocated, importance="sensitivity"),
        f"{adalora.ALLOCATED}, size of lambda": replace(allocated, importance="magnitude"),
        f"{adalora.ALLOCATED}, no penalty": replace(allocated, gamma=0.0),
        "AdaLoRA, rank 2 to 2, no penalty": replace(allocated, init_rank=2, alpha=32.0, gamma=0.0),
        f"{autolora.SEARCHED}, first order": replace(searched, hypergradient="first_order"),
        f"{autolora.SEARCHED}, sigmoid": replace(searched, constraint="sigmoid"),
        f"{autolora.SEARCHED}, no constraint": replace(searched, constraint="none"),
        "LoRA, ranks from random logits": Student(_with_random_ranks),
    }
    arms = planted_arms(students, [UNEVEN])
    # Two runs of a search agree only if it finds what its teacher needs.
    for name, teacher in zip(ON_TEACHERS, TEACHERS, strict=True):
        arms += _on_teacher({name: searched}, UNEVEN, teacher)
    return arms


def _with_random_ranks(base: Any, seed: int) -> Method:
    """Return LoRA with the ranks that small random logits give: on average half of 4 components."""
    from lorascope.methods import LoRA

    names = module_table.match(module_table.describe(base), "all-linear")
    logits = np.random.default_rng(seed).standard_normal((len(names), 4))
    ranks = (logits >= logits.mean(axis=1, keepdims=True)).sum(axis=1).tolist()
    return LoRA(rank=dict(zip(names, ranks, strict=True)), alpha=16.0)


def _on_teacher(students: Mapping[str, Student | Method], truth: str, teacher: int) -> list[Arm]:
    """Return arms whose seeds all learn one teacher, so that runs differ by data order and initial values only."""
    return [replace(arm, vary=partial(_of_teacher, arm, teacher)) for arm in planted_arms(students, [truth])]


def _of_teacher(planted: Arm, teacher: int, arm: Arm, seed: int) -> Arm:
    assert planted.vary
    return planted.vary(arm, teacher)


def _placements() -> list[Arm]:
    """Return LoRA on one type of weight, or in one block, with the parameters of rank 2 in all modules.

    Feed-forward matrices have a rank of 11, and 3% fewer parameters than attention matrices with 17. Several types of
    attention matrices have 6% fewer.
    """
    from lorascope.methods import LoRA

    students: dict[str, Student | Method] = {}
    for role, name in TYPES.items():
        # A feed-forward matrix has 1.5 times the parameters of an attention matrix per rank.
        rank = 17 if role in ATTENTION else 11
        students[f"LoRA, {name} only"] = LoRA(rank=rank, alpha=4.0 * rank, targets=(role,))
    for name, roles in SEVERAL.items():
        rank = 16 // len(roles)
        students[f"LoRA, {name} only"] = LoRA(rank=rank, alpha=4.0 * rank, targets=roles)
    # One block of rank 8 has as many parameters as four of rank 2.
    for block in range(4):
        students[f"LoRA, block {block} only"] = Student(partial(_in_block, block))
    return planted_arms(students, [EVEN])


def _in_block(block: int, base: Any, seed: int) -> Method:
    from lorascope.methods import LoRA

    modules = module_table.describe(base).set_index("module")["layer"]
    names = [name for name in module_table.match(module_table.describe(base), "all-linear") if modules[name] == block]
    return LoRA(rank=8, alpha=32.0, targets=tuple(names))


def _experts() -> list[Arm]:
    """Return numbers of experts, LoRAs split at equal rank, and full fine-tuning, on mixtures of four tasks."""
    from lorascope.methods import Full, HydraLoRA, LoRA

    routed = HydraLoRA(rank=4, num_experts=4, alpha=16.0)
    lora = LoRA(rank=12, alpha=48.0, targets=FFN)
    experts: dict[str, Method] = {}
    for number in EXPERTS:
        if number != routed.num_experts:  # registered
            experts[experts_of_rank_4(number)] = replace(routed, num_experts=number)
    splits: dict[str, Method] = {}
    for number, rank in SPLITS.items():
        if rank != 2:
            splits[f"LoRA, rank {rank}"] = replace(lora, rank=rank, alpha=4.0 * rank)
        if number in (2, 8):  # four of rank 4 are registered
            split = replace(routed, num_experts=number, shared_a=False, rank=rank, alpha=4.0 * rank)
            splits[f"HydraLoRA, {number} separate A's of rank {rank}"] = split
    return [
        *planted_arms({neft.FULL: Full()}, truth_names.MIXTURES),
        *planted_arms({hydralora.EQUAL: lora}, [truth_names.UNRELATED]),
        *planted_arms(experts, hydralora.HETEROGENEITY),
        *planted_arms(splits, [truth_names.SHARED_A]),
    ]


def experts_of_rank_4(number: int) -> str:
    """Return the name of HydraLoRA with this number of experts."""
    return f"HydraLoRA, {number} expert{'s' if number > 1 else ''} of rank 4"


def _blocks() -> list[Arm]:
    """Return LISA by number of blocks and steps between draws, and three methods that learn one teacher."""
    from lorascope.methods import LISA, Full, LoRA

    sampled = LISA(n_active=2, interval=10)
    students: dict[str, Student | Method] = {}
    for number in BLOCKS:
        if number != sampled.n_active:
            students[f"LISA, {number} of 8 blocks"] = replace(sampled, n_active=number)
    # An interval of all steps has a single draw.
    for interval in INTERVALS:
        if interval != sampled.interval:
            students[f"{lisa.SAMPLED}, {interval} steps"] = replace(sampled, interval=interval)
    compared = {
        f"{lisa.SAMPLED}, one teacher": sampled,
        f"{lisa.FACTORED}, one teacher": LoRA(rank=8, alpha=32.0, targets="all-linear"),
        f"{neft.FULL}, one teacher": Full(),
    }
    on_one = _on_teacher(compared, truth_names.ALL_BLOCKS, TEACHERS[0])
    return planted_arms(students, [truth_names.ALL_BLOCKS]) + list(map(_evaluated, on_one))


def _evaluated(arm: Arm) -> Arm:
    """Return an arm with validation losses over the steps."""
    return replace(arm, settings={**arm.settings, "eval_every": EVALUATED, "eval_size": 200})


def _neurons() -> list[Arm]:
    """Return NeFT by number and kind of its neurons, with their utilization; and LoRA with as many parameters."""
    from lorascope import observe
    from lorascope.methods import Full, LoRA

    # Utilization is compared at the end, and costs a forward pass over held-out rows.
    observers = (observe.utilization(every=STEPS),)
    students: dict[str, Student | Method] = {
        few_neurons(): Student(partial(_with_neurons, 0, False), observers),
        f"{neft.FULL}, evaluated": Full(),
        "LoRA, rank 1, feed-forward": LoRA(rank=1, alpha=4.0, targets=FFN),
        "LoRA, rank 3, feed-forward": LoRA(rank=3, alpha=12.0, targets=FFN),
    }
    for added in MORE_NEURONS:
        students[few_neurons(added)] = Student(partial(_with_neurons, added, False), observers)
        students[few_neurons(added, is_reversed=True)] = Student(partial(_with_neurons, added, True), observers)
    return list(map(_evaluated, planted_arms(students, [truth_names.FEW_NEURONS])))


def few_neurons(added: int = 0, is_reversed: bool = False) -> str:
    """Return the name of NeFT with 3% of the neurons, and with more of the next ones or of those that rotate least."""
    if not added:
        return f"NeFT, {NEURONS} neurons"
    return f"NeFT, {NEURONS} neurons and {added} {'reversed' if is_reversed else 'more'}"


def _with_neurons(added: int, is_reversed: bool, base: Any, seed: int) -> Method:
    from lorascope.methods import NeFT

    if not is_reversed:
        return NeFT(num_neurons=NEURONS + added, targets=FFN)
    # A neuron of the decoder has as many weights as the width of its blocks.
    total = sum(parameter.numel() for parameter in base.parameters())
    return NeFT(num_neurons=NEURONS, targets=FFN, reversed_share=added * base.config.hidden_size / total)


def _coefficients() -> list[Arm]:
    """Return FourierFT by number of coefficients, and LoRA of equal size."""
    from lorascope.methods import FourierFT, LoRA

    students: dict[str, Student | Method] = {}
    for number, rank in COEFFICIENTS.items():
        if number != 192:  # registered
            sparse = FourierFT(coefficients=number, init="zeros", alpha=10.0, targets=ATTENTION)
            students[f"FourierFT, {number} coefficients from zero"] = Student(partial(_with_entries, sparse))
        if rank in (1, 4):
            students[f"LoRA, rank {rank}, attention"] = LoRA(rank=rank, alpha=4.0 * rank, targets=ATTENTION)
    return planted_arms(students, fourierft.SUFFICIENT)


def _with_entries(sparse: Any, base: Any, seed: int) -> Method:
    return replace(sparse, entry_seed=seed)


LOW, HIGH, OTHER_HIGH = "LoRA, rank 8, text", "LoRA, rank 64, text", "LoRA, rank 64, other start, text"
MOMENTS, FACTORED = "full fine-tuning, second moments, text", "Adapprox, text"


def _on_text() -> list[Arm]:
    """Return LoRAs whose directions are compared, and optimizers whose second moments or factors are recorded."""
    from lorascope import observe
    from lorascope.methods import Adapprox, Full, LoRA

    settings = {"steps": 300, "batch_size": 16, "eval_every": 0, "eval_size": 16, "test_size": 400, "observe": []}
    low = Arm(label=LOW, method=LoRA(rank=8, alpha=8.0, targets="all-linear"), settings=settings)
    high = replace(low, label=HIGH, method=LoRA(rank=64, alpha=64.0, targets="all-linear"))
    # A recording costs two SVDs of every matrix, and moments change little after 100 steps.
    short: dict[str, Any] = {**settings, "steps": 100}
    moments = (observe.second_moments(every=100), observe.factorings(every=100))
    factored = Adapprox(dense=("embed", "pos_embed"), growth_scale=None)
    return [
        replace(low, vary=partial(_with_start, 1)),
        replace(high, vary=partial(_with_start, 2)),
        replace(high, label=OTHER_HIGH, vary=partial(_with_start, 3)),
        replace(low, label=MOMENTS, method=Full(), settings={**short, "observe": moments}),
        replace(low, label=FACTORED, method=factored, settings={**short, "observe": (observe.factor_drift(),)}),
    ]


def _with_start(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm with an initial A and a data order that no other run has."""
    method: Any = arm.method
    # With one seed, a smaller random A would equal the first rows of a larger one.
    return replace(
        arm, method=replace(method, init_seed=4 * seed + number), settings={**arm.settings, "seed": 4 * seed + number}
    )


def guided(truth: str) -> str:
    """Return the label of Adapprox with guidance on a quadratic."""
    return f"{adapprox.OURS}, guidance, {truth}"


def _guided() -> list[ComputedArm]:
    """Return Adapprox with guidance on the quadratics of its pairs."""
    of_label = {arm.label: arm for arm in adapprox.study_arms()}
    arms = []
    for truth in adapprox.MOMENTS:
        arm = of_label[f"{adapprox.OURS}, {truth}"]
        method: Any = arm.method
        arms.append(replace(arm, label=guided(truth), method=replace(method, cosine=True)))
    return arms


def keep_penalties(run: Run) -> pd.DataFrame:
    """Return the kept table ``role, factor, step, value`` of AdaLoRA: penalty of P and Q of two modules of block 0."""
    names = {"penalty_left": "P", "penalty_right": "Q"}
    table = run.table
    rows = table[table["quantity"].isin(names) & (table["layer"] == 0) & table["role"].isin(["o", "ffn_out"])]
    factor = rows["quantity"].astype("str").map(names)
    return rows.assign(factor=factor).astype({"role": "str", "value": "float32"})[["role", "factor", "step", "value"]]


def keep_validation(run: Run) -> pd.DataFrame:
    """Return the kept table ``step, loss``: validation loss."""
    rows = run.table[run.table["quantity"] == "eval_loss"]
    return rows.rename(columns={"value": "loss"}).astype({"loss": "float32"})[["step", "loss"]]


def keep_neuron_utilization(run: Run) -> pd.DataFrame:
    """Return the kept table ``module, role, neuron, value, trained``: utilization of the neurons at the end."""
    rows = norms.last_recorded(run.table[run.table["quantity"] == "utilisation"])
    rows = rows.rename(columns={"index": "neuron"}).astype({"module": "str", "role": "str", "neuron": "int16"})
    trained = selected_neurons.to_set(selected_neurons.list_selected(run))
    is_trained = [key in trained for key in zip(rows["module"], rows["neuron"], strict=True)]
    rows = rows.assign(trained=is_trained).astype({"value": "float32"})
    return rows[["module", "role", "neuron", "value", "trained"]]


def keep_planted_ranks(run: Run, teacher: int | None = None) -> pd.DataFrame:
    """Return the kept table ``module, planted, rank`` of an allocator on uneven ranks, of its seed or of a teacher."""
    from lorascope.papers.setups import planted_truths

    if teacher is None:
        teacher = int(run.meta.seed or 0)
    planted = planted_truths.uneven_ranks(planted_truths.student(), teacher)
    table = pd.DataFrame({"module": list(planted), "planted": list(planted.values())})
    # A module that the search removed is not adapted.
    ranks = table["module"].map(run.ranks()).fillna(0)
    return table.assign(rank=ranks).astype({"rank": "int16", "planted": "int16"})


PAIRS = {"ranks 8 and 64": (LOW, HIGH), "two starts of rank 64": (HIGH, OTHER_HIGH)}
SHOWN_LAYERS = {"ranks 8 and 64": (0, 2, 5), "two starts of rank 64": (2,)}
"""Layers whose directions are compared: between two ranks, and between two initial values."""


def keep_overlaps(*runs: Run) -> pd.DataFrame:
    """Return the kept table ``pair, layer, role, i, j, phi`` of LOW, HIGH and OTHER_HIGH: similarity of their A's."""
    updates = {label: run.updates() for label, run in zip((LOW, HIGH, OTHER_HIGH), runs, strict=True)}
    modules, tables = runs[0].modules, []
    for pair, (label, other) in PAIRS.items():
        is_shown = modules["layer"].isin(SHOWN_LAYERS[pair]) & modules["role"].isin(["q", "v"])
        for name, layer, role in modules.loc[is_shown, ["module", "layer", "role"]].itertuples(index=False):
            cells = subspace_similarity.similarity_of_runs(updates[label], updates[other], name)
            tables.append(cells.assign(pair=pair, layer=int(layer), role=str(role)))
    small = {"i": "int16", "j": "int16", "phi": "float16", "layer": "int8"}
    return pd.concat(tables, ignore_index=True)[["pair", "layer", "role", "i", "j", "phi"]].astype(small)


def keep_update_amplification(run: Run) -> pd.DataFrame:
    """Return the kept table ``layer, role, update, weight, along_update, along_weight, along_random`` of a LoRA.

    Norms of the update and of W, and of W between the left and right directions of the update, as many of W's
    first ones, and random ones; the latter is the root mean square over all directions.
    """
    rows = []
    for layer, role, weight, update in _updated_weights(run):
        left, sigma, right = update.svd()
        own_sigma = np.linalg.svd(weight, compute_uv=False)
        norm, count = np.linalg.norm(weight), len(sigma)
        along = (np.linalg.norm(left.T @ weight @ right), np.linalg.norm(own_sigma[:count]))
        rows.append((layer, role, np.linalg.norm(sigma), norm, *along, count * norm / np.sqrt(weight.size)))
    columns = ["layer", "role", "update", "weight", "along_update", "along_weight", "along_random"]
    return pd.DataFrame(rows, columns=columns)


W_DIRECTIONS = range(4, 65, 4)
"""Numbers of W's first directions, of 384, whose similarity to those of the update is kept: a sixth."""


def keep_weight_overlaps(run: Run) -> pd.DataFrame:
    """Return the kept table ``i, j, phi``: similarity of the directions of W and of LoRA's update, q of layer 2."""
    for layer, role, weight, update in _updated_weights(run):
        if (layer, role) == (2, "q"):
            cells = subspace_similarity.similarity_of_runs({"": Dense(weight)}, {"": update}, "", "update")
            small = {"i": "int16", "j": "int16", "phi": "float16"}
            return cells.loc[cells["i"].isin(W_DIRECTIONS), ["i", "j", "phi"]].astype(small)
    raise ValueError("a LoRA on text must adapt q of layer 2")


def _updated_weights(run: Run) -> Iterator[tuple[int, str, Any, Any]]:
    """Yield layer, role, base weight and update of the queries and values."""
    from lorascope.adapters.host_weights import host_weight, to_array
    from lorascope.inputs import models

    model, updates, modules = models.load(run.meta.model), run.updates(), run.modules
    projections = modules[modules["role"].isin(["q", "v"]) & modules["module"].isin(list(updates))]
    for name, layer, role in projections[["module", "layer", "role"]].itertuples(index=False):
        yield int(layer), str(role), as_float64(to_array(host_weight(model.get_submodule(name)))), updates[name]


def keep_moments(run: Run) -> pd.DataFrame:
    """Return the kept table ``quantity, layer, role, step, index, value`` of second moments and their factors.

    Second moments of AdamW are averaged over the matrices of a layer, whose role is "".
    """
    table = run.table[run.table["quantity"].astype("str").str.match("moment_|factoring_|factor_")]
    role = table["role"].astype("str").where(table["quantity"].astype("str").str.startswith("factor_"), "")
    keys = ["quantity", "layer", "role", "step", "index"]
    rows = table.assign(role=role).astype({"quantity": "str"}).groupby(keys, dropna=False)["value"].mean()
    return rows.reset_index().astype({"value": "float32"})


def _of_each(names: Iterable[str], truth: str, function: Callable[..., pd.DataFrame]) -> list[KeptTable]:
    return [((f"{name}, {truth}",), function) for name in names]


_PENALIZED = (adalora.ALLOCATED, f"{adalora.ALLOCATED}, sensitivity", f"{adalora.ALLOCATED}, no penalty")
SEARCHES = (f"{autolora.SEARCHED}, first order", f"{autolora.SEARCHED}, sigmoid", f"{autolora.SEARCHED}, no constraint")
ON_TEACHERS = (f"{autolora.SEARCHED}, teacher 1", f"{autolora.SEARCHED}, teacher 2")
ON_ONE = (f"{neft.FULL}, one teacher", f"{lisa.FACTORED}, one teacher", f"{lisa.SAMPLED}, one teacher")
REVERSED = tuple(map(partial(few_neurons, is_reversed=True), MORE_NEURONS))
NEXT = (few_neurons(), *map(few_neurons, MORE_NEURONS))
FACTORED_NEURONS = ("LoRA, rank 1, feed-forward", "LoRA, rank 3, feed-forward")
_EVALUATED = (*NEXT, *REVERSED, *FACTORED_NEURONS, f"{neft.FULL}, evaluated")
KEPT_TABLES: dict[str, list[KeptTable]] = {
    # A claim reads the first arm, and the others change one part of it.
    "penalties": _of_each(_PENALIZED, UNEVEN, keep_penalties),
    "validation": [
        *_of_each(_EVALUATED, truth_names.FEW_NEURONS, keep_validation),
        *_of_each(ON_ONE, truth_names.ALL_BLOCKS, keep_validation),
    ],
    "utilization": _of_each([*NEXT, *REVERSED], truth_names.FEW_NEURONS, keep_neuron_utilization),
    "ranks": [
        *_of_each(SEARCHES, UNEVEN, keep_planted_ranks),
        *_of_each(ON_TEACHERS[:1], UNEVEN, partial(keep_planted_ranks, teacher=TEACHERS[0])),
        *_of_each(ON_TEACHERS[1:], UNEVEN, partial(keep_planted_ranks, teacher=TEACHERS[1])),
    ],
    "overlaps": [((LOW, HIGH, OTHER_HIGH), keep_overlaps)],
    "amplification": [((LOW,), keep_update_amplification), ((HIGH,), keep_update_amplification)],
    "weight_overlaps": [((LOW,), keep_weight_overlaps), ((HIGH,), keep_weight_overlaps)],
    "moments": [((MOMENTS,), keep_moments), ((FACTORED,), keep_moments)],
}
