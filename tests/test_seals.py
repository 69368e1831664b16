"""Files that commands replace: only those that lorascope wrote as they are, and nothing that was added to them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
from PIL import Image
from pypdf import PdfReader, PdfWriter
from test_inspect import llama, plant

from lorascope import cli
from lorascope.files import seals, whole_files
from lorascope.files.whole_files import is_partial, write_new

FIGURES = ("html", "svg", "pdf", "png", "csv")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    spectra = llama(2, [1.0, 0.5])
    spectra["model.layers.1.mlp.up_proj"] = [float("nan")] * 2  # a finding, so that a log has a result
    plant(tmp_path / "ill", spectra)
    plant(tmp_path / "mine", llama(2, [1.0, 0.5]))
    monkeypatch.chdir(tmp_path)
    return "mine"


def run(*words: str) -> int:
    return cli.main.main(list(words))


WRITERS = {f"figure.{kind}": ("plot", "spectrum", "mine", "-o") for kind in FIGURES}
WRITERS |= {f"card.{kind}": ("report", "mine", "-o") for kind in ("html", "md")}
WRITERS["log.sarif"] = ("doctor", "ill", "--sarif")


def write(name: str) -> int:
    return run(*WRITERS[name], name)


def written(name: str) -> bytes:
    assert write(name) in (0, 1)
    return Path(name).read_bytes()


def add_chunk(content: bytes) -> bytes:
    """Add a comment to a PNG, as an editor of images does."""
    chunk = b"tEXtComment\0years of work"
    return b"".join(
        [content[:-12], struct.pack(">I", len(chunk) - 4), chunk, struct.pack(">I", zlib.crc32(chunk)), content[-12:]]
    )


def add_run(content: bytes) -> bytes:
    """Add the run of another tool to a log, as programs do that merge logs."""
    log = json.loads(content)
    log["runs"].append({"tool": {"driver": {"name": "CodeQL"}}, "results": []})
    return json.dumps(log, indent=1).encode() + b"\n"


def suppress_result(content: bytes) -> bytes:
    log = json.loads(content)
    log["runs"][0]["results"][0]["suppressions"] = [{"kind": "external", "justification": "years of work"}]
    return json.dumps(log, indent=1).encode() + b"\n"


def before(content: bytes) -> bytes:
    return b"years of work\n" + content


def after(content: bytes) -> bytes:
    return content + b"years of work\n"


def inside(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"years of work" + content[middle:]


def empty(content: bytes) -> bytes:
    return b""


CHANGES: list[tuple[str, Callable[[bytes], bytes]]] = [("log.sarif", add_run), ("log.sarif", suppress_result)]
CHANGES += [("figure.png", add_chunk)]
CHANGES += [(name, change) for name in WRITERS for change in (before, after, inside, empty)]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_changed_file_is_not_replaced(
    adapter: str, name: str, change: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = change(written(name))
    Path(name).write_bytes(foreign)
    files = sorted(os.listdir())
    capsys.readouterr()
    assert write(name) == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"lorascope: cannot write {name}: it exists and .*\n", line)
    assert Path(name).read_bytes() == foreign
    assert sorted(os.listdir()) == files


@pytest.mark.parametrize("name", WRITERS)
def test_own_file_is_replaced_by_equal_bytes(adapter: str, name: str) -> None:
    content = written(name)
    assert written(name) == content


@pytest.mark.parametrize("name", WRITERS)
def test_file_that_only_mentions_lorascope_is_not_replaced(adapter: str, name: str) -> None:
    text = '<meta name="generator" content="lorascope"><!-- written by lorascope --> "name": "lorascope"'
    Path(name).write_text(text, encoding="utf-8")
    assert write(name) == 2
    assert Path(name).read_text(encoding="utf-8") == text


def test_merged_pdf_is_not_replaced(adapter: str) -> None:
    written("figure.pdf")
    merged = PdfWriter(clone_from="figure.pdf")  # with the metadata of the figure
    merged.add_blank_page(100, 100)
    merged.write("figure.pdf")
    content = Path("figure.pdf").read_bytes()
    assert PdfReader("figure.pdf").metadata["/Creator"].startswith("lorascope")
    assert write("figure.pdf") == 2
    assert Path("figure.pdf").read_bytes() == content


def test_readme_with_a_section_of_a_card_is_not_replaced(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = written("card.md").decode()
    capsys.readouterr()
    assert run("report", "mine", "--markdown") == 0
    section = capsys.readouterr().out
    assert card.startswith(section)
    for text in (f"# Mine\n\n{card}", f"# Mine\n\n{section}", f"{card}\nNotes.\n", section):
        Path("README.md").write_text(text, encoding="utf-8")
        assert run("report", "mine", "-o", "README.md") == 2
        assert Path("README.md").read_text(encoding="utf-8") == text


def test_table_next_to_the_metadata_of_another_plot_is_not_replaced(adapter: str) -> None:
    written("figure.csv")
    for name in ("d.csv", "e.csv"):
        Path(f"{name}-metadata.json").write_bytes(Path("figure.csv-metadata.json").read_bytes())
    Path("d.csv").write_bytes(Path("figure.csv").read_bytes())
    files = {path.name: path.read_bytes() for path in Path().glob("*.*")}
    for name in ("d.csv", "e.csv"):
        assert run("plot", "spectrum", "mine", "-o", name) == 2
    Path("figure.csv").write_text("mine", encoding="utf-8")  # next to the metadata of the figure that was here
    assert write("figure.csv") == 2
    assert {path.name: path.read_bytes() for path in Path().glob("*.*")} == files | {"figure.csv": b"mine"}
    Path("figure.csv").unlink()
    assert write("figure.csv") == 0
    assert len(pd.read_csv("figure.csv")) > 0


@pytest.mark.parametrize("name", ["d.svg", "d.png"])
def test_figure_next_to_the_metadata_of_another_plot_is_not_replaced(adapter: str, name: str) -> None:
    written("figure.csv")
    Path(f"{name}-metadata.json").write_bytes(Path("figure.csv-metadata.json").read_bytes())
    Path(name).write_text("mine", encoding="utf-8")
    assert run("plot", "spectrum", "mine", "-o", name) == 2
    assert Path(name).read_text(encoding="utf-8") == "mine"


def test_file_that_appears_while_a_figure_is_drawn_is_not_replaced(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorascope.cli import plot

    def open_slowly(*words: object, open_runs: Callable[..., object] = plot.open_runs) -> object:
        Path("figure.svg").write_text("mine", encoding="utf-8")
        return open_runs(*words)

    monkeypatch.setattr(plot, "open_runs", open_slowly)
    assert write("figure.svg") == 2
    assert Path("figure.svg").read_text(encoding="utf-8") == "mine"


def test_sealed_files_are_valid(adapter: str) -> None:
    for name in WRITERS:
        written(name)
    ElementTree.parse("figure.svg")
    with Image.open("figure.png") as image:
        image.verify()
    assert len(PdfReader("figure.pdf", strict=True).pages) == 1
    assert set(json.loads(Path("log.sarif").read_bytes())) == {"$schema", "version", "runs", "properties"}
    assert json.loads(Path("figure.csv-metadata.json").read_bytes())["url"] == "figure.csv"


def export(words: tuple[str, ...], barrier: object, ends: object) -> None:
    """Run an export in a process that writes at the same time as another one."""

    def wait_and_sync(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
        sync(handle)
        os.fsync = sync
        barrier.wait(30)  # type: ignore[attr-defined]

    os.fsync = wait_and_sync
    ends.put(run("export", *words))  # type: ignore[attr-defined]


EXPORTS = {
    "table": ("mine", "--table", "out.csv"),
    "kohya": ("unet", "--kohya", "out.safetensors", "--component", "unet"),
    "diffusers": ("unet", "--diffusers", "out.safetensors", "--component", "unet"),
    "diffusers folder": ("unet", "--diffusers", "out", "--component", "unet"),
    "peft": ("mine", "--peft", "out"),
    "mlx": ("mine", "--mlx", "out"),
}


@pytest.mark.parametrize("words", EXPORTS.values(), ids=EXPORTS)
def test_one_of_two_exports_at_the_same_time_fails_with_one_line(
    adapter: str, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "unet":
        plant(Path("unet"), {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": [1.0, 0.5]})
    fork = multiprocessing.get_context("fork")
    barrier, ends = fork.Barrier(2), fork.SimpleQueue()
    processes = [fork.Process(target=export, args=(words, barrier, ends)) for _ in range(2)]
    for process in processes:
        process.start()
    codes = sorted(ends.get() for _ in processes)
    for process in processes:
        process.join()
    lines = capfd.readouterr().err.splitlines()
    assert codes == [0, 2]
    assert lines == [f"lorascope: cannot create {words[2]}: it exists, pass a new path"]
    assert not any(map(is_partial, Path().rglob(".*")))


@pytest.mark.parametrize("can_link", [True, False])
def test_write_new_replaces_no_file_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    file = tmp_path / "file"

    def refuse(*words: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not can_link:  # such as exFAT
        monkeypatch.setattr(os, "link", refuse)
    write_new(file, b"first")
    assert file.read_bytes() == b"first"
    monkeypatch.setattr(whole_files, "require_absent", lambda path: None)
    with pytest.raises(FileExistsError):
        write_new(file, b"second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"first"}


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_table_whose_writing_was_killed_in_between_is_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool, written: int
) -> None:
    path = tmp_path / "table.csv"
    if replaced:
        seals.write_table(path, b"a\n1\n", {})
    write, left = seals.write_bytes, iter(range(written))

    def write_some(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(seals, "write_bytes", write_some)
    with contextlib.suppress(KeyboardInterrupt):
        seals.write_table(path, b"a\n2\n", {})
    monkeypatch.undo()
    seals.require_own(path)
    seals.write_table(path, b"a\n2\n", {})
    seals.write_table(tmp_path / "whole" / "table.csv", b"a\n2\n", {})
    for name in ("table.csv", "table.csv-metadata.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    path.write_bytes(b"a\n1\n")  # the content before is foreign again
    with pytest.raises(FileExistsError, match=r"table\.csv"):
        seals.require_own(path)
