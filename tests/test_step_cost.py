"""Figure of memory, against planted bytes."""

from __future__ import annotations

import pytest
from planted import plant

from lorascope import plots
from lorascope.analysis import memory_estimate

MIB = 2**20
REST = "rest (mostly activations)"
PARTS = (*memory_estimate.COMPONENTS, REST)


def bytes_of(parameters: float, gradients: float, optimizer: float, peak: float | None = None) -> dict:
    """Return records of bytes by step: only parameters at step 0, and an optimizer state that grows until step 2."""
    at = {
        ("parameter_bytes", ""): {0: parameters * MIB, 1: parameters * MIB, 2: parameters * MIB},
        ("gradient_bytes", ""): {0: 0, 1: gradients * MIB, 2: gradients * MIB},
        ("optimizer_bytes", ""): {0: 0, 1: optimizer * MIB / 2, 2: optimizer * MIB},
    }
    return at | ({} if peak is None else {("peak_bytes", ""): {2: peak * MIB}})


def cells(chart) -> dict:
    return {(row.recipe, row.part): row.value for row in chart.data.itertuples()}


def test_memory_bars_are_the_recorded_parts_and_end_at_the_peak(tmp_path):
    full = [plant(tmp_path, f"f{i}", bytes_of(8, 8, 16, 40 + 4 * i), seed=i) for i in range(2)]
    lora = plant(tmp_path, "l", bytes_of(9, 1, 2, 19))
    found = cells(plots.memory({"full": full, "LoRA": lora}, computed=()))
    assert found == {
        ("full", "parameters"): 8,
        ("full", "gradients"): 8,
        ("full", "optimizer"): 16,
        ("full", REST): 10,  # mean of 8 and 12
        ("LoRA", "parameters"): 9,
        ("LoRA", "gradients"): 1,
        ("LoRA", "optimizer"): 2,
        ("LoRA", REST): 7,
    }


def test_memory_without_a_recorded_peak_has_no_rest(tmp_path):
    one = plant(tmp_path, "a", bytes_of(8, 8, 16, 40))
    two = plant(tmp_path, "b", bytes_of(9, 1, 2))
    unknown = plant(tmp_path, "c", bytes_of(9, 1, 2, float("nan")))
    chart = plots.memory({"one": one, "two": two, "three": unknown}, computed=())
    assert {part for recipe, part in cells(chart) if recipe != "one"} == {"parameters", "gradients", "optimizer"}
    assert cells(chart)["one", REST] == 8
    assert "not measured: two, three." in chart.caption
    single = plots.memory(two, computed=())
    assert REST not in set(single.data["part"])


def test_memory_has_one_panel_per_model(tmp_path):
    """One label has a run of each model, the other has only one of the larger model, without a peak."""
    small, large = (
        plant(
            tmp_path, name, bytes_of(size, size, 2 * size, 5 * size), model=name, settings={"steps": 9, "batch_size": 4}
        )
        for name, size in (("small", 8), ("large", 80))
    )
    other = plant(tmp_path, "other", bytes_of(81, 1, 2), model="large", settings={"steps": 9, "batch_size": 16})
    chart = plots.memory({"full": [small, large], "LoRA": other}, computed=())
    (first,), (second,) = chart.rows()
    assert [first.title, second.title] == ["small, measured", "large, measured"]
    assert cells(first) == {("full", part): 8 * times for part, times in zip(PARTS, (1, 1, 2, 1), strict=True)}
    assert cells(second)["full", "optimizer"] == 160
    assert cells(second)["LoRA", "gradients"] == 1
    assert ("LoRA", PARTS[3]) not in cells(second)
    assert first.caption == second.caption
    assert [chart.x.label for chart in (first, second)] == ["memory of small (MiB)", "memory of large (MiB)"]
    batches = "small, batch size 4, 1 run (seed 0); large, batch size 4 and large, batch size 16, 1 run (seed 0)"
    assert batches in first.caption
    assert "not measured: LoRA." in first.caption


