"""Tables of norms, spectra and subspaces, compared with hand-computed numbers and brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorascope.analysis import norms, spectra, subspace_similarity
from lorascope.analysis.even_spacing import select_steps
from lorascope.schema import records
from lorascope.schema.records import Record
from lorascope.updates import Dense, LowRank

MODULES = pd.DataFrame(
    [
        ("head", "", None, "head"),
        ("b.1.q", "encoder", 1, "q"),
        ("b.1.ff", "encoder", 1, "ffn_in"),
        ("b.0", "encoder", 0, "block"),
        ("b.0.q", "encoder", 0, "q"),
        ("b.0.ff", "encoder", 0, "ffn_in"),
        ("words", "", None, "embed"),
    ],
    columns=["module", "stack", "layer", "role"],
).astype({"layer": "Int16"})


def table(rows: list[tuple[int, str, str, float]], run: str = "a", modules: pd.DataFrame = MODULES) -> pd.DataFrame:
    """Return a records table of (step, module, quantity, value)."""
    return records.frame(
        run, [(step, Record(quantity, value, module)) for step, module, quantity, value in rows], modules
    )


def cells(found: pd.DataFrame, *columns: str) -> dict:
    """Return a mapping from cell to value."""
    keys = zip(*(found[column] for column in columns), strict=True)
    return {key if len(columns) > 1 else key[0]: value for key, value in zip(keys, found["value"], strict=True)}


def test_pool_of_several_tensors_is_the_norm_of_their_concatenation() -> None:
    rows = table([(1, "b.1.q", "weight_norm", 5.0), (1, "b.1.ff", "weight_norm", 12.0)])
    assert cells(norms.pool_modules(norms.select_quantity(rows, "weight_norm")), "place") == {"1": 13.0}


def test_mean_over_steps_excludes_step_0() -> None:
    rows = table(
        [(0, "words", "weight_norm", 100.0), (1, "words", "weight_norm", 5.0), (2, "words", "weight_norm", 10.0)]
    )
    found = norms.mean_over_steps(norms.pool_modules(norms.select_quantity(rows, "weight_norm")))
    assert cells(found, "place") == {"embed": 7.5}


def test_norm_per_weight_does_not_depend_on_the_layer_size() -> None:
    """The matrices are 2 x 3, 3 x 3 and 40 x 5 with entries 1; the row of the block, of unknown size, is ignored."""
    sizes = {"words": (40, 5), "b.0.q": (2, 3), "b.0.ff": (3, 3), "b.0": (None, None)}
    modules = pd.DataFrame([{"module": name, "out_features": o, "in_features": i} for name, (o, i) in sizes.items()])
    values = {name: (out * into) ** 0.5 if out else 9.0 for name, (out, into) in sizes.items()}
    rows = norms.select_quantity(
        table([(1, name, "weight_norm", value) for name, value in values.items()]), "weight_norm"
    )
    assert cells(norms.norm_per_weight(rows, modules), "place") == pytest.approx({"embed": 1, "0": 1})


def test_mean_over_steps_averages_the_pooled_layers() -> None:
    steps = [(1, 3.0, 4.0), (2, 5.0, 12.0)]
    rows = table([(t, m, "weight_norm", v) for t, q, ff in steps for m, v in (("b.1.q", q), ("b.1.ff", ff))])
    found = norms.mean_over_steps(norms.pool_modules(norms.select_quantity(rows, "weight_norm")))
    assert cells(found, "place") == {"1": 9.0}  # the mean (5 + 13) / 2, not the root mean square


@pytest.mark.parametrize(("quantity", "pooled"), [("update_norm", 5.0), ("rank", 7.0), ("relative_update", 3.5)])
def test_pool_uses_the_rule_of_the_quantity(quantity: str, pooled: float) -> None:
    rows = table([(1, "b.1.q", quantity, 3.0), (1, "b.1.ff", quantity, 4.0)])
    assert cells(norms.pool_modules(norms.select_quantity(rows, quantity)), "place") == {"1": pooled}


def test_pool_with_block_and_module_rows_counts_nothing_twice() -> None:
    rows = [(1, "b.0", "update_norm", 6.0), (1, "b.0.q", "update_norm", 3.0), (1, "b.0.ff", "update_norm", 4.0)]
    rows += [(1, "b.1.q", "update_norm", 2.0), (2, "b.0.q", "update_norm", 1.0)]
    selected = norms.select_quantity(table(rows), "update_norm")
    assert cells(norms.pool_modules(selected), "step", "place") == {(1, "0"): 6.0, (1, "1"): 2.0, (2, "0"): 1.0}
    assert cells(norms.pool_modules(selected, by=("role",)), "step", "role") == {
        (1, "q"): pytest.approx(np.sqrt(13)),
        (1, "ffn_in"): 4.0,
        (2, "q"): 1.0,
    }
    assert len(norms.pool_modules(selected, by=("module",))) == 5


@given(values=st.lists(st.floats(0.0, 1e3), min_size=4, max_size=4))
def test_pool_in_two_stages_equals_pool_at_once(values: list[float]) -> None:
    names = ["b.0.q", "b.0.ff", "b.1.q", "b.1.ff"]
    rows = table([(1, name, "update_norm", value) for name, value in zip(names, values, strict=True)])
    layers = norms.pool_modules(norms.select_quantity(rows, "update_norm"))["value"]
    whole = norms.pool_modules(norms.select_quantity(rows, "update_norm"), by=())["value"]
    assert np.sqrt((layers**2).sum()) == pytest.approx(whole.item())
    assert whole.item() == pytest.approx(np.linalg.norm(values))


@pytest.mark.parametrize("quantity", ["weight_norm", "relative_update"])
def test_pool_with_an_unknown_value_is_nan(quantity: str) -> None:
    rows = table([(1, "b.1.q", quantity, np.nan), (1, "b.1.ff", quantity, 4.0)])
    assert norms.pool_modules(norms.select_quantity(rows, quantity))["value"].isna().all()


def test_places_are_sorted_from_embedding_to_head() -> None:
    rows = table([(1, module, "update_norm", 1.0) for module in MODULES["module"]])
    assert list(norms.select_quantity(rows, "update_norm")["place"].cat.categories) == ["embed", "0", "1", "head"]


def test_places_with_two_stacks_include_the_stack() -> None:
    places = [("d", "decoder", 0, "q"), ("n", "decoder", None, "norm"), ("e", "encoder", 10, "q")]
    modules = pd.DataFrame(
        [*places, ("f", "encoder", 9, "q"), ("m", "encoder", None, "norm"), ("w", "", None, "embed")],
        columns=["module", "stack", "layer", "role"],
    ).astype({"layer": "Int16"})
    rows = table([(1, module, "update_norm", 1.0) for module in modules["module"]], modules=modules)
    order = list(norms.layer_places(rows).cat.categories)
    assert order[:4] == ["embed", "encoder 9", "encoder 10", "decoder 0"]
    assert set(order[4:]) == {"encoder norm", "decoder norm"}


def test_last_uses_the_last_step_of_each_run_and_quantity() -> None:
    both = records.concat(
        [
            table([(1, "words", "update_norm", 1.0), (5, "words", "update_norm", 2.0)], "a"),
            table([(1, "words", "update_norm", 3.0), (7, "head", "weight_norm", 9.0)], "b"),
            table([(-1, "words", "update_norm", 4.0)], "folder"),
        ]
    )
    assert cells(norms.last_recorded(both), "run", "module") == {
        ("a", "words"): 2.0,
        ("b", "words"): 3.0,
        ("b", "head"): 9.0,
        ("folder", "words"): 4.0,
    }


def test_percent_change_is_relative_to_step_0_and_unknown_without_it_or_if_it_is_zero() -> None:
    steps = [(0, "words", 4.0), (5, "words", 3.0), (9, "words", 6.0), (0, "h.1.q", 0.0), (9, "h.1.q", 1.0)]
    rows = table([(step, module, "weight_norm", value) for step, module, value in [*steps, (9, "head", 1.0)]])
    changes = norms.percent_change(norms.pool_modules(norms.select_quantity(rows, "weight_norm")))
    percent = cells(changes, "step", "place")
    assert [percent[step, "embed"] for step in (0, 5, 9)] == [0.0, -25.0, 50.0]
    assert sum(np.isnan(list(percent.values()))) == len(percent) - 3 == 3


def test_frames_are_evenly_spaced_over_common_steps() -> None:
    def steps(run: str, recorded: range) -> pd.DataFrame:
        return table([(step, "words", "update_norm", 1.0) for step in recorded], run)

    both = records.concat([steps("a", range(0, 101, 10)), steps("b", range(0, 101, 5))])
    assert sorted(set(select_steps(both, 3)["step"])) == [0, 50, 100]
    assert sorted(set(select_steps(both, 99)["step"])) == list(range(0, 101, 10))
    with pytest.raises(ValueError, match="step in common"):
        select_steps(records.concat([steps("a", range(1, 3)), steps("b", range(5, 7))]), 3)


def test_select_of_a_missing_quantity_raises() -> None:
    with pytest.raises(ValueError, match="step_norm"):
        norms.select_quantity(table([(1, "words", "update_norm", 1.0)]), "step_norm")


@pytest.fixture
def sigmas() -> dict[str, np.ndarray]:
    """Return singular values of updates with known spectra (4, 3), (5, 0, ...) and zero, in rotated bases."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in (7, 5))
    updates = {
        "factors": LowRank(2.0 * left, np.diag([2.0, 1.5]) @ right.T, 1.0),
        "matrix": Dense(5.0 * np.outer(left[:, 0], right[:, 1])),
        "zero": LowRank(np.zeros((7, 2)), right.T, 1.0),
    }
    return {name: change.singular_values() for name, change in updates.items()}


