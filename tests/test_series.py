"""Checkpoints of one training as a series, against a recorder that watched the same training."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import test_mlx
from planted import low_rank
from safetensors.numpy import save_file
from trainers import by_trainer, fresh, training_rows

import lorascope as ls
from lorascope.analysis import norms
from lorascope.cli.main import main
from lorascope.runs.adapter import Adapter
from lorascope.runs.checkpoint_names import checkpoint_step
from lorascope.runs.series import Series
from lorascope.updates import LowRank

QV = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
OBSERVERS = [ls.observe.norms(every=2, spectra_every=2), ls.observe.factors(every=2)]
RECORDED = ["update_norm", "learned_norm", "stable_rank", "effective_rank", "rank"]
# The series computes the norm of a product from singular values and the recorder from Gram matrices, both in float64
# from the same float32 factors.
REL = 1e-12
# The recorder multiplies AdaLoRA's A and E in float32, PEFT merges LoHa and LoKr in the float64 copy that it reads, and
# the sums of squares of factors are in float32.
SINGLE = 1e-6
CONFIGS = {
    "LoRA": peft.LoraConfig(**QV, r=3, lora_alpha=5),
    "rsLoRA": peft.LoraConfig(**QV, r=3, lora_alpha=5, use_rslora=True, rank_pattern={"value": 2}),
    "LoHa": peft.LoHaConfig(**QV, r=2, alpha=4),
    "LoKr": peft.LoKrConfig(**QV, r=2, alpha=4),
    "AdaLoRA": peft.AdaLoraConfig(**QV, init_r=4, target_r=2, total_step=60, tinit=1, tfinal=1, deltaT=1),
}
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def write(folder: Path, factors: dict[str, tuple[Any, Any]], alpha: float | None = None, **config: Any) -> Path:
    """Write a PEFT folder of module -> (B, A) with scale 1, and return it."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.array(B, dtype="f4")
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.array(A, dtype="f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = np.shape(next(iter(factors.values()))[1])[0]
    pattern = {module: np.shape(A)[0] for module, (_, A) in factors.items()}
    own = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank, "base_model_name_or_path": "org/base"}
    own |= {"rank_pattern": pattern, "alpha_pattern": pattern} if alpha is None else {}
    (folder / "adapter_config.json").write_text(json.dumps(own | config))
    return folder


