"""Findings as SARIF 2.1.0, and the list of all kinds: what a service or a script reads."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from test_inspect import llama, plant

from lorascope.cli.main import main
from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.kinds import KINDS
from lorascope.diagnosis.sarif import sarif_log


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """An adapter in the working directory with a NaN in one module."""
    spectra = llama(2, [1.0, 0.1, 0.1, 0.1])
    spectra["model.layers.1.mlp.up_proj"] = [float("nan")] * 4
    monkeypatch.chdir(tmp_path)
    return plant(tmp_path / "my adapter", spectra)


def test_doctor_replaces_its_own_log_only(adapter, monkeypatch, capsys):
    log, words = Path("log.sarif"), ["doctor", str(adapter), "--sarif", "log.sarif"]
    assert main(words) == main(words) == 1
    written = log.read_bytes()

    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        assert main(words) == 1
    assert "cannot write log.sarif" in capsys.readouterr().err
    assert log.read_bytes() == written
    foreign = written.replace(b'"name": "lorascope"', b'"name": "CodeQL"')
    log.write_bytes(foreign)
    assert main(words) == 2
    assert capsys.readouterr() == (
        "",
        "lorascope: cannot write log.sarif: it exists and was not written by lorascope, or has changed since; pass "
        "another name\n",
    )
    assert log.read_bytes() == foreign


def test_doctor_writes_one_result_per_finding_with_a_relative_uri(adapter, capsys):
    assert main(["doctor", str(adapter), "--sarif", "log.sarif", "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["findings"]
    log = json.loads((adapter.parent / "log.sarif").read_text(encoding="utf-8"))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    (rule,), (result,) = run["tool"]["driver"]["rules"], run["results"]
    assert (rule["id"], result["ruleId"], result["ruleIndex"], result["level"]) == ("LS001", "LS001", 0, "error")
    assert rule["help"]["text"] == told["fix"]
    assert told["message"] in result["message"]["text"]
    (place,) = result["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "my%20adapter/adapter_model.safetensors"
    assert [each["fullyQualifiedName"] for each in place["logicalLocations"]] == ["model.layers.1.mlp.up_proj"]


def test_log_without_findings_is_valid(tmp_path):
    (run,) = sarif_log([], tmp_path / "a.safetensors", "1.0")["runs"]
    assert run == {"tool": {"driver": {"name": "lorascope", "version": "1.0", "rules": []}}, "results": []}


def test_log_has_a_rule_for_every_severity_and_for_other_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [
        Finding("dead", "a", {"share": float("nan")}, "b", "caution", ("h.0",), "LS006"),
        Finding("odd-rank", "odd rank", {}, "use an even rank"),
        Finding("dead", "c", {}, "d", "caution", id="LS006"),
    ]
    (run,) = sarif_log(found, tmp_path.parent / "elsewhere.safetensors", "1.0")["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["LS006", "odd-rank"]
    assert [(each["ruleIndex"], each["level"]) for each in run["results"]] == [
        (0, "warning"),
        (1, "note"),
        (0, "warning"),
    ]
    assert run["results"][0]["properties"] == {"share": None}
    assert "logicalLocations" not in run["results"][1]["locations"][0]
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "elsewhere.safetensors"  # not a path of this machine


def test_list_has_every_kind(capsys):
    assert main(["doctor", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [kind["id"] for kind in listed][: len(KINDS)] == list(KINDS)
    assert listed[0].keys() == {"id", "name", "severity", "needs", "problem", "evidence", "fix"}
    assert main(["doctor", "--list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(f"\n{id}" in f"\n{printed}" for id in KINDS)
    assert main(["doctor", "--list", "somewhere"]) == 2