def test_spectrum_has_sigma_and_cumulative_energy(sigmas: dict[str, np.ndarray]) -> None:
    found = spectra.tabulate_spectra(sigmas).set_index(["module", "component"])
    assert found.loc["factors", "sigma"].to_dict() == pytest.approx({1: 4.0, 2: 3.0})
    assert found.loc["factors", "energy"].to_dict() == pytest.approx({1: 16 / 25, 2: 1.0})
    assert found.loc["matrix", "sigma"].tolist() == pytest.approx([5.0, 0, 0, 0, 0], abs=1e-6)
    assert found.loc["zero", "energy"].tolist() == [0.0, 0.0]


def test_ranks_follow_their_definitions(sigmas: dict[str, np.ndarray]) -> None:
    found = spectra.rank_definitions(sigmas).set_index("module")
    p, e = np.array([4, 3]) / 7, np.array([16, 9]) / 25
    assert found.loc["factors"].to_dict() == pytest.approx(
        {
            "update_norm": 5.0,
            "components": 2,
            "stable_rank": 25 / 16,
            "effective_rank": np.exp(-(p * np.log(p)).sum()),
            "entropy_rank": np.exp(-(e * np.log(e)).sum()),
            "participation_rank": 25**2 / (4**4 + 3**4),
            "energy_rank": 2,
        }
    )
    assert found.loc["matrix", "effective_rank"] == pytest.approx(1.0, abs=1e-5)
    assert (found.loc["zero"].drop("components") == 0).all()


