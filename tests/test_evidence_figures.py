"""Figures of the gallery: registered arms, and each drawn once from short runs or planted scores."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Point
from lorascope.charts.save import save_small
from lorascope.inputs import models, tasks
from lorascope.methods.method import config
from lorascope.papers import fourierft_expressiveness, lora, neft, planted_ranks, score_agreement
from lorascope.papers.figures.excerpt import EXCERPTS, write_excerpt
from lorascope.papers.figures.gallery_figure import KeptScores, printed
from lorascope.papers.figures.redraw import _kept_run
from lorascope.papers.judging import kept_figures, kept_runs, registration
from lorascope.papers.judging.kept_figures import FigureAbout, KeptFigure, digest_in
from lorascope.papers.probe import OwnArm
from lorascope.papers.registry import SECTIONS, GalleryFigure
from lorascope.papers.training.train_arms import registered_arms
from lorascope.plots.builders import add_printed
from lorascope.training import loop

LISTED = [figure for section in SECTIONS.values() for figure in section]
FIGURES = {figure.name: figure for figure in LISTED}
# Values of fields that fit a tiny model and few steps.
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_rank": 4, "target_rank": 2},
    "adapprox": {"min_dim": 8},
    "alora": {"init_rank": 2, "rounds": 2, "score_rows": 4},
    "autolora": {"search_steps": 4},
    "fourierft": {"coefficients": 16},
    "hydralora": {"gate_rows": 16},
    "neft": {"tune_steps": 2, "tune_lr": 1e-3},
}


def test_figures_have_distinct_names_and_registered_arms() -> None:
    assert len(FIGURES) == len(LISTED)
    arms = registration.read().arms
    assert {label for figure in FIGURES.values() for label in figure.arms.values()} <= set(arms)
    assert not any(arms[label].baseline for figure in FIGURES.values() for label in figure.arms.values())


ABOUT = FigureAbout("LoRA", "a point", ("run a", "run b"), "c" * 40)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, KeptFigure]:
    """Return the image of a kept figure, and the figure."""
    chart = Chart(pd.DataFrame({"x": [1.0], "y": [2.0]}), [Point("x", "y")])
    kept = kept_figures.write(tmp_path, "point", chart.flat(), ABOUT)
    facts = {"runs": list(ABOUT.runs), "commit": ABOUT.commit, "data_sha256": kept.digest}
    return save_small(chart, tmp_path / "point.png", **facts), kept


def rewrite(image: Path, black: bool = False, **facts: Any) -> None:
    """Write an image again with other entries of its provenance, or with the same and black pixels."""
    with Image.open(image) as opened:
        about, copied = json.loads(opened.info["lorascope"]) | facts, opened.convert("RGB")
    text = PngInfo()
    text.add_text("lorascope", json.dumps(about))
    (Image.new("RGB", copied.size) if black else copied).save(image, "PNG", pnginfo=text)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda image: rewrite(image), ""),  # the same pixels in another file
        (lambda image: rewrite(image, runs=["zzz"]), "runs: kept ['zzz'], recomputed ['run a', 'run b']"),
        (lambda image: rewrite(image, commit="0" * 40), f"commit: kept '{'0' * 40}', recomputed '{'c' * 40}'"),
        (lambda image: rewrite(image, black=True), "pixels_sha256: kept "),
        (lambda image: image.write_bytes(image.read_bytes()[:3000]), "data_sha256: kept no image with chart data"),
        (lambda image: image.write_bytes(b"x"), "data_sha256: kept no image with chart data"),
    ],
)
def test_image_that_differs_from_its_figure_is_named(
    drawn: tuple[Path, KeptFigure], change: Callable[[Path], None], line: str
) -> None:
    image, kept = drawn
    change(image)
    lines = list(kept_figures.image_differences({"point": kept}, set(ABOUT.runs), image.parent))
    assert len(lines) == bool(line)
    assert all(found.startswith(f"figures/point.png: {line}") for found in lines)


def kept_run(label: str, seed: int, role: str = "judged", rate: float = 1e-3) -> KeptScores:
    """Return a run of an arm with planted scores, as the evidence keeps it."""
    arm: Any = registered_arms()[label]
    draw = np.random.default_rng(zlib.crc32(f"{label} {seed} {rate}".encode()))
    tested = role == "judged"
    toy = isinstance(arm, OwnArm)
    method = arm.method if toy else config(replace(arm.of_seed(seed).method, lr=rate))
    row = {
        "arm": label, "run": f"{label} {role} {seed} {rate}", "seed": seed, "rate": rate, "validation_chance": 0.5,
        "method": json.dumps(method), "model": "minilm", "task": "t",
        "settings": json.dumps({"steps": 300, "batch_size": 16}), "trained_parameters": 1000 * len(label),
        "validation_loss": np.nan if tested else draw.random(), "validation_metric": draw.random(),
        "test_loss": draw.random() if tested else np.nan,
        "test_metric": draw.uniform(0.7, 0.72) if tested else np.nan,
    }  # fmt: skip
    cells = [
        (f"m{n // 2}", n % 2, score) for n in range(8) for score in (*score_agreement.HALVES, score_agreement.SIZE)
    ]
    scores = pd.DataFrame(cells, columns=["module", "component", "score"])
    names = [f"encoder.layer.{layer}.attention.self.{role}" for layer in (0, 1) for role in ("query", "key")]
    norms = pd.DataFrame({"module": names, "update": draw.uniform(4, 8, len(names)), "random": 1.0})
    tables = {score_agreement.SCORES: scores.assign(value=draw.random(len(scores))), lora.AMPLIFICATION: norms}
    if toy:
        tables[fourierft_expressiveness.COURSE] = pd.DataFrame(
            {"best_accuracy": [draw.choice([0.8, 1.0])], "epochs": [seed]}
        )
    if label.startswith("NeFT"):
        tables[neft.UTILIZATION] = pd.DataFrame({"role": list("aaaabb"), "rank": [*draw.permutation(4), 0, 1]})
    if label in planted_ranks.ALLOCATORS.values():
        ranks = pd.DataFrame({"module": ["m0", "m1", "m2"], "planted": [0, 2, 2], "found": draw.integers(0, 4, 3)})
        tables[planted_ranks.RECOVERY] = ranks
    return KeptScores(row, tables)


@pytest.fixture(scope="module")
def train(bert: str, llama: str, task: tasks.Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that trains an arm on a tiny model with few steps and with its own observers."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def trained(label: str, seed: int) -> Any:
        arm: Any = registered_arms()[label]
        if not isinstance(arm.model, str):  # small already, with another task
            arm = arm.of_seed(seed)
            model, data = arm.model(), arm.task
        else:
            # Arms with one method and seed get other rows, so that they are different runs.
            data = tasks.from_frame(task.table[["text", "label", "group"]].iloc[zlib.crc32(label.encode()) % 40 :], "t")
            model = models.load({"minilm": bert, "smollm2": llama}[arm.model], task=data)
        fields = SMALL.get(arm.method.name, {})
        if arm.method.name == "fourierft" and arm.method.center is not None:
            fields = fields | {"center": min(arm.method.center, 4), "width": 3}
        settings = {**arm.settings, "steps": 8, "batch_size": 4, "eval_size": 16, "test_size": 16, "root": root}
        settings = {"seed": seed, **settings, "progress": False, "device": "cpu"}
        return loop.train(model, data, replace(arm.method, lr=1e-2, head_lr=1e-2, **fields), **settings)

    return trained


def runs_of(figure: GalleryFigure, train: Callable[..., Any]) -> dict[str, list[Any]]:
    seeds = range(100, 100 + min(figure.seeds or 2, 2))
    runs: dict[str, list[Any]] = {}
    for label, arm in figure.arms.items():
        make = kept_run if figure.shows_scores else train
        tuned = [kept_run(arm, 9001, "tuning", rate) for rate in (3e-4, 1e-3, 3e-3)] if figure.tuning else []
        runs[label] = [*tuned, *(make(arm, seed) for seed in seeds)]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_drawn_from_runs_with_the_observers_of_its_arms(
    name: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    figure = FIGURES[name]
    runs = runs_of(figure, train)
    chart = figure.draw(runs)
    assert len(chart.flat())
    saved = save_small(chart, tmp_path / f"{name}.png", extra="fact")
    with Image.open(saved) as image:
        about = json.loads(image.info["lorascope"])
        assert image.mode == "P"
    assert about["extra"] == "fact"
    assert len(about["data_sha256"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, figure in FIGURES.items() if figure.quantities or figure.arrays])
def test_figure_is_the_same_when_drawn_from_what_the_evidence_keeps_of_its_runs(
    name: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    figure = FIGURES[name]
    runs = runs_of(figure, train)
    kept = {
        label: [write_excerpt(run, tmp_path / EXCERPTS / run.id, figure.quantities, figure.arrays) for run in of]
        for label, of in runs.items()
    }
    assert not any((run.path / "state").exists() for of in kept.values() for run in of)
    evidence = kept_runs.read_kept(tmp_path / "empty")  # an excerpt is enough
    for run in (run for of in runs.values() for run in of):
        first, last = (run.parents or [run])[0].meta.method, run.meta.method
        method = last | {"reference": None} if last["name"] == "neft" else first  # as the arm has it
        row = {"run": run.id, "seed": run.meta.seed, "method": json.dumps(method)}
        row |= {"test_loss": run.score.loss, "test_metric": run.score.metric}
        assert _kept_run(figure, evidence, tmp_path, row).id == run.id
        with pytest.raises(ValueError, match="method differs from"):
            _kept_run(figure, evidence, tmp_path, row | {"method": '{"name": "full"}'})
    found, expected = figure.draw(kept).flat(), figure.draw(runs).flat()
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_categorical=False)


@pytest.mark.slow
def test_penalty_has_a_line_for_each_variant_and_seed(train: Callable[..., Any]) -> None:
    runs = runs_of(FIGURES["penalty"], train)
    chart = FIGURES["penalty"].draw(runs).charts()[0]
    (line,) = chart.marks
    drawn = chart.data.groupby([line.color, line.dash], observed=True)[["step", "value"]]
    lines = {key: list(zip(rows["step"], rows["value"], strict=True)) for key, rows in drawn}
    expected = {}
    for label, of in runs.items():
        for run in of:
            rows = run.table[run.table["quantity"] == "penalty"]
            expected[label, f"seed {run.meta.seed}"] = list(zip(rows["step"], rows["value"], strict=True))
    assert lines == expected
    assert len(lines) > 2


@pytest.mark.slow
def test_evidence_keeps_the_score_with_which_every_ablation_is_compared(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    """S(M) = IS + S(M without r) - S(M with only r), by equation 6 of ALoRA, for every component of a round."""
    figure = FIGURES["importance-alora"]
    run = train("ALoRA", 100)
    kept = write_excerpt(run, tmp_path / "part", figure.quantities, figure.arrays).table
    full = kept[kept["quantity"] == "score_full"].set_index("step")["value"]
    names = ["importance", "score_without", "score_only"]
    scores = run.table[run.table["quantity"].isin(names)]
    scores = scores.pivot_table(index=["step", "module", "index"], columns="quantity", values="value", observed=True)
    expected = scores["importance"] + scores["score_without"] - scores["score_only"]
    assert set(full.index) == set(kept.loc[kept["quantity"] == "importance", "step"])
    np.testing.assert_allclose(expected, full.loc[expected.index.get_level_values("step")], rtol=1e-12)


def test_printed_numbers_are_separate_points_of_the_chart() -> None:
    found = printed(paper="FourierFT", table="Table 2", model="RoBERTa-base", data="SST-2").set_index("method")
    assert found.loc["FourierFT", ["parameters", "value"]].tolist() == pytest.approx([24_000, 0.942])
    assert found.loc["LoRA", ["parameters", "value"]].tolist() == pytest.approx([300_000, 0.951])
    data = pd.DataFrame({"parameters": [1e3, 1e4], "value": [0.7, 0.8]})
    chart = Chart(data, [Point("parameters", "value")], caption="Ours.")
    own, added = add_printed(chart, found.reset_index(), "parameters", "table 2").tables()
    assert own[1].drop(columns="source").equals(chart.data)
    assert added[1]["source"].tolist() == [f"printed: {method}" for method in found.index]
    assert added[1]["value"].tolist() == found["value"].tolist()


def test_printed_ablations_of_hydralora_belong_to_their_bars() -> None:
    figure = FIGURES["left-out"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    _, table = next(
        each for each in figure.draw(runs).charts()[0].tables() if "printed" in set(each[1].get("source", ""))
    )
    assert table.set_index("recipe")["value"].to_dict() == pytest.approx(
        {"HydraLoRA": 0.4722, "separate A's": 0.4694, "uniform gates": 0.4281, "LoRA": 0.4322}
    )


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("ranks-lora", ["rank"], {1: 0.912, 2: 0.917, 4: 0.917, 8: 0.915, 64: 0.914}),
        (
            "budgets",
            ["source", "rank"],
            {
                **{
                    ("printed: AdaLoRA", rank): value
                    for rank, value in ((1, 0.9564), (2, 0.958), (4, 0.961), (8, 0.961))
                },
                **{("printed: LoRA", rank): value for rank, value in ((1, 0.9438), (2, 0.9495), (8, 0.9495))},
            },
        ),
        ("adapted-types", ["recipe"], {"W_q": 0.91, "W_k": 0.908, "W_v": 0.91, "W_o": 0.913}),
        ("left-out-adalora", ["recipe"], {"AdaLoRA": 0.961, "no penalty": 0.951, "sensitivity only": 0.9564}),
        ("accuracy-neft", ["recipe"], {"NeFT, 9%": 0.8227, "reversed": 0.8124}),
        ("use-shift", ["recipe"], {"NeFT, 9%": 22295 / 352256, "NeFT, 3% and 6% reversed": 38135 / 352256}),
        (
            "low-data",
            ["recipe"],
            {
                **{"full": 0.895, "full, 1,000": 0.858, "full, 100": 0.602},
                **{"LoRA": 0.917, "LoRA, 1,000": 0.856, "LoRA, 100": 0.638},
            },
        ),
    ],
)
def test_printed_numbers_are_at_their_place(name: str, keys: list[str], expected: dict[Any, float]) -> None:
    figure = FIGURES[name]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    tables = [table for _, table in figure.draw(runs).charts()[0].tables()]
    (found,) = [table for table in tables if table.get("source", pd.Series("")).str.startswith("printed").all()]
    assert found.set_index(keys)["value"].to_dict() == pytest.approx(expected)


def test_accuracy_is_drawn_at_the_rank_of_its_arm() -> None:
    figure = FIGURES["budgets"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    chart = figure.draw(runs).charts()[0]
    drawn = chart.data.set_index(["method", "rank"])["value"]
    for label, of in runs.items():
        method, last = of[0].meta.method, of[0].meta.method.get("target_rank", of[0].meta.method.get("rank"))
        mean = np.mean([run.score.metric for run in of])
        assert drawn[{"lora": "LoRA", "adalora": "AdaLoRA"}[method["name"]], last] == pytest.approx(mean), label
    assert len(drawn) == 8


def test_sizes_are_beyond_the_error_bars_where_printed_numbers_widen_the_axis() -> None:
    figure = FIGURES["quality"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    data = figure.draw(runs).charts()[0].data
    assert data["right"].equals(data["parameters"])
    assert ((data["above"] > data["high"]) | (data["above"] < data["low"])).all()


def test_seeds_that_fail_without_the_penalty_are_drawn_one_by_one() -> None:
    figure = FIGURES["left-out-adalora"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    drawn = figure.draw(runs).charts()[0].data
    for label, rows in drawn.groupby("recipe", observed=True):
        assert rows["value"].tolist() == pytest.approx([run.score.metric for run in runs[str(label)]])
    assert len(drawn) == 6


def test_accuracy_is_drawn_at_the_number_of_experts() -> None:
    figure = FIGURES["number-of-experts"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    drawn = figure.draw(runs).charts()[0].data.set_index(["series", "number"])["value"]
    means = {label: np.mean([run.score.metric for run in of]) for label, of in runs.items()}
    assert drawn.to_dict() == pytest.approx({
        ("HydraLoRA", 2): means["2 experts"], ("HydraLoRA", 4): means["4 experts"],
        ("LoRA", 2): means["LoRA"], ("LoRA", 4): means["LoRA"],
    })  # fmt: skip


def test_shift_in_utilization_is_a_fraction_of_the_ranks_of_each_role() -> None:
    tables = {neft.FEW: [0, 1, 2, 3, 0, 1], neft.CHANGED: [1, 0, 2, 3, 0, 1], neft.REVERSED: [3, 1, 2, 0, 1, 0]}
    runs = {label: [kept_run(label, 100)] for label in tables}
    for label, ranks in tables.items():
        runs[label][0].tables[neft.UTILIZATION] = pd.DataFrame({"role": list("aaaabb"), "rank": ranks})
    drawn = FIGURES["use-shift"].draw(runs).charts()[0].data.set_index("recipe")["value"]
    # Two neurons by one of four ranks; two by three of four, and two by one of two.
    assert drawn.to_dict() == pytest.approx({neft.CHANGED: 2 / 4 / 6, neft.REVERSED: (2 * 3 / 4 + 2 / 2) / 6})


def test_published_ranks_of_the_authors_lists_agree_with_their_summary() -> None:
    lists, ranks = (
        pd.read_csv(registration.FILE.parent / f"published/autolora_{name}.csv") for name in ("lists", "ranks")
    )
    known, found = lists[lists["judged"]].set_index("list"), ranks.groupby("list")["rank"]
    assert found.size().eq(24).all()
    np.testing.assert_allclose(found.mean()[known.index], known["mean"], rtol=0, atol=5e-4)  # three decimals
    np.testing.assert_allclose(found.std()[known.index], known["sd"], rtol=0, atol=5e-5)


def test_amplification_is_the_logarithm_of_the_ratio_of_norms() -> None:
    runs = [kept_run(lora.LOW, seed) for seed in (100, 101)]
    ratios = [run.tables[lora.AMPLIFICATION].set_index("module")["update"] for run in runs]
    chart = FIGURES["amplification"].draw({lora.LOW: runs})
    assert sorted(chart.flat()["value"]) == pytest.approx(sorted(np.log10(ratios[0] * ratios[1]) / 2))
    assert set(chart.flat()["role"]) == {"q", "k"}


def test_planted_ranks_are_drawn_from_the_kept_tables() -> None:
    figure = FIGURES["planted"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    drawn = figure.draw(runs).flat().set_index(["recipe", "planted"])["value"]
    tables = [run.tables[planted_ranks.RECOVERY] for run in runs["ALoRA"]]
    for rank in (0, 2):
        found = np.mean([table.loc[table["planted"] == rank, "found"].mean() for table in tables])
        assert drawn["ALoRA", rank] == pytest.approx(found)
        # The rank of uniform ranks is a setting, and their modules are those of the seed.
        assert drawn["uniform ranks", rank] == runs["uniform ranks"][0].meta.method["rank"]


def test_toy_task_shows_the_fraction_of_seeds_that_fit_all_points() -> None:
    figure = FIGURES["toy-task"]
    runs = {label: [kept_run(arm, seed) for seed in (100, 101)] for label, arm in figure.arms.items()}
    fitted = {"Fourier": [(1.0, 100), (1.0, 400)], "random basis": [(1.0, 50), (0.9, 1000)]}
    for label, courses in fitted.items():
        for run, (best, epochs) in zip(runs[label], courses, strict=True):
            run.tables[fourierft_expressiveness.COURSE] = pd.DataFrame({"best_accuracy": [best], "epochs": [epochs]})
    drawn = figure.draw(runs).flat()
    for label, epoch, fraction in (
        ("Fourier", 99, 0), ("Fourier", 399, 0.5), ("Fourier", 1000, 1), ("random basis", 1000, 0.5)
    ):  # fmt: skip
        line = drawn[(drawn["recipe"] == label) & (drawn["epoch"] <= epoch)]
        assert line["value"].iloc[-1] == fraction
    best = drawn[drawn["epoch"].isna()].set_index("recipe")["value"]
    assert best["random basis"] == pytest.approx(0.95)


@pytest.mark.parametrize("text", ["[]", "{"])
def test_image_with_damaged_metadata_is_one_line(tmp_path: Path, text: str) -> None:
    metadata = PngInfo()
    metadata.add_text("lorascope", text)
    file = tmp_path / "a.png"
    Image.new("L", (1, 1)).save(file, pnginfo=metadata)
    with pytest.raises(ValueError, match=r"^cannot read .*a\.png") as raised:
        digest_in(file)
    assert "\n" not in str(raised.value)