def test_title_of_memory_has_the_method_with_the_lowest_peak(tmp_path):
    # Peaks of 100 and 60 of one model, and of 200 and 80 of another one.
    peaks = {("full", "minilm"): 100, ("LoRA", "minilm"): 60, ("full", "smollm2, first 6 blocks"): 200,
             ("LoRA", "smollm2, first 6 blocks"): 80}  # fmt: skip
    runs = {}
    for (label, model), peak in peaks.items():
        run = plant(tmp_path, f"{label}{peak}", bytes_of(20, 10, 20, peak), model=model)
        runs.setdefault(label, []).append(run)
    figure = plots.memory(runs, computed=())
    assert figure.title == "Memory of a training step, measured: least with LoRA, 40 to 60% of full"
    assert [chart.title for chart in figure.panels] == ["MiniLM, measured", "SmolLM2, first 6 blocks, measured"]
    assert figure.panels[0].x.label == "memory of MiniLM (MiB)"
    assert "after the last step: MiniLM, batch size" in figure.panels[0].caption
    # Without a peak, with different methods, or if the first one needs least, the title has no finding.
    lower = plant(tmp_path, "lower", bytes_of(20, 10, 20, 300), model="smollm2, first 6 blocks")
    for changed in ({"LoRA": [*runs["LoRA"][:1], lower]}, {"LoRA": plant(tmp_path, "x", bytes_of(1, 1, 1))}, {}):
        title = plots.memory({"full": runs["full"]} | changed, computed=()).title
        assert title == "Memory of a training step"


def test_memory_of_larger_models_is_computed(tmp_path):
    run = plant(tmp_path, "a", bytes_of(8, 8, 16, 40))
    (measured,), (seven,), (seventy,) = plots.memory(run).rows()
    assert [chart.title for chart in (seven, seventy)] == [
        "LLaMA-2 7B, computed (line: 24 GB)",
        "LLaMA-2 70B, computed",
    ]
    held = memory_estimate.lisa(memory_estimate.LLAMA2["70B"], 4, width=2)
    assert cells(seventy)["LISA, 4 blocks", "optimizer"] == pytest.approx(held.optimizer / 2**30)
    assert cells(seven)["AdamW", "parameters"] == pytest.approx(12.55, abs=0.01)
    assert set(seven.data["source"]) == set(seventy.data["source"]) == {"computed"}
    assert set(measured.data["source"]) == {"measured"}
    assert set(seven.data["part"]) == set(memory_estimate.COMPONENTS)
    assert "not measured" in measured.caption
    with pytest.raises(ValueError, match=r"computed must be one of '7B', '70B'.*got '13B'"):
        plots.memory(run, computed=("13B",))


def test_memory_of_gpt2_is_computed_by_optimizer_with_and_without_first_moment(tmp_path):
    """The values, in MiB, match Adapprox's figure 5, which saves 34.5% to 99.9% of the optimizer state."""
    run = plant(tmp_path, "a", bytes_of(8, 8, 16, 40))
    _, (small,), (medium,) = plots.memory(run, computed=("117M", "345M")).rows()
    assert [chart.title for chart in (small, medium)] == ["GPT-2 117M, computed", "GPT-2 345M, computed"]
    assert small.x.label == "memory of GPT-2 117M (MiB)"
    state = {recipe: value for (recipe, part), value in cells(small).items() if part == "optimizer"}
    assert list(small.y.order) == list(state)
    saved = {recipe: round(100 * (1 - value / state["AdamW"]), 1) for recipe, value in state.items()}
    assert [saved[f"Adapprox, {rank}"] for rank in ("largest rank", "rank 1")] == [34.5, 49.9]
    assert [saved[f"Adapprox, {rank}, β₁ = 0"] for rank in ("largest rank", "rank 1")] == [84.5, 99.9]
    assert cells(medium)["CAME", "optimizer"] == pytest.approx(1358.2, abs=0.05)
    assert cells(small)["CAME", "parameters"] == pytest.approx(124_439_808 * 4 / MIB)
    assert "GPT-2: 4 bytes" in small.caption
    assert "LLaMA-2" not in small.caption


def test_memory_is_drawn_and_without_records_names_the_recorder(tmp_path):
    run = plant(tmp_path, "a", bytes_of(8, 8, 16, 40))
    assert plots.memory(run).save(tmp_path / "memory.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"memory.*parameter_bytes.*observe=\[ls.observe.memory"):
        plots.memory(plant(tmp_path, "b", {("lr", ""): {1: 0.1}}))