@pytest.fixture(scope="module")
def rows(bert, task):
    return training_rows(bert, task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with three checkpoints of two modules; one module settles, the other one moves to the end."""
    for step, (q, v) in {
        10: ((1.0, 2.0), (1.0, 0.0)),
        20: ((3.0, 4.0), (2.0, 0.0)),
        100: ((3.0, 4.0), (4.0, 3.0)),
    }.items():
        write(tmp_path / f"out/checkpoint-{step}", {Q: low_rank(*q), V: low_rank(*v)})
    return tmp_path / "out"


def plain(table: Any) -> Any:
    """Return a table of records with its key as the index."""
    kept = table.astype({"module": "str", "quantity": "str"})
    return kept.set_index(["step", "module", "quantity"])["value"].sort_index()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_records_equal_those_of_a_recorder_of_the_same_training(name, bert, task, rows, tmp_path):
    model = peft.get_peft_model(fresh(bert, task), CONFIGS[name])
    recorder = ls.TrainerRecorder(observe=OBSERVERS)
    by_trainer(model, rows, tmp_path / "out", recorder=recorder, save_strategy="steps", save_steps=2)
    series, run = ls.load(tmp_path / "out"), ls.load(tmp_path / "out/lorascope")
    assert isinstance(series, Series)
    assert series.update_steps() == [2, 4, 6]
    rel = REL if "LoRA" in name and name != "AdaLoRA" else SINGLE
    # The recorder merges LoHa and LoKr, so that their rank is unknown there: it gives the size of the matrix.
    compared = RECORDED[: -1 if name in ("LoHa", "LoKr") else None]
    at = run.table[run.table["step"].isin([2, 4, 6]) & run.table["quantity"].isin(compared)]
    adapted = at[at["module"].isin(set(series.modules["module"]))]
    ours = series.table[series.table["quantity"].isin(compared)]
    found, expected = plain(ours), plain(adapted)
    assert list(found.index) == list(expected.index)
    assert len(found) == 3 * 4 * len(compared)
    np.testing.assert_allclose(found, expected, rtol=rel, atol=1e-15)
    ranks = [key for key in expected.index if key[2] == "rank"]
    assert (found[ranks] == expected[ranks]).all()
    for module in series.modules["module"]:
        name_of_spectrum = f"{module}/singular_values"
        own = series.snapshot(name_of_spectrum).set_index(["step", "component"])["value"]
        theirs = run.snapshot(name_of_spectrum).query("step > 0").set_index(["step", "component"])["value"]
        assert len(own) == 3 * min(series.ranks()[module], 32) <= len(theirs)
        np.testing.assert_allclose(own, theirs[own.index], rtol=rel, atol=1e-15)
        assert theirs.drop(own.index).max() < 1e-6 or len(own) == len(theirs)
        for step in run.update_steps()[1:]:
            one, other = (each.updates(step)[module].dense() for each in (series, run))
            np.testing.assert_allclose(one, other, rtol=0, atol=(rel if rel > REL else 0) * np.abs(other).max())
    if rel == REL:
        both = [
            table[table["quantity"] == "adapter_norm"] for table in (series.table, run.table[run.table["step"] > 0])
        ]
        one, other = map(plain, both)
        assert len(one) == 3 * 4
        np.testing.assert_allclose(one, other[one.index], rtol=SINGLE)
    else:
        assert "adapter_norm" not in set(series.table["quantity"])
    # The recorder also has rows of whole blocks, which pooling computes from those of the modules.
    blocks = at[(at["role"] == "block") & (at["quantity"] == "update_norm")]
    pooled = norms.pool_modules(norms.select_quantity(ours, "update_norm"))
    keys = [["step", "layer"], ["step", "layer"]]
    one, other = (table.set_index(key)["value"].sort_index() for table, key in zip((pooled, blocks), keys, strict=True))
    np.testing.assert_allclose(one, other, rtol=rel)


def test_final_adapter_next_to_its_checkpoints_is_loaded_as_today(folder):
    write(folder / "final", {Q: low_rank(1.0)})
    for file in (folder / "final").iterdir():
        shutil.copy(file, folder)
    assert isinstance(ls.load(folder), Adapter)
    series = ls.load_series(folder)
    assert isinstance(series, Series)
    assert series.update_steps() == [10, 20, 100]


def test_values_of_a_series(folder):
    series = ls.load(folder)
    values = plain(series.table)
    assert values[10, Q, "update_norm"] == pytest.approx(5**0.5)
    assert values[100, V, "update_norm"] == pytest.approx(5.0)
    assert values[100, V, "stable_rank"] == pytest.approx(25 / 16)
    assert values[20, V, "stable_rank"] == pytest.approx(1.0)
    assert series.ranks() == {Q: 2, V: 2}
    np.testing.assert_array_equal(series.updates(20)[Q].dense(), LowRank(*low_rank(3.0, 4.0)).dense())
    np.testing.assert_array_equal(series.updates()[V].dense(), LowRank(*low_rank(4.0, 3.0)).dense())
    assert series.summary().set_index("module")["update_norm"].to_dict() == pytest.approx({Q: 5.0, V: 5.0})
    assert series.snapshot(f"{V}/singular_values", 20)["value"].tolist() == pytest.approx([2.0, 0.0])
    assert "out  LoRA, checkpoints: 3, steps 10 to 100" in repr(series)
    assert series.label == "out"
    assert len(series.id) == 12
    with pytest.raises(ValueError, match=r"step must be one of \[10, 20, 100\] .*, got 30"):
        series.updates(30)
    with pytest.raises(ValueError, match=r"state must be 'last'.*'best'"):
        series.updates(state="best")


def test_records_that_need_the_base_are_known_with_it(folder, tmp_path):
    (tmp_path / "base").mkdir()
    weight = np.full((4, 5), 0.5, dtype="f4")
    save_file({f"{module}.weight": weight for module in (Q, V)}, tmp_path / "base/model.safetensors")
    assert ls.load(folder).table.query("quantity == 'weight_norm'")["value"].isna().all()
    values = plain(ls.load(folder, base=tmp_path / "base").table)
    for step in (10, 20, 100):
        dense = weight + ls.load(folder).updates(step)[V].dense()
        assert values[step, V, "weight_norm"] == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    (tmp_path / "other").mkdir()
    save_file({"x.weight": weight}, tmp_path / "other/model.safetensors")
    with pytest.raises(ValueError, match="it has no weight of any adapted module"):
        ls.load(folder, base=tmp_path / "other")


def test_learned_norm_of_a_nonzero_start_needs_checkpoint_zero(folder):
    for path in folder.iterdir():
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": False}))
    assert "learned_norm" not in set(ls.load(folder).table["quantity"])
    (folder / "checkpoint-10").rename(folder / "checkpoint-0")
    values = plain(ls.load(folder).table)
    assert values[20, Q, "learned_norm"] == pytest.approx(8**0.5)
    assert values[0, Q, "learned_norm"] == 0.0


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("out/checkpoint-10", 10), ("checkpoint-10/", 10), ("step_200", 200), ("x/global_step0007", 7), ("epoch=3", 3),
        ("user/adapter@step-100", 100), ("user/adapter@250", 250), ("user/adapter@main/checkpoint-5", 5),
        ("out/0000100_adapters.safetensors", 100), ("a/checkpoint-9/adapter_model.safetensors", 9),
        ("lora-step00000500.safetensors", 500), ("rank8", None), ("r-16", None), ("user/adapter-7b", None),
        ("user/adapter@v1", None), ("adapter", None), ("misstep-x", None),
    ],
)  # fmt: skip
def test_step_of_a_name(name, step):
    assert checkpoint_step(name) == step
    assert checkpoint_step(Path(name)) == step


def test_list_takes_its_steps_from_names_or_positions_or_a_mapping(folder, tmp_path):
    paths = [folder / f"checkpoint-{step}" for step in (100, 10)]
    assert ls.load_series(paths).update_steps() == [10, 100]
    named = [shutil.copytree(path, tmp_path / name) for path, name in zip(paths, "ab", strict=True)]
    assert ls.load_series(named).update_steps() == [1, 2]
    assert ls.load_series(named).updates(1)[V].norm() == pytest.approx(5.0)
    assert ls.load_series({7: named[1], 3: named[0]}).update_steps() == [3, 7]
    with pytest.raises(ValueError, match=r"name .*got .*a without one; .*\{step: path\}"):
        ls.load_series([named[0], paths[0]])


def test_two_checkpoints_with_one_step_are_rejected(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-0010")
    message = r"checkpoint-0010 and .*checkpoint-10 both have step 10"
    with pytest.raises(ValueError, match=message):
        ls.load(folder)
    with pytest.raises(ValueError, match="both have step 10"):
        ls.load_series([folder / "checkpoint-10"] * 2)


def test_half_written_checkpoint_is_named_and_skipped(folder):
    (folder / "checkpoint-20/adapter_model.safetensors").unlink()
    whole = folder / "checkpoint-100/adapter_model.safetensors"
    shutil.copytree(folder / "checkpoint-100", folder / "checkpoint-110")
    (folder / "checkpoint-110/adapter_model.safetensors").write_bytes(whole.read_bytes()[:-8])
    (folder / "checkpoint-120").mkdir()
    with pytest.warns(UserWarning, match="checkpoint") as caught:
        series = ls.load(folder)
    assert series.update_steps() == [10, 100]
    assert list(series.skipped) == [20, 110, 120]
    assert all(f"checkpoint-{step}" in str(each.message) for step, each in zip(series.skipped, caught, strict=True))
    assert "truncated" in series.skipped[110]
    assert all(f"checkpoint-{step}" in repr(series) for step in series.skipped)


def test_folder_without_a_readable_checkpoint_is_rejected_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: it is neither a run nor an adapter"):
        ls.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty: it has no checkpoints"):
        ls.load_series(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        ls.load_series([])
    (tmp_path / "out/checkpoint-5").mkdir(parents=True)
    for read in (ls.load, ls.load_series):
        with pytest.raises(ValueError, match=r"out: none of its checkpoints can be read: .*checkpoint-5"):
            read(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ls.load_series([tmp_path / "nowhere"])


def test_module_that_a_checkpoint_lacks_has_no_rows_there(folder, tmp_path):
    shutil.rmtree(folder / "checkpoint-10")
    write(folder / "checkpoint-10", {Q: low_rank(1.0)})
    write(folder / "checkpoint-5", {Q: low_rank(1.0, 1.0, 1.0), "model.layers.0.mlp.up_proj": low_rank(2.0)})
    series = ls.load(folder)
    values = plain(series.table[series.table["quantity"] == "rank"])
    assert values.to_dict() == {
        (5, Q, "rank"): 3, (5, "model.layers.0.mlp.up_proj", "rank"): 1, (10, Q, "rank"): 1,
        (20, Q, "rank"): 2, (20, V, "rank"): 2, (100, Q, "rank"): 2, (100, V, "rank"): 2,
    }  # fmt: skip
    assert set(series.modules["module"]) == {Q, V, "model.layers.0.mlp.up_proj"}
    assert series.snapshot_steps(f"{V}/singular_values") == [20, 100]


def test_checkpoints_of_two_base_models_are_rejected(folder):
    file = folder / "checkpoint-20/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(
        ValueError, match=r"checkpoint-20 has base model org/other, and .*checkpoint-10 has base model org/base"
    ):
        ls.load(folder)


def test_module_of_two_shapes_is_rejected(folder):
    shutil.rmtree(folder / "checkpoint-20")
    write(folder / "checkpoint-20", {Q: (np.ones((6, 1)), np.ones((1, 5)))})
    with pytest.raises(ValueError, match=rf"{Q} is \(6, 5\) in .*checkpoint-20 and \(4, 5\) in"):
        ls.load(folder)


def test_formats_may_differ_between_checkpoints(folder):
    other = json.loads((folder / "checkpoint-20/adapter_config.json").read_text())
    assert other["peft_type"] == "LORA"
    (folder / "checkpoint-20/adapter_config.json").unlink()  # without a configuration: loralib's layout, alpha unknown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = ls.load(folder)
    assert series.update_steps() == [10, 20, 100]


def test_numbered_files_next_to_the_final_adapter_form_a_series(tmp_path):
    for step in (100, 200):
        pair = {f"{Q}.lora_a": np.ones((5, 1), "f4"), f"{Q}.lora_b": np.full((1, 4), step, "f4")}
        test_mlx.write(tmp_path, pair, f"{step:07d}_adapters.safetensors")
    test_mlx.write(tmp_path, pair)
    assert isinstance(ls.load(tmp_path), Adapter)
    series = ls.load_series(tmp_path)
    assert series.update_steps() == [100, 200]
    assert [series.updates(step)[Q].norm() for step in (100, 200)] == pytest.approx([200 * 20**0.5, 400 * 20**0.5])
    assert series.meta.model == "org/base"


def test_checkpoints_of_a_whole_model_are_rejected_in_one_line(folder):
    for path in folder.iterdir():
        (path / "adapter_config.json").unlink()
        (path / "adapter_model.safetensors").unlink()
        save_file({"model.embed.weight": np.ones((2, 2), "f4")}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="checkpoint-10: it is neither a run nor an adapter; it looks like a whole model"
    ):
        ls.load(folder)


def test_ranks_of_an_adapter_have_no_steps(tmp_path: Path) -> None:
    adapter = ls.load(write(tmp_path / "adapter", {Q: low_rank(1.0)}))
    ls.plots.rank_allocation(adapter)
    with pytest.raises(ValueError, match="step must be None for adapters, whose steps are not known, got 3"):
        ls.plots.rank_allocation(adapter, step=3)


def test_wrong_kinds_and_snapshots_of_a_series_are_one_line(folder, tmp_path):
    series = ls.load(folder)
    with pytest.raises(ValueError, match=r"^cannot export the series .*: load one checkpoint, such as "):
        ls.export.convert(series, tmp_path / "x", "kohya")
    with pytest.raises(ValueError, match=r"^cannot export the series "):
        ls.export.sum_adapters([series, series], tmp_path / "x")
    with pytest.raises(ValueError, match=r"^unknown snapshot 'x'"):
        series.snapshot("x", 20)


def test_sarif_of_a_series_names_a_file_of_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        write(tmp_path / f"out/checkpoint-{step}", {Q: low_rank(0.0, 0.0)})
    assert main(["doctor", str(tmp_path / "out"), "--sarif", str(tmp_path / "log.sarif")]) == 1
    (run,) = json.loads((tmp_path / "log.sarif").read_text())["runs"]
    places = {each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in run["results"]}
    assert places == {"out/checkpoint-20/adapter_model.safetensors"}
