"""Planted truths: place, rank and norm of every update, the sampled text, and the gap to the teacher."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from lorascope.adapters.delta import attached_deltas
from lorascope.methods import FourierFT
from lorascope.papers import registry
from lorascope.papers.judging import truth_names as names
from lorascope.papers.setups import planted_truths as planted
from lorascope.schema import module_table
from lorascope.training.base_weights import attach_method

SEED = 3


@cache
def base_of(truth):
    return planted.student(planted.TRUTHS[truth].blocks)


@pytest.fixture(scope="module")
def drawn():
    return {truth: planted.TRUTHS[truth].draw(base_of(truth), SEED) for truth in planted.TRUTHS}


def rank_of(update):
    return int(torch.linalg.matrix_rank(update.double(), rtol=1e-5))


def component(truth, module):
    weight = base_of(truth).get_submodule(module).weight.detach().double().numpy()
    return planted.STRENGTH * np.linalg.svd(weight, compute_uv=False)[0]


# Rank and norm of every update, in units of a component; None where they are checked elsewhere.
EXPECTED = {
    names.RANK_2: (28, 2, 2**0.5),
    names.RANK_24: (28, 24, 2**0.5),
    names.TWO_BLOCKS: (14, 48, 2.0),
    names.ALL_BLOCKS: (56, 2, 1.0),
    names.SHARED_A: (12, 4, 2.0),
    names.ONE_UPDATE: (12, 12, 2.0),
    names.UNRELATED: (12, 4, 2.0),
    names.ATTENTION_RANK_2: (16, 2, 2.0),
    names.FEW_NEURONS: (12, 9, 2.0),
    names.ALL_NEURONS: (12, 48, 2.0),
    names.OWN_ENTRIES: (16, None, 2.0),
    names.OTHER_ENTRIES: (16, None, 2.0),
}


@pytest.mark.parametrize("truth", EXPECTED)
def test_number_rank_and_norm_of_the_updates(drawn, truth):
    number, rank, norm = EXPECTED[truth]
    assert len(drawn[truth]) == (names.TASKS if truth in names.MIXTURES else 1)
    for updates in drawn[truth]:
        assert len(updates) == number
        for module, update in updates.items():
            if rank is not None:
                assert rank_of(update) == rank
            # float32 numbers, some 2,000 of which are squared and added
            assert np.isclose(float(update.norm()), norm * component(truth, module), rtol=1e-4)


def test_uneven_ranks_are_equally_frequent_and_components_have_one_size(drawn):
    ranks = planted.uneven_ranks(base_of(names.UNEVEN), SEED)
    assert Counter(ranks.values()) == dict.fromkeys(planted.UNEVEN_RANKS, 7)
    for module, update in drawn[names.UNEVEN][0].items():
        assert rank_of(update) == ranks[module]
        singular = torch.linalg.svdvals(update.double())[: ranks[module]]
        np.testing.assert_allclose(singular, component(names.UNEVEN, module), rtol=1e-4)


def test_lisas_truth_changes_blocks_1_and_5_of_8(drawn):
    layers = {module_table.parse(module).layer for module in drawn[names.TWO_BLOCKS][0]}
    assert layers == {1, 5}
    assert {module_table.parse(module).layer for module in drawn[names.ALL_BLOCKS][0]} == set(range(8))


def test_tasks_share_their_row_space_or_nothing(drawn):
    for truth, rank in ((names.SHARED_A, 4), (names.UNRELATED, 16)):
        for module in drawn[truth][0]:
            stacked = torch.cat([updates[module] for updates in drawn[truth]])
            assert rank_of(stacked) == rank
    # Only the columns of A are shared, not those of B.
    side_by_side = torch.cat([next(iter(updates.values())) for updates in drawn[names.SHARED_A]], dim=1)
    assert rank_of(side_by_side) == 16
    first, *others = drawn[names.ONE_UPDATE]
    assert all(torch.equal(other[module], first[module]) for other in others for module in first)


def test_few_neurons_are_rows_of_the_projections_in_and_columns_of_those_out(drawn):
    for module, update in drawn[names.FEW_NEURONS][0].items():
        neurons = planted.changed_neurons(base_of(names.FEW_NEURONS), SEED)[module]
        vectors = update.T if module.endswith("down_proj") else update
        assert tuple(torch.nonzero(vectors.norm(dim=1)).flatten().tolist()) == neurons
        assert len(neurons) == 9
        assert len(vectors) == 96


def test_a_student_of_fourierft_represents_the_update_at_its_entries(drawn):
    """The span of the student's coefficients contains the update, up to rounding, and not that at other entries."""
    model = planted.student()
    method = FourierFT(coefficients=planted.COEFFICIENTS, init="zeros", targets=("q",), entry_seed=SEED)
    attach_method(method, model)
    (module, delta), *_ = attached_deltas(model).items()
    columns = []
    for number in range(planted.COEFFICIENTS):
        with torch.no_grad():
            delta.coefficients.zero_()[number] = 1.0
        columns.append(np.asarray(delta.update().dense()).ravel())
    waves = np.array(columns).T
    for truth, is_in_span in ((names.OWN_ENTRIES, True), (names.OTHER_ENTRIES, False)):
        update = drawn[truth][0][module].double().numpy().ravel()
        residual = update - waves @ np.linalg.lstsq(waves, update, rcond=None)[0]
        assert (np.linalg.norm(residual) < 1e-5 * np.linalg.norm(update)) == is_in_span


