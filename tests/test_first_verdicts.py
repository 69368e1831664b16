"""First edition: its 21 verdicts as they were printed, from the kept runs, and every kind of tampering with them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lorascope.papers.first_edition import CARRIED
from lorascope.papers.judging import first_edition, kept_study
from lorascope.papers.judging.evidence_manifest import digest
from lorascope.papers.judging.first_edition import FOLDER, FirstClaim, format_estimate, judge, read_claims, verify_first

# As they were computed and printed by the code that the claims were registered with.
PRINTED = """claim,n,effect,low,high,outcome
lora.words,5,0.06749740394600208,0.053093641769767,0.08190116612223716,supported
lora.direction,5,0.16097103290973802,0.13171807999638416,0.19022398582309188,not supported
lora.amplify,5,0.07364928714187287,0.056528916460341826,0.0907696578234039,not supported
adalora.top,5,-0.05069444444444442,-0.09347124387638253,-0.00791764501250631,not supported
adalora.stable,5,0.47693835619507813,0.33707561195101743,0.6168011004391388,supported
fourierft.more,5,0.0347871235721703,0.02511012424743727,0.04446412289690333,supported
fourierft.random,5,0.0009345794392523364,-0.005790748108087131,0.007659906986591804,not supported
fourierft.orthogonal,5,-0.00264797507788162,-0.011086120436652087,0.005790170280888848,not supported
fourierft.band,5,-0.00020768431983386737,-0.00352953471141966,0.0031141660717519254,not supported
expressiveness.more,24,0.16718749701976776,0.12377521824796547,0.21059977579157005,supported
expressiveness.frequencies,24,-0.0357550236168234,-0.148601752513479,0.07709170527983222,not supported
neft.over_full,5,-0.014589823468328142,-0.02673438902480074,-0.0024452579118555452,not supported
neft.stable,5,0.39041822538400506,0.38621871575846467,0.39461773500954545,supported
neft.layers,5,0.2647165131754007,0.2406833420693934,0.28874968428140796,supported
neft.use,5,-0.03650170314459154,-0.06420018765434657,-0.008803218634836501,not supported
adapprox.pre_came,5,0.11816085546063733,0.04965594658004399,0.18666576434123067,supported
planted.adalora_correlation,20,0.5223277633524053,0.471484696129042,0.5731708305757686,supported
planted.adalora_distance,20,0.46785714285714286,0.3988549627912679,0.5368593229230179,supported
planted.adalora_loss,20,0.04517476249011747,0.03718176790409226,0.05316775707614268,supported
planted.autolora_loss,20,-0.02137719777847078,-0.03048402841947584,-0.012270367137465724,not supported
planted.alora_correlation,20,0.30538472365027547,0.23663453313072866,0.37413491416982225,supported
"""
RETIRED = {"withdrawn": 2, "no headroom": 7, "not learned": 7, "undertrained": 2, "allocation": 2, "limited": 7,
           "interval at": 8, "interval excludes": 3, "interval above": 4, "replaced": 25}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "edition-1", ignore=shutil.ignore_patterns("figures")))


def test_verdicts_are_those_that_the_first_edition_printed() -> None:
    printed = pd.read_csv(io.StringIO(PRINTED)).set_index("claim")
    verdicts = judge(read_claims(), CARRIED, kept_study.read(FOLDER)).set_index("claim")
    assert verdicts["outcome"].to_dict() == printed["outcome"].to_dict()
    assert verdicts["seeds"].to_dict() == printed["n"].to_dict()
    for column in ("effect", "low", "high"):
        np.testing.assert_allclose(verdicts[column], printed[column].loc[verdicts.index], rtol=1e-9, atol=1e-12)


def test_kept_files_agree_with_the_code_and_the_manifest() -> None:
    assert list(verify_first(FOLDER, CARRIED)) == []
    registered = "48bca6468c84cbd69ee2f25b4059fede4a0748cd97e6bd7af989eebb0246e81c"  # as at the tag registered-1
    assert digest(FOLDER / "registered.toml") == registered


def test_every_registered_claim_has_a_verdict_or_an_estimate_with_a_reason() -> None:
    estimates = first_edition.read_estimates()
    judged = [id for id, claim in read_claims().items() if not claim.published]
    assert sorted([*CARRIED, *estimates["claim"]]) == sorted(judged)
    assert len(judged) == 88
    for reason, number in RETIRED.items():
        assert estimates["reason"].str.startswith(reason).sum() == number
    assert sum(RETIRED.values()) == len(estimates)
    ran = estimates["seeds"] > 0
    assert estimates[["effect", "low", "high"]].notna().all(axis=1).tolist() == ran.tolist()
    assert estimates["low"].lt(estimates["effect"])[ran].all()


def test_estimates_on_text_are_those_of_the_design() -> None:
    table = first_edition.text_estimates().set_index("method")
    expected = {
        "AdaLoRA": (-0.10, -0.67, 0.46), "FourierFT": (-1.21, -1.73, -0.70), "NeFT": (-1.46, -2.19, -0.73),
        "LISA": (-0.032, -0.073, 0.008), "Adapprox": (-0.028, -0.041, -0.014),
    }  # fmt: skip
    for method, numbers in expected.items():
        digits = 2 if table["unit"][method] == "points of accuracy" else 3
        assert tuple(table.loc[method, ["effect", "low", "high"]].astype(float).round(digits)) == numbers
    words = table["word"][table["word"] != ""].to_dict()
    assert words == {"AdaLoRA": "no headroom"} | dict.fromkeys(["AutoLoRA", "ALoRA", "HydraLoRA"], "not learned")
    assert table.loc[table["word"] == "not learned", "effect"].isna().all()


def rewrite(folder: Path, name: str) -> None:
    """Change one value of a kept file."""
    file = folder / name
    if name == "right.npz":
        with np.load(file) as arrays:
            bits = dict(arrays)
        run = kept_study.read(folder).run("LoRA, rank 8", 100)
        bits[run][0] ^= 1
        np.savez_compressed(file, allow_pickle=False, **bits)
    elif name.endswith(".parquet"):
        table = pd.read_parquet(file)
        column = table.columns[-1]
        table[column] = table[column].to_numpy()[::-1]
        table.to_parquet(file)
    else:
        text = file.read_text().replace('margin = 0.02, unit = "accuracy"', 'margin = 0.08, unit = "accuracy"')
        file.write_text(text)


@pytest.mark.parametrize(
    ("name", "is_used"),
    [("right.npz", True), ("ranks.parquet", True), ("nll.parquet", True), ("phi.parquet", True),
     ("registered.toml", True), ("earlier.csv", False)],
)  # fmt: skip
def test_changed_file_is_named_before_the_verdicts_that_follow(folder: Path, name: str, is_used: bool) -> None:
    rewrite(folder, name) if is_used else (folder / name).write_text("changed")
    cause, *rest = verify_first(folder, CARRIED)
    assert cause == f"edition-1: {name}: differs from MANIFEST"
    assert len(rest) == is_used
    assert all("further difference" in line for line in rest)


def test_changed_verdict_is_named_with_both_values(folder: Path) -> None:
    file = folder / first_edition.VERDICTS
    file.write_text(file.read_text().replace("0.06749740394600208", "0.07749740394600208"))
    (line,) = verify_first(folder, CARRIED)
    assert line.startswith("edition-1: verdicts.csv: row 2 (lora.words 5): effect: kept '0.0774974")


def test_missing_and_damaged_files_are_one_line(folder: Path) -> None:
    (folder / "ranks.parquet").unlink()
    (folder / "registered.toml").write_text("[[claim]]\nid = 1")
    lines = list(verify_first(folder, CARRIED))
    assert lines[:2] == [f"edition-1: {name}: differs from MANIFEST" for name in ("ranks.parquet", "registered.toml")]
    assert "registered.toml" in lines[2]
    assert len(lines) == 3


def claim_of(kind: str, bound: float) -> FirstClaim:
    return FirstClaim("x.y", "", "", "", False, kind, bound, "", "t", 5, 0.025)


@pytest.mark.parametrize(
    ("kind", "low", "high", "outcome"),
    [
        ("superiority", 0.11, 0.2, "supported"),
        ("superiority", 0.01, 0.09, "not supported"),
        ("superiority", 0.09, 0.11, "inconclusive"),
        ("non-inferiority", -0.09, 0.2, "supported"),
        ("non-inferiority", -0.2, -0.11, "not supported"),
        ("non-inferiority", -0.11, 0.2, "inconclusive"),
    ],
)
def test_outcome_follows_from_the_interval_and_the_bound(kind: str, low: float, high: float, outcome: str) -> None:
    assert claim_of(kind, 0.1).decide(low, high) == outcome


def test_printed_effect_shows_the_side_of_the_bound_of_each_end() -> None:
    claim = claim_of("superiority", 0.01)
    assert format_estimate(claim, 0.02, 0.0112345, 0.03) == "0.0200 [0.0112, 0.0300]"
    assert format_estimate(claim, 0.02, 0.0100004, 0.03) == "0.0200000 [0.0100004, 0.0300000]"
    assert format_estimate(claim, 2.05, np.nan, np.nan) == "2.05 [no interval]"
