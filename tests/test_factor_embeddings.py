"""Factor embeddings: cosines, sharedness and identity, compared with brute force, planted factors and scikit-learn."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from planted import plant
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier

from lorascope import plots
from lorascope.analysis import factor_embeddings, factor_sharing
from lorascope.analysis.factor_embeddings import build_factor_sets
from lorascope.updates import LowRank

DOMAINS = ("film", "music", "news")
RUNS = {f"{domain}{order}": domain for domain in DOMAINS for order in (1, 2)}


def scattered(seed: int, modules: int = 4, width: int = 12, rank: int = 2, runs=RUNS) -> dict:
    """Return random factors without anything in common."""
    draw = np.random.default_rng(seed)
    return {
        run: {
            f"h.{m}.q": LowRank(draw.normal(size=(width, rank)), draw.normal(size=(rank, width)), 0.5)
            for m in range(modules)
        }
        for run in runs
    }


def planted(seed: int, noise: float = 0.1, modules: int = 6, runs=RUNS) -> dict:
    """Return factors where A depends on the module only, and B on the module and domain, up to noise."""
    draw = np.random.default_rng(seed)
    A = {m: draw.normal(size=(2, 12)) for m in range(modules)}
    B = {(m, domain): draw.normal(size=(12, 2)) for m in range(modules) for domain in dict.fromkeys(runs.values())}

    def near(array):
        return array + noise * draw.normal(size=array.shape)

    return {
        run: {f"h.{m}.q": LowRank(near(B[m, domain]), near(A[m])) for m in range(modules)}
        for run, domain in runs.items()
    }


def cosine(one, two) -> float:
    return float(np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two))


def seen(update: LowRank, factor: str, view: str) -> np.ndarray:
    """Compute the array that a view compares from the dense matrix."""
    if view == "raw":
        return update.A if factor == "A" else update.B
    if view == "space":
        return np.linalg.pinv(update.A) @ update.A if factor == "A" else update.B @ np.linalg.pinv(update.B)
    U, sigma, Vt = np.linalg.svd(update.dense())
    U, sigma, Vt = U[:, : update.rank], sigma[: update.rank], Vt[: update.rank]
    signs = np.array([1.0 if column[np.abs(column).argmax()] > 0 else -1.0 for column in U.T])
    return (np.sqrt(sigma) * signs)[:, None] * (Vt if factor == "A" else U.T)


@pytest.mark.parametrize(("factor", "view"), list(product("AB", factor_embeddings.VIEWS)))
def test_clouds_have_the_cosines_of_the_viewed_arrays(factor, view):
    updates = scattered(0, modules=2)
    (cloud,) = build_factor_sets(updates, RUNS, (factor,), view)
    assert cloud.shape == ((12,) if view == "space" else (2, 12))
    table = cloud.table()
    arrays = [seen(updates[row.run][row.module], factor, view) for row in table.itertuples()]
    expected = [[cosine(one, two) for two in arrays] for one in arrays]
    np.testing.assert_allclose(cloud.flat, expected, atol=1e-12)
    assert table["domain"].tolist() == [RUNS[run] for run in table["run"]]
    assert set(table["factor"]) == {factor}


def rotations(rank: int, decades: float):
    """Yield invertible matrices: half orthogonal, half with condition numbers up to 10 ** decades."""
    draw = np.random.default_rng(1)
    for number in range(100):
        left, right = (np.linalg.qr(draw.normal(size=(rank, rank)))[0] for _ in range(2))
        spread = 1.0 if number % 2 else 10 ** draw.uniform(0, decades)
        yield (left * np.geomspace(1, spread, rank)) @ right


@pytest.mark.parametrize(
    ("precision", "spread", "decades"),
    [("float64", 1, 3), ("float32", 20, 0.5)],  # the error of a space is the rounding unit times both condition numbers
)
def test_refactoring_an_update_changes_the_raw_view_only(precision, spread, decades):
    runs, rounded = dict(list(RUNS.items())[:4]), PRECISIONS[precision]
    updates = {
        run: {name: LowRank(rounded(update.B * [1, 1 / spread]), rounded(update.A)) for name, update in found.items()}
        for run, found in planted(2, modules=2, runs=runs).items()
    }
    views = ("canonical", "space")
    first = factor_sharing.measure_sharing(updates, runs, views=views, draws=5)
    raw = factor_sharing.measure_sharing(updates, runs, views=("raw",), draws=5)
    moved = 0.0
    for R in rotations(2, decades):
        again = {
            run: {
                name: LowRank(rounded(update.B @ np.linalg.inv(R)), rounded(R @ update.A))
                if run.endswith("1")
                else update
                for name, update in found.items()
            }
            for run, found in updates.items()
        }
        other = factor_sharing.measure_sharing(again, runs, views=views, draws=5)
        for column in first.columns.drop(["factor", "view"]):
            np.testing.assert_allclose(other[column], first[column], atol=1e-5, rtol=0)
        turned = factor_sharing.measure_sharing(again, runs, views=("raw",), draws=5)
        moved = max(moved, np.abs(turned["cosine"] - raw["cosine"]).max())
    assert moved > 0.3


@pytest.mark.parametrize("factor", ["A", "B"])
def test_canonical_factor_ignores_components_without_a_singular_value(factor):
    """The factors have 3 components but the update has rank 2: the third component does not affect the result."""
    draw = np.random.default_rng(0)
    B, A = draw.normal(size=(12, 2)), draw.normal(size=(2, 12))
    whole = factor_embeddings.canonical_factor(LowRank(B, A, 0.5), factor)
    for _ in range(20):
        R = draw.normal(size=(3, 3))
        filled = np.vstack([A, draw.normal(size=(1, 12))])  # the matching column of B is zero
        update = LowRank(np.hstack([B, np.zeros((12, 1))]) @ np.linalg.inv(R), R @ filled, 0.5)
        found = factor_embeddings.canonical_factor(update, factor)
        assert found.shape == (3, 12)
        np.testing.assert_allclose(found[:2], whole, atol=1e-10)
        assert np.abs(found[2]).max() < 1e-6


def test_canonical_view_compares_runs_of_full_and_deficient_rank():
    updates = scattered(0, rank=3)
    for name, update in updates["film1"].items():
        updates["film1"][name] = LowRank(np.where(np.arange(3) < 2, update.B, 0.0), update.A, update.scale)
    (cloud,) = build_factor_sets(updates, RUNS, ("B",), "canonical")
    assert cloud.shape == (3, 12)
    row = cloud.table().reset_index().set_index(["module", "run"])["index"]
    one, two = (updates[run]["h.0.q"] for run in ("film1", "film2"))
    expected = cosine(factor_embeddings.canonical_factor(one, "B"), factor_embeddings.canonical_factor(two, "B"))
    assert cloud.flat[row["h.0.q", "film1"], row["h.0.q", "film2"]] == pytest.approx(expected)


def brain(array: np.ndarray) -> np.ndarray:
    """Round an array to bfloat16 and return it as float32, as it is read from a file."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 15)) & np.uint32(0xFFFF0000)).view(np.float32)