@pytest.mark.parametrize("truth", [names.UNEVEN, names.SHARED_A])
def test_the_teacher_has_no_gap_and_the_base_has_one(truth):
    base_gaps = planted.base_gaps(truth, SEED, "test")
    assert (base_gaps > 0.1).all()
    for number, teacher in enumerate(planted.teachers(truth, SEED)):
        gaps = planted.gaps(teacher, truth, SEED, "test")
        assert gaps[number] == 0.0


def test_the_gap_is_the_divergence_by_brute_force():
    of_task = planted.examples(names.SHARED_A, SEED, 1)
    teacher, base = planted.teachers(names.SHARED_A, SEED)[1], base_of(names.SHARED_A)
    divergences = []
    with torch.no_grad():
        for row in of_task.tokens["test"][:5]:
            expected, other = (model(row[None]).logits[0].double().softmax(-1) for model in (teacher, base))
            # The eighth token is the first one that is scored, and the context before it has seven.
            for position in range(6, 31):
                divergences.append(float((expected[position] * (expected[position] / other[position]).log()).sum()))
    shortened = {"test": of_task.tokens["test"][:5]}, {"test": of_task.log_probabilities["test"][:5]}
    log_probabilities = planted._log_probabilities(base, shortened[0]["test"])[:, 6:]
    expected = shortened[1]["test"][:, 6:]
    measured = (expected.exp() * (expected - log_probabilities)).sum(-1).mean()
    # Batches of other sizes round float32 logits differently.
    assert np.isclose(float(measured), np.mean(divergences), rtol=1e-4)


def test_text_of_a_mixture_begins_with_its_task_and_has_no_text_of_two_splits():
    task = planted.sampled_task(names.SHARED_A, SEED)
    assert task.table.groupby(["split", "group"]).size().to_dict() == {
        (split, f"task {number}"): count
        for split, count in (("train", 1000), ("validation", 50), ("test", 100))
        for number in range(1, 5)
    }
    for line, group in zip(task.table["text"].head(200), task.table["group"].head(200), strict=True):
        words = line.split()
        assert words[:6] == [f"w{group[-1]}"] * 6
        assert len(words) == planted.LENGTH
        assert int(words[6][1:]) > names.TASKS
        assert "w0" not in words


def test_samples_depend_on_no_other_seed():
    first = planted.examples(names.RANK_2, SEED).tokens["test"]
    planted.examples.cache_clear()
    torch.manual_seed(11)
    assert torch.equal(planted.examples(names.RANK_2, SEED).tokens["test"], first)


def test_every_claim_reads_arms_that_are_trained():
    labels = [arm.label for arm in registry.study_arms()]
    assert len(labels) == len(set(labels))
    for comparison in registry.COMPARISONS.values():
        assert comparison.arms() <= set(labels)
