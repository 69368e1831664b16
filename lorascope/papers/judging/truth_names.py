"""Names of the planted truths, with which the labels of their arms end; see ``planted_truths``."""

RANK_2, RANK_24, UNEVEN = "update of rank 2", "update of rank 24", "uneven ranks"
TWO_BLOCKS, ALL_BLOCKS = "two blocks change", "all blocks change"
SHARED_A, ONE_UPDATE, UNRELATED = "tasks share A", "one update for all tasks", "unrelated updates"
OWN_ENTRIES, OTHER_ENTRIES, ATTENTION_RANK_2 = "its entries", "other entries", "attention of rank 2"
MOMENTS_RANK_4, MOMENTS_RANK_1 = "second moments of rank 4", "second moments of rank 1"
MOMENTS_UNSTRUCTURED = "second moments without structure"
FEW_NEURONS, ALL_NEURONS = "9% of neurons change", "all neurons change"

MIXTURES = (SHARED_A, ONE_UPDATE, UNRELATED)
"""Truths with several tasks."""
TASKS = 4
"""Number of tasks of a mixture."""


def task_name(number: int) -> str:
    """Return the name of a task of a mixture, which are numbered from 0."""
    return f"task {number + 1}"