PRECISIONS = {"float16": np.float16, "bfloat16": brain, "float32": np.float32, "float64": np.float64}


@pytest.mark.parametrize(
    ("precision", "width", "weakest"),
    [("float16", 1024, 1 / 50), ("bfloat16", 384, 1 / 20), ("float32", 4096, 1 / 3e3), ("float64", 4096, 1e-9)],
)
def test_basis_ignores_rounding_of_the_saved_precision(precision, width, weakest):
    """Four directions count, even the weakest. The fifth row is the sum of two others, up to rounding."""
    draw, rounded = np.random.default_rng(0), PRECISIONS[precision]
    right, left = (np.linalg.qr(draw.normal(size=(side, 4)))[0] for side in (width, 4))
    rows = rounded(left * np.geomspace(1, weakest, 4) @ right.T)
    summed = np.vstack([rows, rounded(0.3 * np.float64(rows[:1]) + 0.7 * np.float64(rows[1:2]))])
    for A in (rows, summed):
        update = LowRank(np.ascontiguousarray(A.T), A)
        assert {factor: factor_embeddings.orthonormal_basis(update, factor).shape for factor in "AB"} == dict.fromkeys(
            "AB", (width, 4)
        )
    assert factor_embeddings.orthonormal_basis(LowRank(rounded(np.ones((6, 5))), summed), "B").shape == (6, 1)


