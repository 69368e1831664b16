"""``lorascope doctor``: diagnosis of an adapter or a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import arg

import lorascope
from lorascope.cli.arguments import File, Folder, Name, command
from lorascope.cli.opened_runs import open_runs
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import RULES, Finding
from lorascope.diagnosis.doctor import (
    SKIP_REASONS,
    completed_checks,
    find_faults,
    model_checks,
    observe_ranks,
    skipped_checks,
)
from lorascope.diagnosis.inspection import run_name
from lorascope.diagnosis.inspection_screen import SEVERITY_STYLES
from lorascope.diagnosis.kinds import KINDS
from lorascope.diagnosis.merge import check_merge
from lorascope.diagnosis.reading_faults import fault_finding
from lorascope.diagnosis.runtimes import Application, apply_adapter
from lorascope.diagnosis.sarif import sarif_log
from lorascope.files.hub import label, locate_base
from lorascope.files.printable import count_or_no, count_phrase, printable
from lorascope.files.seals import require_own, write_own
from lorascope.files.text_layout import Block, block_grid, make_console, render_text, text_block
from lorascope.files.typed_json import json_values
from lorascope.files.whole_files import json_bytes
from lorascope.formats.adapter_faults import AdapterFault, BaseMisfit
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import NoUpdatesError, is_run, load_adapter, locate_result
from lorascope.runs.result import Result


@command
def main(
    path: Annotated[str | None, arg(metavar="PATH")] = None,
    /,
    *,
    base: Folder = None,
    runtime: Name = None,
    merged: Folder = None,
    list: bool = False,
    sarif: File = None,
    json: bool = False,
) -> int:
    """Diagnose problems of an adapter or a run, each with its evidence and a fix.

    Only files are read: factors and configuration of an adapter, the base weights with --base, and the training history
    of a run. The exit code is 1 with findings of any severity, else 0; notes about the format are not findings. Tensors
    that prevent reading an adapter are a finding, too.

    Example: lorascope doctor my-adapter

    Parameters
    ----------
    path
        Adapter or run: a folder, a .safetensors file, or a name on the Hugging Face Hub (user/adapter).
    base
        Folder of the adapter's base model: adds what a runtime applies of the adapter.
    runtime
        Program that loads the adapter: peft (default for an adapter of PEFT), vllm, diffusers or llama.cpp.
    merged
        Folder of a model into which the adapter was merged; --base is required. Every tensor is compared with what the
        merge of base and adapter gives. The exit code is 3 if nothing is wrong and not every tensor can be proved.
    list
        List all kinds of findings: id, cause, severity, required evidence, and fix.
    sarif
        Also write the findings to a file as SARIF 2.1.0, for CI.
    json
        Print JSON.
    """
    if list:
        if path is not None:
            raise ValueError(f"--list takes no PATH, got {printable(path)}")
        return _list_kinds(json)
    if path is None:
        raise ValueError("PATH is required: lorascope doctor my-adapter")
    if sarif is not None:
        require_own(Path(sarif), "json")
    if merged is not None:
        if runtime is not None:
            raise ValueError("--merged and --runtime cannot be combined: run doctor twice")
        return _report_merge(path, base, merged, sarif, json)
    return _print_diagnosis(_diagnose(path, base, runtime), path, base, sarif, json)


class _Diagnosis(NamedTuple):
    """Diagnosis of a path.

    Parameters
    ----------
    name : str
    subject : path
        File that SARIF names.
    findings : list of Finding
    remark : str
        End of the summary.
    use : Application, optional
        What a runtime applies.
    notes : sequence of str
        Cautions that are not findings.
    skipped : mapping str -> list of str
        See `skipped_checks`.
    checked : list of str
        See `completed_checks`.
    observations : list of Finding
        See `observe_ranks`.
    questions : mapping str -> str
        See `model_checks`.
    """

    name: str
    subject: Path
    findings: Sequence[Finding]
    remark: str = ""
    use: Application | None = None
    notes: Sequence[str] = ()
    skipped: Mapping[str, Sequence[str]] = {}
    checked: Sequence[str] = ()
    observations: Sequence[Finding] = ()
    questions: Mapping[str, str] = {}

    def to_json(self, path: str) -> dict[str, Any]:
        """Return the JSON form."""
        values: dict[str, Any] = {"path": path}
        if self.use is not None:
            values |= {"runtime": self.use.runtime, "applied": self.use.applied, "modules": self.use.modules}
        findings = [finding.to_json() for finding in self.findings]
        observations = [finding.to_json() for finding in self.observations]
        values |= {"findings": findings, "observations": observations, "checked": [*self.checked]}
        return values | {"unseen": self.skipped, "notes": [*self.notes]}

    def blocks(self, base: str | None) -> list[Block]:
        """Return the blocks to print."""
        summary = count_or_no(len(self.findings), "finding") + self.remark
        blocks = [text_block(self.name, summary, label_style="bold")]
        if self.use is not None:
            applied = f"applies {self.use.applied} of {self.use.modules} modules"
            if base is None:
                applied += "; names and shapes are not compared without --base DIR"
            blocks.append(text_block(self.use.runtime, applied))
        blocks += map(_finding_block, self.findings)
        for finding in self.observations:
            blocks.append(text_block(f"{finding.id} {finding.cause}", finding.message))
        blocks += [text_block("note", note) for note in self.notes]
        if self.checked:
            blocks.append(text_block("checked", f"{len(self.checked)} causes: {', '.join(self.checked)}"))
        for missing, names in self.skipped.items():
            blocks.append(text_block(f"skipped ({SKIP_REASONS[missing]}):", ", ".join(names)))
        if self.observations and self.questions:
            questions = (f"{question} ({name})" for question, name in self.questions.items())
            blocks.append(text_block("needs a model", ", ".join(questions)))
        return blocks


def _diagnose(path: str, base: str | None, runtime: str | None) -> _Diagnosis:
    """Diagnose an adapter or a run, and what a runtime applies of an adapter."""
    try:
        if base is None and runtime is None:
            return _diagnose_run(open_runs([path], None)[0])
        adapter = _require_adapter(path, "--base" if runtime is None else "--runtime")
        return _diagnose_application(adapter, base, runtime)
    except NoUpdatesError as error:
        result = locate_result(path)
        return _Diagnosis(label(result), result, [], ", no weight updates", notes=[error.sentence])
    except AdapterFault as fault:
        return _unreadable(path, fault)


def _unreadable(path: str, fault: AdapterFault) -> _Diagnosis:
    result = locate_result(path)
    return _Diagnosis(label(result), result, [fault_finding(fault)], ", cannot be read")


def _print_diagnosis(diagnosis: _Diagnosis, path: str, base: str | None, sarif: str | None, json: bool) -> int:
    """Print a diagnosis, write it as SARIF to a given file, and return the exit code."""
    _write_sarif(sarif, diagnosis.findings, diagnosis.subject)
    if json:
        print(dumps(json_values(diagnosis.to_json(path)), indent=1))
    else:
        _print_blocks(diagnosis.blocks(base))
    return int(bool(diagnosis.findings))


def _diagnose_run(run: Result, use: Application | None = None) -> _Diagnosis:
    """Diagnose an opened adapter or run, of which a runtime applies a part."""
    case, remark = Case(run), ""
    findings = find_faults(case)
    if use is not None:
        findings += [finding for finding in use.findings if finding not in findings]
    if not run.meta.states:
        remark = f", {run.meta.status}: no factors saved yet"
    return _Diagnosis(
        run_name(run),
        _subject(case.run),
        findings,
        remark,
        use,
        case.notes,
        skipped_checks(case),
        completed_checks(case),
        observe_ranks(case),
        model_checks(case),
    )


def _diagnose_application(path: Path, base: str | None, runtime: str | None) -> _Diagnosis:
    """Diagnose an adapter with a base that may be of another model, and what a runtime applies of it."""
    adapter, use = load_adapter(path, base), None
    if runtime is not None or "peft_type" in adapter.files.config:
        use = apply_adapter(adapter.files, adapter.base, runtime or "peft")
    try:
        return _diagnose_run(adapter, use)
    except BaseMisfit as misfit:
        # Its weights do not belong to the adapter, which is diagnosed without them.
        diagnosis = _diagnose_run(load_adapter(path, None), use)
        if use is not None and use.findings:
            return diagnosis
        return diagnosis._replace(findings=[*diagnosis.findings, fault_finding(misfit)])


def _subject(run: Result) -> Path:
    """Return the file of an adapter or a run that SARIF names."""
    return run.files.files[0].path if isinstance(run, Adapter) else Path(run.path or run.id) / "run.json"


def _require_adapter(path: str, option: str) -> Path:
    """Return the path of an adapter; raise a ValueError if it is a run, for which there is no such option."""
    adapter = locate_result(path)
    if is_run(adapter):
        raise ValueError(f"{option} requires an adapter, got a run: {printable(adapter)}")
    return adapter


def _report_merge(path: str, base: str | None, merged: str, sarif: str | None, json: bool) -> int:
    """Print whether an adapter was merged into a model, and return the exit code."""
    if base is None:
        raise ValueError("--merged requires the model before the merge: --base DIR")
    try:
        adapter = load_adapter(_require_adapter(path, "--merged"), base)
    except AdapterFault as fault:
        return _print_diagnosis(_unreadable(path, fault), path, base, sarif, json)
    check = check_merge(adapter, PretrainedWeights(locate_base(merged)))
    _write_sarif(sarif, check.findings, _subject(adapter))
    if json:
        content = {
            "path": path,
            "merged": merged,
            "modules": [*map(vars, check.modules)],
            "tensors": [*map(vars, check.tensors)],
            "findings": [*map(Finding.to_json, check.findings)],
        }
        print(dumps(json_values(content), indent=1))
    else:
        summary = f"{count_phrase(len(check.modules), 'module')}: {check.summary()}"
        _print_blocks([text_block(adapter.label, summary, label_style="bold"), *map(_finding_block, check.findings)])
    if check.findings:
        return 1
    return 0 if check.is_conclusive else 3


def _list_kinds(json: bool) -> int:
    """Print all kinds of findings, those of other packages last."""
    kinds = [*KINDS.values(), *(rule for rule in RULES if not rule.id)]
    if json:
        print(dumps([kind.to_json() for kind in kinds], indent=1))
        return 0
    blocks = []
    for kind in kinds:
        problem = f"{kind.name} ({kind.severity}): {kind.problem}".removesuffix(": ")
        details = {"needs": kind.needs, "evidence": kind.evidence, "fix": kind.fix}
        blocks.append(text_block(kind.id, problem, *(f"{name}: {text}" for name, text in details.items() if text)))
    _print_blocks(blocks)
    return 0


def _write_sarif(file: str | None, findings: Sequence[Finding], subject: Path) -> None:
    if file is not None:
        write_own(Path(file), json_bytes(sarif_log(findings, subject, lorascope.__version__)), "json")


def _finding_block(finding: Finding) -> Block:
    """Return id and cause of a finding, its message, and its fix."""
    style = SEVERITY_STYLES[finding.severity]
    return text_block(f"{finding.id} {finding.cause}".lstrip(), finding.message, f"fix: {finding.fix}", style=style)


def _print_blocks(blocks: Sequence[Block]) -> None:
    print(render_text(make_console(sys.stdout), block_grid(blocks)))