def test_similarity_matches_a_hand_computed_example() -> None:
    found = subspace_similarity.similarity(np.array([[2.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 0, 0], [0, 0, 3]]))
    values = {(row.i, row.j): row.phi for row in found.itertuples()}
    assert values == pytest.approx({(1, 1): 0.0, (1, 2): 1.0, (2, 1): 0.0, (2, 2): 0.5})
    assert found["phi_random"].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_similarity_of_random_subspaces_averages_to_the_baseline() -> None:
    rng = np.random.default_rng(1)
    draws = [subspace_similarity.similarity(rng.normal(size=(4, 64)), rng.normal(size=(16, 64))) for _ in range(300)]
    mean = sum(draw["phi"] for draw in draws) / len(draws)
    assert mean.to_numpy() == pytest.approx(draws[0]["phi_random"].to_numpy(), abs=0.015)


def test_similarity_of_updates_does_not_depend_on_the_factors() -> None:
    rng = np.random.default_rng(2)
    B, A, other = rng.normal(size=(6, 3)), rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    mix = rng.normal(size=(3, 3))
    one, same = LowRank(B, A), LowRank(B @ mix, np.linalg.solve(mix, A))
    against = LowRank(B, other)
    unchanged = {
        side: np.allclose(
            subspace_similarity.similarity_of_runs({"m": one}, {"m": against}, "m", side)["phi"],
            subspace_similarity.similarity_of_runs({"m": same}, {"m": against}, "m", side)["phi"],
        )
        for side in ("A", "B", "update")
    }
    assert unchanged == {"A": False, "B": False, "update": True}


@pytest.mark.parametrize(("side", "dimension"), [("A", 8), ("B", 6), ("update", 8)])
def test_similarity_of_a_run_with_itself_is_1(side: str, dimension: int) -> None:
    rng = np.random.default_rng(3)
    change = {"m": LowRank(rng.normal(size=(6, 3)), rng.normal(size=(3, 8)))}
    found = subspace_similarity.similarity_of_runs(change, change, "m", side).set_index(["i", "j"])
    assert [found.loc[(i, i), "phi"] for i in (1, 2, 3)] == pytest.approx([1, 1, 1])
    assert found.loc[(1, 3), "phi_random"] == pytest.approx(3 / dimension)


def test_similarity_in_a_module_of_one_run_only_raises() -> None:
    change = LowRank(np.eye(3), np.eye(3))
    with pytest.raises(ValueError, match=r"'m'.* n$"):
        subspace_similarity.similarity_of_runs({"m": change, "n": change}, {"n": change}, "m")