def test_space_view_in_half_precision_matches_full_precision(tmp_path):
    whole = scattered(0, modules=2, width=1024)
    halves = {
        run: {name: LowRank(update.B.astype(np.float16), update.A.astype(np.float16)) for name, update in found.items()}
        for run, found in whole.items()
    }
    found, expected = (
        factor_sharing.measure_sharing(updates, RUNS, views=("space",), draws=5) for updates in (halves, whole)
    )
    for column in found.columns.drop(["factor", "view"]):
        np.testing.assert_allclose(found[column], expected[column], atol=0.02)  # the angle is in degrees
    modules = [{"module": name, "stack": "", "layer": int(name[2]), "role": "q"} for name in whole["film1"]]
    runs = {
        domain: plant(
            tmp_path, run, {("loss", ""): {9: 1.0}}, modules=modules,
            factors={name: (update.B, update.A) for name, update in halves[run].items()},
        )
        for run, domain in list(RUNS.items())[::2]
    }  # fmt: skip
    assert runs["film"].factors()["h.0.q"]["A"].dtype == np.float16
    (chart,) = plots.factor_embedding(runs, factors=("A",), view="space", perplexity=2).panels
    assert re.fullmatch(r"A, same A₀: same module \d+% \(chance 50%\)", chart.title)
    assert (chart.x.label, chart.y.label) == ("factors of shape 1024", "t-SNE, perplexity 2")


def test_clouds_separate_factors_of_different_widths():
    draw = np.random.default_rng(0)

    def update(out, width):
        return LowRank(draw.normal(size=(out, 2)), draw.normal(size=(2, width)))

    updates = {run: {"q": update(6, 6), "up": update(9, 6), "v": update(6, 6), "down": update(6, 9)} for run in RUNS}
    found = {cloud.shape: cloud for cloud in build_factor_sets(updates, RUNS, ("A",))}
    assert {shape: cloud.modules for shape, cloud in found.items()} == {(2, 6): ["q", "up", "v"], (2, 9): ["down"]}
    both = {
        cloud.shape: list(zip(cloud.modules, cloud.factors, strict=True)) for cloud in build_factor_sets(updates, RUNS)
    }
    assert both[2, 9] == [("down", "A"), ("up", "B")]
    assert both[2, 6] == [("q", "A"), ("up", "A"), ("v", "A"), ("q", "B"), ("v", "B"), ("down", "B")]
    shared = factor_sharing.sharedness(list(found.values()))
    assert shared["sharedness_chance"] == pytest.approx((3 * 1 / 3 + 1) / 4)
    assert shared["sharedness"] >= 1 / 4  # the only module of its width always matches


