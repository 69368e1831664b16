"""Locales, closed and full output streams, and Ctrl-C, each tested in a separate process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pytest
from test_inspect import llama, plant
from test_loading import write_run

from lorascope.runs.run import Run

LABEL = "LoRA, Größe τ"
# Disable C.UTF-8 and UTF-8 mode, which Python otherwise chooses in the locale C.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNDEFAULTENCODING": "1"}

IN_A_LOCALE = """
import io, json, locale, sys, warnings
from dataclasses import replace
from pathlib import Path
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=r"lorascope(\\..*)?$")
assert locale.getpreferredencoding(False) in ("ANSI_X3.4-1968", "US-ASCII"), locale.getpreferredencoding(False)
from lorascope.cli.main import main
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
folder, *commands = sys.argv[1:]
run = Run.read(folder)
RunWriter(Path("again"), replace(run.meta, model=folder)).finish("done")
for command in json.loads(commands[0]):
    sys.argv = ["lorascope", *(folder if word == "RUN" else word for word in command)]
    code = main()
    assert code == 0, (command, code)
sys.stdout.reconfigure(encoding="latin-1", errors="strict")
sys.argv = ["lorascope", "inspect", folder]
main()
"""


def test_ascii_locale_reads_writes_and_prints_non_ascii_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "Größe", label=LABEL)
    commands = [
        ["inspect", "RUN"],
        ["inspect", "RUN", "--json"],
        ["doctor", "RUN"],
        ["export", "RUN", "--table", "table.json"],
        ["plot", "spectrum", "RUN", "-o", "spectrum.html"],
        ["plot", "spectrum", "RUN", "-o", "spectrum.csv"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LOCALE, str(folder), json.dumps(commands)],
        env=os.environ | ASCII, capture_output=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == (b"", 0)
    first, *_, last = (line for line in done.stdout.splitlines() if b"LoRA, Gr" in line)
    assert rb"LoRA, Gr\xf6\xdfe \u03c4" in first
    assert b"LoRA, Gr\xf6\xdfe \\u03c4" in last
    again = Run.read(tmp_path / "again")
    assert (again.label, Path(os.fsdecode(os.fsencode(again.meta.model)))) == (LABEL, folder)
    page = (tmp_path / "spectrum.html").read_text(encoding="utf-8")
    assert json.dumps(LABEL)[1:-1] in page or LABEL in page  # Plotly escapes it unless orjson is installed
    assert set(pd.read_csv(tmp_path / "spectrum.csv", encoding="utf-8")["recipe"]) == {LABEL}


IN_TURN = """
import json, sys
from lorascope.cli.main import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["lorascope", *command]
    code = main()
    assert code == (command[0] == "doctor"), (command, code)
"""


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode")
@pytest.mark.parametrize(
    ("locale", "name", "shown"),
    [({}, b"ad\xff", r"ad\xff"), (ASCII, b"ad\xff", r"ad\xff"), (ASCII, "Größe".encode(), "Größe")],
)
def test_commands_accept_folder_names_outside_the_encoding_of_the_locale(
    locale: dict[str, str], name: bytes, shown: str, tmp_path: Path
) -> None:
    for parent in ("one", "other"):
        unused = {"model.layers.1.self_attn.q_proj": [0.0, 0.0]}
        plant(Path(os.fsdecode(os.fsencode(tmp_path / parent) + b"/" + name)), llama(2, [2.0, 1.0]) | unused)
    # The locale C decodes each byte above 127 of a file name to a surrogate.
    one, other = (f"{parent}/{name.decode('ascii', 'surrogateescape')}" for parent in ("one", "other"))
    label = name.decode("ascii", "surrogateescape")
    figures = [["plot", "spectrum", f"{label}={one}", "-o", f"labeled.{kind}"] for kind in ("csv", "svg")]
    figures += [["plot", "spectrum", one, "-o", f"spectrum.{kind}"] for kind in ("csv", "html")]
    commands = [
        ["inspect", one, "--csv"],
        ["inspect", one, other],
        ["inspect", one, other, "--csv"],
        ["survey", one, "--csv"],
        ["doctor", one, "--sarif", "log.sarif"],
        *figures,
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)],
        env=os.environ | locale | {"PYTHONWARNDEFAULTENCODING": ""}, capture_output=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == (b"", 0)
    for file in ("spectrum.csv", "labeled.csv"):
        assert set(pd.read_csv(tmp_path / file, encoding="utf-8")["recipe"]) == {shown}
    assert quote(name) in (tmp_path / "log.sarif").read_text(encoding="utf-8")


def lorascope(
    *words: str, stdout: object = subprocess.PIPE, stderr: object = subprocess.PIPE, close: str = ""
) -> tuple[int, bytes, bytes]:
    """Return exit code, output and errors of a command line; ``close`` is a redirection such as ``>&-``."""
    command = ["sh", "-c", f'exec "$@" {close}', "sh", sys.executable, "-m", "lorascope.cli", *words]
    done = subprocess.run(command, stdout=stdout, stderr=stderr, check=False)
    return done.returncode, done.stdout or b"", done.stderr or b""


def test_closed_output_does_not_fail() -> None:
    assert lorascope("--version", close=">&-") == (0, b"", b"")
    assert lorascope("--version", close=">&- 2>&- <&-") == (0, b"", b"")
    code, out, err = lorascope("no-such-command", close="2>&-")
    assert (code, out, err) == (2, b"", b"")


@pytest.mark.parametrize("words", ["--help", "inspect --help"])
def test_pipe_without_a_reader_does_not_fail(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert lorascope(*words.split(), stdout=writer) == (0, b"", b"")
    code, _, err = lorascope("no-such-command", stdout=writer, stderr=writer)
    os.close(writer)
    assert (code, err) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_unwritable_output_fails_with_one_line() -> None:
    with open("/dev/full", "wb") as full:
        code, _, err = lorascope("--help", stdout=full)
        assert (code, err.count(b"\n")) == (1, 1)
        assert err.startswith(b"lorascope: ")
        assert os.strerror(errno.ENOSPC).encode() in err
        assert lorascope("no-such-command", stdout=full, stderr=full)[0] == 2


def test_closed_stream_number_is_not_reused_for_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from lorascope.cli.main import main; sys.argv[1:] = ['--version']; main()\n"
        "with open('number', 'w') as file: print(file.fileno(), file=file)"
    )
    command = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    assert int((tmp_path / "number").read_text(encoding="utf-8")) > 2


INTERRUPTED = """
import atexit, os, signal, sys, time, types
from lorascope.cli import main as cli

signal.signal(signal.SIGINT, signal.default_int_handler)
when = sys.argv.pop()

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)

def work(words):
    if when == "in an import that is optional":
        try:
            press()
        except KeyboardInterrupt:
            raise AttributeError("module 'pandas' has no attribute '__version__'")
    try:
        press()
    finally:
        if when == "in the cleanup":
            press()
            print("went on", flush=True)

if when == "at the end":
    atexit.register(press)
if when == "as the line is printed":
    failed = cli._report_failure
    cli._report_failure = lambda *failure: (failed(*failure), press())
sys.modules["lorascope.cli.wait"] = types.SimpleNamespace(main=work)
cli.COMMANDS["wait"] = ""
sys.argv = ["lorascope", "wait"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    "second", ["never", "in the cleanup", "in an import that is optional", "as the line is printed", "at the end"]
)
def test_ctrl_c_once_or_twice_prints_one_line(second: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, second], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"lorascope: stopped\n")
