"""The catalogue of figures, and what is refused before anything is drawn."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import lookup, low_rank, plant, profile

from lorascope import plots
from lorascope.plots import registry


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """``plant`` in a folder of the test."""
    return partial(plant, tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("update_norm", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("norm_over_steps", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("mean_norm", "records of weight_norm: train with observe=[ls.observe.norms()]"),
        ("training_curves", "records of loss"),
        ("spectrum", "singular values of updates: train with observe=[ls.observe.norms()]"),
        ("subspace_similarity", "the adapters' factors: train with a method that has factors"),
    ],
)
def test_a_figure_names_the_recorder_that_is_missing(write: Any, name: str, reason: str) -> None:
    bare = write("a", {("lr", ""): {1: 0.1}})
    with pytest.raises(ValueError, match=re.escape(f"{name} needs {reason}")) as raised:
        getattr(plots, name)(bare)
    assert "\n" not in str(raised.value)


def test_a_folder_without_history_or_base_is_told_apart_from_missing_records(write: Any) -> None:
    values = {("update_norm", "h.0.q"): {-1: 2.0}, ("weight_norm", "h.0.q"): {-1: np.nan}}
    folder = write("a", values, "LoRA rank 16", seed=None)
    assert lookup(plots.update_norm(folder), "place") == {"0": 2.0}
    with pytest.raises(ValueError, match="update_norm at more than one step"):
        plots.norm_over_steps(folder)
    with pytest.raises(ValueError, match="unknown without the base"):
        plots.update_norm(folder, quantity="weight_norm")


def test_available_agrees_with_what_can_be_drawn(write: Any) -> None:
    run = write("a", profile(1, 3, 4), factors={"h.0.q": low_rank(1, 1)})
    other = write("b", profile(1, 3, 4), seed=1, factors={"h.0.q": low_rank(1, 1)})
    found = plots.available(run).set_index("figure")
    assert set(found.index) == set(plots.FIGURES)
    for name, row in found.iterrows():
        draw = plots.FIGURES[name].draw
        if row["drawable"]:
            draw([run, other][: row["runs"]])
            assert row["missing"] == ""
        else:
            with pytest.raises(ValueError, match=row["missing"].partition(":")[0]):
                draw(run)
    assert found.loc["training_curves", "missing"].startswith("records of loss")


def test_every_figure_says_how_it_is_read_and_when_it_misleads() -> None:
    for entry in plots.FIGURES.values():
        assert getattr(plots, entry.name) is entry.draw
        for text in (entry.reads, entry.misleads):
            assert text.endswith(".")
            assert len(text.split()) > 15


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"steps": 10}}, "differ in settings"),
        ({"recipe": {"name": "lora", "rank": 3}}, "differ in recipe"),
        ({"seed": 0}, r"seeds \[0, 0\]"),
        ({"seed": None}, r"seeds \[0, None\]"),
    ],
)
def test_runs_that_are_no_seeds_of_one_recipe_are_not_averaged(write: Any, change: dict, reason: str) -> None:
    one, two = write("a", profile(1, 3, 4)), write("b", profile(1, 3, 4), **({"seed": 1} | change))
    with pytest.raises(ValueError, match=reason):
        plots.update_norm([one, two])
    assert set(plots.update_norm({"one": one, "two": [two]}).data["recipe"]) == {"one", "two"}


def test_the_same_run_twice_or_none_is_refused(write: Any) -> None:
    run = write("a", profile(1, 3, 4))
    with pytest.raises(ValueError, match="run a twice"):
        plots.update_norm({"one": run, "two": run})
    with pytest.raises(ValueError, match="no run"):
        plots.update_norm([])


def mixture(write: Any, id: str, seed: int = 0, label: str = "Hydra", exact: bool = False, **meta: Any) -> Any:
    """A run with all that figures of updates need, its two modules mixtures unless they are exact."""
    names = {"h.0.q": 3.0, "h.1.q": 2.0}
    values = {
        (quantity, module): {0: 0.0, 4: size / 2, 9: size}
        for quantity in ("weight_norm", "learned_norm", "update_norm", "rank", "loss")
        for module, size in names.items()
    }
    draw = np.random.default_rng(seed)
    factors = {name: (draw.normal(size=(6, 2)), draw.normal(size=(2, 5))) for name in names}
    return write(id, values, label, seed, factors, exact=exact, **meta)


def captions(drawn: Any) -> list[str]:
    return [chart.caption for row in drawn.rows() for chart in row]


ABOUT_UPDATES = {
    "atlas", "factor_embedding", "mean_norm", "norm_over_steps", "spectrum", "subspace_similarity", "update_image",
    "update_norm", "update_norm_heat",
}  # fmt: skip


def test_every_figure_of_an_update_says_once_that_a_mixture_is_at_mean_gates(write: Any) -> None:
    runs = [mixture(write, f"m{seed}", seed) for seed in (0, 1)]
    plain = [mixture(write, f"p{seed}", seed, "LoRA", exact=True) for seed in (0, 1)]
    drawable = plots.available(runs[0]).set_index("figure")["drawable"]
    about = {name for name, entry in plots.FIGURES.items() if not registry.OF_UPDATES.isdisjoint(entry.needs)}
    for name in drawable[drawable].index:
        draw = plots.FIGURES[name].draw
        for drawn in (draw({"mixed": runs, "plain": plain}), draw({"plain": plain}, control={"mixed": runs})):
            counts = {caption.count("Updates of mixed at mean gates.") for caption in captions(drawn)}
            assert counts == {1 if name in about else 0}, name
            assert all(caption.count("gates") == sum(counts) for caption in captions(drawn))
        assert not any("gates" in caption for caption in captions(draw({"a": plain[:1], "b": plain[1:]})))
    assert set(drawable[drawable].index) >= about & ABOUT_UPDATES == ABOUT_UPDATES


def test_a_saved_figure_keeps_which_of_its_updates_are_mixtures(write: Any) -> None:
    runs = {"mixed": mixture(write, "m"), "plain": mixture(write, "p", exact=True)}
    assert plots.update_norm(runs).meta["mixtures"] == {"mixed": "mean gates"}
    assert "mixtures" not in plots.update_norm({"plain": runs["plain"]}).meta
    assert "mixtures" not in plots.training_curves(runs).meta