def test_factors_that_cannot_be_compared_raise():
    updates = scattered(0)
    zero = {
        run: {name: LowRank(0 * update.B, update.A) for name, update in found.items()} for run, found in updates.items()
    }
    with pytest.raises(ValueError, match=r"^B of h\.0\.q in run film1 .*got all zeros"):
        build_factor_sets(zero, RUNS, ("B",))
    assert len(build_factor_sets(zero, RUNS, ("A",), "space")) == 1
    mixed = updates | {"film1": scattered(1, rank=3)["film1"]}
    with pytest.raises(ValueError, match=r"got shapes 2 x 12 and 3 x 12: .*view='space'"):
        build_factor_sets(mixed, RUNS, ("A",))
    assert build_factor_sets(mixed, RUNS, ("A",), "space")[0].shape == (12,)
    wider = updates | {"film1": scattered(1, rank=3, width=14)["film1"]}
    for view in factor_embeddings.VIEWS:
        with pytest.raises(ValueError, match=r"^A of h\.0\.q .*width.*got 12 and 14"):
            build_factor_sets(wider, RUNS, ("A",), view)
    with pytest.raises(ValueError, match=r"film1.*module in common"):
        build_factor_sets(updates | {"film1": {"other": updates["film2"]["h.0.q"]}}, RUNS)
    one_domain = {"film1": updates["film1"], "film2": updates["film2"]}
    with pytest.raises(ValueError, match=r"domains.*got only 'film'"):
        factor_sharing.sharedness(build_factor_sets(one_domain, RUNS, ("A",)))
    with pytest.raises(ValueError, match=r"^B of h\.0\.q in run film1 .*got all zeros"):
        factor_sharing.mean_angle(zero, RUNS, "B")
    with pytest.raises(ValueError, match=r"domain.* 2 .*got 1 .*'music'"):
        factor_sharing.identity(build_factor_sets({run: updates[run] for run in list(RUNS)[:3]}, RUNS, ("A",)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("view", factor_embeddings.VIEWS)
def test_factors_that_are_not_finite_raise(view, value):
    updates = scattered(0)
    broken = updates["music1"]["h.2.q"]
    broken.A[1, 3] = value
    for factor in ("A", "B") if view == "canonical" else ("A",):
        with pytest.raises(ValueError, match=rf"^{factor} of h\.2\.q in run music1 .*got NaN or infinity") as raised:
            build_factor_sets(updates, RUNS, (factor,), view)
        assert "\n" not in str(raised.value)
    if view != "canonical":  # these views use only B, which is finite
        assert len(build_factor_sets(updates, RUNS, ("B",), view)) == 1


def test_clouds_and_angles_use_the_common_modules_only():
    updates = scattered(0)
    updates["film1"].pop("h.1.q")
    assert build_factor_sets(updates, RUNS, ("A",))[0].modules == ["h.0.q", "h.2.q", "h.3.q"]
    updates["music1"] = {name: updates["music1"][name] for name in reversed(list(updates["music1"]))}
    assert build_factor_sets(updates, RUNS, ("A",))[0].modules == ["h.0.q", "h.2.q", "h.3.q"]
    common = {run: {name: found[name] for name in ("h.0.q", "h.2.q", "h.3.q")} for run, found in updates.items()}
    angle = factor_sharing.mean_angle(common, RUNS, "A")
    for updates_of in (updates, dict(reversed(updates.items()))):
        assert factor_sharing.mean_angle(updates_of, RUNS, "A") == pytest.approx(angle, rel=1e-12)


def test_retrieval_matches_a_search_with_loops():
    """Three modules and four runs, with a brute-force search for the nearest neighbor."""
    runs = {"film1": "film", "film2": "film", "music1": "music", "news1": "news"}
    updates = {run: found for run, found in planted(3, noise=3.0, modules=3, runs=runs).items()}
    found = factor_sharing.retrieve_modules(build_factor_sets(updates, runs, ("A",))[0]).set_index(["module", "run"])
    hits = []
    for module, run in product(updates["film1"], runs):
        here = updates[run][module].A
        near = {
            (name, other): cosine(here, updates[other][name].A)
            for name, other in product(updates["film1"], runs)
            if runs[other] != runs[run]
        }
        hits.append(max(near, key=near.get)[0] == module)
        assert found.loc[(module, run), "same"] == hits[-1]
        own = [value for (name, _), value in near.items() if name == module]
        assert found.loc[(module, run), "cosine"] == pytest.approx(np.mean(own))
    assert 0 < np.mean(hits) < 1
    assert (found["chance"] == 1 / 3).all()


def test_planted_factors_are_shared_for_a_and_domain_specific_for_b():
    modules = 24
    found = factor_sharing.measure_sharing(
        planted(4, modules=modules), RUNS, views=("raw", "space"), draws=99
    ).set_index(["factor", "view"])
    for view in ("raw", "space"):
        assert found.loc[("A", view), "sharedness"] == 1
        assert found.loc[("B", view), "neighbour"] == 1
        assert (
            found.loc[("B", view), "neighbour_p"] < 0.15
        )  # six runs have 15 ways to form pairs, and one is the true one
        assert found.loc[("A", view), "cosine"] > 0.9 > 0.2 > abs(found.loc[("B", view), "cosine"])
        # Runs of a domain share B, so hits come in groups of four; allow seven standard errors of independent groups.
        error = np.sqrt(1 / modules / (modules * 6 / 4))
        assert abs(found.loc[("B", view), "sharedness"] - 1 / modules) < 7 * error
        assert abs(found.loc[("A", view), "neighbour"] - 1 / 5) < 0.15
    assert (found["sharedness_chance"] == 1 / modules).all()
    assert np.isnan(found.loc[("A", "raw"), "angle"])
    assert found.loc[("A", "space"), "angle"] < 15 < 40 < found.loc[("B", "space"), "angle"]


def test_mean_angle_matches_a_planted_rotation():
    turn = np.radians(25)
    rows = np.eye(2, 6)
    turned = np.cos(turn) * rows + np.sin(turn) * np.roll(rows, 2, axis=1)
    updates = {"film": {"q": LowRank(np.eye(6, 2), rows)}, "music": {"q": LowRank(np.eye(6, 2), 7 * turned[::-1])}}
    domains = {"film": "film", "music": "music"}
    assert factor_sharing.mean_angle(updates, domains, "A") == pytest.approx(25)
    assert factor_sharing.mean_angle(updates, domains, "B") == pytest.approx(0, abs=1e-9)
    assert factor_sharing.sharedness(build_factor_sets(updates, domains, ("A",), "space"))["cosine"] == pytest.approx(
        np.cos(turn) ** 2
    )


@pytest.mark.parametrize("seed", range(3))
def test_identity_matches_scikit_learn_in_each_module(seed):
    updates = planted(seed, noise=1.0)
    found = factor_sharing.identity(build_factor_sets(updates, RUNS, ("B",)), draws=1)
    labels = np.array(list(RUNS.values()))
    silhouettes, hits = [], []
    for module in updates["film1"]:
        flat = np.array([updates[run][module].B.ravel() for run in RUNS])
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        silhouettes.append(silhouette_score(flat, labels, metric="cosine"))
        for left in range(len(labels)):
            rest = np.arange(len(labels)) != left
            near = KNeighborsClassifier(1).fit(flat[rest], labels[rest])
            hits.append(near.predict(flat[[left]])[0] == labels[left])
    assert found["silhouette"] == pytest.approx(np.mean(silhouettes))
    assert found["neighbour"] == pytest.approx(np.mean(hits))


def test_identity_of_identical_factors_is_at_chance():
    updates = scattered(0)
    lengths = dict(zip(RUNS, (1.0, 0.3, 7.0, 1.1, 0.7, 13.0), strict=True))  # scaling by these causes rounding errors
    same = {
        run: {name: LowRank(update.B, length * update.A) for name, update in updates["film1"].items()}
        for run, length in lengths.items()
    }
    (cloud,) = build_factor_sets(same, RUNS, ("A",))
    found = factor_sharing.identity([cloud], draws=50)
    assert found["silhouette"] == found["silhouette_chance"] == 0
    assert found["neighbour"] == pytest.approx(1 / 5)
    assert found["neighbour_p"] == found["silhouette_p"] == 1
    assert factor_sharing.sharedness([cloud])["sharedness"] == 1


def null(seed: int, common: float) -> np.ndarray:
    """Return cosines (slot, run, slot, run) of nine runs without domain structure, optionally similar within a run."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(8, 9, 6)) + common * draw.normal(size=(9, 6))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    return np.einsum("sik,tjk->sitj", points, points)


LABELS = np.repeat([0, 1, 2], 3)


@pytest.mark.parametrize("common", [0.0, 2.0])
def test_p_values_without_domain_structure_are_uniform(common):
    runs, repetitions = [str(run) for run in range(9)], 200
    found = {"neighbour_p": [], "silhouette_p": []}
    for seed in range(repetitions):
        slots = [str(slot) for slot in range(8)]
        domains = [str(label) for label in LABELS]
        cloud = factor_embeddings.FactorSet((6,), slots, ["A"] * 8, runs, domains, null(seed, common))
        result = factor_sharing.identity([cloud], draws=99, seed=seed)
        for name, values in found.items():
            values.append(result[name])
    for level in (0.1, 0.25, 0.5, 0.75):
        error = 3.5 * np.sqrt(level * (1 - level) / repetitions)
        reached = {name: np.mean(np.array(values) <= level) for name, values in found.items()}
        assert abs(reached["silhouette_p"] - level) < error
        assert reached["neighbour_p"] < level + error  # ties make this test conservative


def test_permuting_each_module_separately_rejects_too_often():
    """This is the reason to use one permutation for all modules: otherwise over a quarter of null cases is rejected."""
    called = 0
    for seed in range(60):
        cosine = np.einsum("sisj->sij", null(seed, 2.0))
        draw = np.random.default_rng(seed)
        values = [
            factor_sharing.silhouettes(
                slot[None], np.concatenate([LABELS[None], draw.permuted(np.tile(LABELS, (99, 1)), axis=1)])
            )
            for slot in cosine
        ]
        mean = np.mean(values, axis=0)
        called += np.mean(mean >= mean[0]) <= 0.05
    assert called > 60 / 4


def test_silhouette_over_all_modules_at_once_misses_clear_domains():
    updates = planted(5, noise=0.05)
    flat = np.array([updates[run][module].B.ravel() for module in updates["film1"] for run in RUNS])
    labels = list(RUNS.values()) * len(updates["film1"])
    assert silhouette_score(flat, labels, metric="cosine") < 0.05
    assert factor_sharing.identity(build_factor_sets(updates, RUNS, ("B",)), draws=9)["silhouette"] > 0.9


def test_pca_from_cosines_matches_pca_of_the_vectors():
    updates = scattered(6)
    (cloud,) = build_factor_sets(updates, RUNS, ("A",))
    flat = np.array([updates[row.run][row.module].A.ravel() for row in cloud.table().itertuples()])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    expected = PCA(3).fit_transform(flat)
    found = factor_embeddings.pca(cloud, 3)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    assert (found.max(axis=0) == np.abs(found).max(axis=0)).all()


def test_tsne_keeps_planted_neighbors_together_and_is_deterministic():
    (cloud,) = build_factor_sets(planted(7), RUNS, ("A",))
    plane = factor_embeddings.tsne(cloud, perplexity=5)
    np.testing.assert_array_equal(plane, factor_embeddings.tsne(cloud, perplexity=5))
    modules = cloud.table()["module"].to_numpy()
    distance = np.linalg.norm(plane[:, None] - plane[None], axis=-1) + np.diag(np.full(len(plane), np.inf))
    assert (modules[distance.argmin(axis=1)] == modules).all()
    first, second = (factor_embeddings.tsne(cloud, perplexity=5, seed=seed) for seed in (0, 1))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("perplexity", [36, 0, -1.5])
def test_tsne_with_an_invalid_perplexity_raises(perplexity):
    (cloud,) = build_factor_sets(planted(8), RUNS, ("A",))
    with pytest.raises(ValueError, match=rf"^perplexity.* 36, .*got {perplexity:g}$"):
        factor_embeddings.tsne(cloud, perplexity=perplexity)
    assert factor_embeddings.default_perplexity(36) == 12
    assert factor_embeddings.default_perplexity(512) == 30


PLACES = [{"module": f"h.{m}.q", "stack": "", "layer": m, "role": ("q", "v")[m % 2]} for m in range(6)]


@pytest.fixture
def domains(tmp_path):
    """Return runs by domain, with a shared A and a domain-specific B, and the updates they were made from."""
    updates = planted(9)
    found = {domain: [] for domain in DOMAINS}
    for seed, (run, domain) in enumerate(RUNS.items()):
        factors = {name: (update.B, update.A) for name, update in updates[run].items()}
        values = {("loss", ""): {9: 1.0}}
        found[domain].append(plant(tmp_path, run, values, "LoRA", seed, factors, modules=PLACES))
    return found, updates


def test_figure_shows_a_next_to_b_with_their_shared_fractions(domains):
    runs, updates = domains
    panels = plots.factor_embedding(runs)
    (row,) = panels.rows()
    (cloud,) = build_factor_sets(updates, RUNS, ("B",))
    shared = 100 * factor_sharing.sharedness([cloud])["sharedness"]
    titles = [
        "A, different A₀: same module 100% (chance 17%)",
        f"B, different A₀: same module {shared:.0f}% (chance 17%)",
    ]
    assert [chart.title for chart in row] == titles
    assert [chart.y.label for chart in row] == 2 * ["t-SNE, perplexity 12"]
    assert all(chart.square for chart in row)
    for chart, factor in zip(row, "AB", strict=True):
        (cloud,) = build_factor_sets(updates, RUNS, (factor,))
        plane = factor_embeddings.tsne(cloud, 12)
        plane = plane - (plane.min(axis=0) + plane.max(axis=0)) / 2
        np.testing.assert_allclose(chart.data[["x", "y"]], plane / np.abs(plane).max())
        assert np.abs(chart.data[["x", "y"]].to_numpy()).max() == 1
        assert chart.data["domain"].tolist() == [RUNS[run] for run in chart.data["run"]]
        assert chart.data["role"].tolist() == [("q", "v")[int(name[2]) % 2] for name in chart.data["module"]]
        assert chart.marks[1].columns() == {"x": "x", "y": "y", "color": "domain", "size": "size"}
        assert chart.data["start"].unique().tolist() == ["from PCA"]
        assert chart.frame is None
    sizes = {"film": 1.0, "music": 0.65, "news": 0.3}
    assert dict(zip(chart.data["domain"], chart.data["size"], strict=True)) == sizes
    assert "film: 2 seeds (0, 1)" in chart.caption.lower()
    assert "another domain is from the same module" in chart.caption


def test_thin_lines_join_the_dots_of_a_module_with_their_mean(domains):
    chart = plots.factor_embedding(domains[0], together=True, seeds=[4]).rows()[0][0]
    line = chart.marks[0]
    assert line.muted
    ends = line.data.groupby(line.stretch)[["x", "y"]].agg(["first", "last"])
    assert len(ends) == len(chart.data)
    np.testing.assert_array_equal(ends.xs("first", axis=1, level=1), chart.data[["x", "y"]])
    for _, dots in chart.data.reset_index(drop=True).groupby(["start", "factor", "module"]):
        middle = ends.xs("last", axis=1, level=1).loc[dots.index]
        np.testing.assert_allclose(middle, 0 * middle + dots[["x", "y"]].mean())


def test_figure_with_a_control_and_seeds_has_rows_and_frames_for_them(domains):
    runs, _ = domains
    panels = plots.factor_embedding(runs, control=runs, perplexity=[3, 8], seeds=[4, 5])
    titles = [[chart.title.partition(": same")[0] for chart in row] for row in panels.rows()]
    A, B = "A, different A₀", "B, different A₀"
    assert titles == 2 * [[A, B]] + 2 * [[f"control: {A}", f"control: {B}"]]
    labels = [chart.y.label for chart in panels.panels]
    assert labels == 2 * (2 * ["t-SNE, perplexity 3"] + 2 * ["t-SNE, perplexity 8"])
    chart = panels.rows()[0][0]
    assert {chart.frame for chart in panels.panels} == {"start"}
    assert chart.data["start"].unique().tolist() == ["from PCA", "from seed 4", "from seed 5"]
    first, second = (chart.data.loc[chart.data["start"] == f"from seed {seed}", ["x", "y"]] for seed in (4, 5))
    assert not np.allclose(first, second)
    assert len(chart.data) == 3 * 36
    assert "Control: film: 2 seeds" in chart.caption
    assert len({chart.caption for row in panels.rows() for chart in row}) == 1


def test_figure_of_modules_has_separate_rows_for_different_widths(tmp_path):
    """Up is 9 x 6 and down 6 x 9: A of one has the width of B of the other. Nothing is truncated or padded."""
    draw = np.random.default_rng(0)
    shapes = {"h.0.up": (9, 6), "h.0.down": (6, 9), "h.1.up": (9, 6), "h.1.down": (6, 9)}
    places = [
        {"module": name, "stack": "", "layer": int(name[2]), "role": "ffn_in" if name.endswith("up") else "ffn_out"}
        for name in shapes
    ]
    runs = {}
    for seed, (run, domain) in enumerate(list(RUNS.items())[:4]):
        factors = {name: (draw.normal(size=(o, 2)), draw.normal(size=(2, i))) for name, (o, i) in shapes.items()}
        runs.setdefault(domain, []).append(
            plant(tmp_path, run, {("loss", ""): {9: 1.0}}, "LoRA", seed, factors, modules=places)
        )
    for view, of in (("raw", "2 × "), ("canonical", "2 × "), ("space", "")):
        rows = plots.factor_embedding(runs, perplexity=2, view=view, modules=list(shapes)).rows()
        shown = [[(chart.title[0], chart.x.label.removeprefix("factors of shape ")) for chart in row] for row in rows]
        assert shown == [[("A", f"{of}6"), ("B", f"{of}9")], [("A", f"{of}9"), ("B", f"{of}6")]]
        for row in rows:
            assert {chart.data["role"].nunique() for chart in row} == {1}


def test_titles_have_the_random_baseline_of_their_panel_if_widths_differ(tmp_path):
    """All three A's have width 6, so chance is 1/3. One B has width 9 (chance 1) and two have width 6 (chance 1/2)."""
    draw = np.random.default_rng(0)
    sides = {"h.0.q": 6, "h.0.up": 9, "h.0.v": 6}
    places = [{"module": name, "stack": "", "layer": 0, "role": name[4:].replace("up", "ffn_in")} for name in sides]
    runs = {}
    for run, domain in list(RUNS.items())[::2]:
        factors = {name: (draw.normal(size=(side, 2)), draw.normal(size=(2, 6))) for name, side in sides.items()}
        runs[domain] = plant(tmp_path, run, {("loss", ""): {9: 1.0}}, factors=factors, modules=places)
    for modules, expected in (((), [["33", "50"]]), (list(sides), [["33", "50"], ["100"]])):
        rows = plots.factor_embedding(runs, perplexity=2, modules=modules).rows()
        chances = [[re.search(r" \d+% \(chance (\d+)%\)$", chart.title)[1] for chart in row] for row in rows]
        assert chances == expected  # without names of modules, only the width of the most modules


def test_figure_together_has_a_and_b_in_one_plane(domains):
    runs, _ = domains
    chart = plots.factor_embedding(runs, together=True, view="space").rows()[0][0]
    assert re.fullmatch(r"A and B, different A₀: same module \d+% \(chance 8%\)", chart.title)
    assert chart.y.label == "t-SNE, perplexity 24"
    assert chart.data["factor"].value_counts().to_dict() == {"A": 36, "B": 36}
    names = chart.marks[2].data.set_index("factor")
    top = chart.data[chart.data["factor"] == "A"]
    assert (names.loc["A", "x"], names.loc["A", "y"]) == (pytest.approx(top["x"].mean()), top["y"].max())
    assert list(plots.factor_embedding(runs, factors=("A",)).rows()[0][0].data["factor"].unique()) == ["A"]


def test_dot_labels_with_two_stacks_include_the_stack(tmp_path):
    draw = np.random.default_rng(0)
    modules = ["encoder.0.q", "decoder.0.q"]
    places = [{"module": name, "stack": name[:7], "layer": 0, "role": "q"} for name in modules]
    runs = {}
    for seed, (run, domain) in enumerate(list(RUNS.items())[:4]):
        factors = {name: (draw.normal(size=(6, 2)), draw.normal(size=(2, 6))) for name in modules}
        runs.setdefault(domain, []).append(
            plant(tmp_path, run, {("loss", ""): {9: 1.0}}, "LoRA", seed, factors, modules=places)
        )
    names = plots.factor_embedding(runs, modules=modules, perplexity=2).rows()[0][-1].marks[2].data
    assert set(names["place"]) == {"encoder 0 q", "decoder 0 q"}


def test_figure_of_few_modules_labels_the_dots(domains):
    """As in figure 10: all dots of a shared A coincide and have one label; those of B are grouped by domain."""
    runs, _ = domains
    few = ["h.1.q", "h.4.q"]
    ((of_a, of_b),) = plots.factor_embedding(runs, modules=few, perplexity=3).rows()
    for chart in (of_a, of_b):
        names = chart.marks[2].data
        assert set(zip(names["module"], names["place"], strict=True)) == {("h.1.q", "1 v"), ("h.4.q", "4 q")}
        dots = names.merge(chart.data, on=["x", "module", "run"], suffixes=("", "_dot"))
        assert len(dots) == len(names) < len(chart.data)
        assert (dots["y"] > dots["y_dot"]).all()
        assert names["y"].max() < chart.y.limits[1]
    assert len(of_a.marks[2].data) <= len(of_b.marks[2].data)
    assert of_a.title == "A, different A₀: same module 100% (chance 50%)"
    with pytest.raises(
        ValueError, match=r"^factor_embedding.*got 'h\.9\.q'; expected one of h\.0\.q, h\.1\.q, "
    ) as raised:
        plots.factor_embedding(runs, modules=["h.1.q", "h.9.q"])
    assert "\n" not in str(raised.value)


def test_figure_of_one_run_or_with_an_invalid_perplexity_raises(domains):
    runs, _ = domains
    with pytest.raises(ValueError, match=r"factor_embedding.*got 1"):
        plots.factor_embedding(runs["film"][0])
    with pytest.raises(ValueError, match=r"perplexity.* 36, .*got 40"):
        plots.factor_embedding(runs, perplexity=40)
