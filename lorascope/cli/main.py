"""The command ``lorascope``: its first word chooses the one module that is imported.

Exit codes: 0 done, 1 a finding or a run that failed, 2 wrong use, 130 stopped by the user.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple, TextIO

from lorascope import __version__
from lorascope.files.printable import printable


class Command(NamedTuple):
    """The module with the command's ``main(argv)``, and one line of help."""

    module: str
    summary: str


COMMANDS = {
    "reproduce": Command("reproduce", "train, record, draw, judge and report what the papers observed"),
    "train": Command("train", "train a model by one of the methods, and record what happens inside"),
    "sweep": Command("sweep", "train all runs of a TOML file, side by side, and compare their recipes"),
    "inspect": Command("inspect", "say what is in an adapter or a run; several are compared"),
    "doctor": Command("doctor", "name the causes why an adapter or a run is not what was meant"),
    "plot": Command("plot", "draw a figure of one or several runs"),
    "export": Command("export", "hand a run over: its ranks or its adapter to PEFT, its tables as files"),
    "report": Command("report", "write the report of runs that are there already"),
}
_EXAMPLES = """examples:
  lorascope reproduce --quick -o report
  lorascope train lora --task sentiment --model minilm --steps 300 -o runs/lora
  lorascope inspect runs/lora
  lorascope plot update_norm_heat runs/lora -o figures/lora.pdf"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Words after ``lorascope``; those of the process by default.
    """
    if argv is None:
        _prepare_process()
        argv = sys.argv[1:]
    try:
        return _flush_output(_run_command(list(argv)))
    except KeyboardInterrupt:  # a further one, while the first was answered
        return 130


def _prepare_process() -> None:
    """Make this process fit for any terminal, or none, and for more than one Ctrl-C."""
    # A standard stream that is closed leaves its number to the next file that is opened, and prints go into that file.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for number, name in (1, "stdout"), (2, "stderr"):
        stream: Any = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in a background job it is ignored
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit at once: the user does not wait for the cleanup after the first Ctrl-C."""
    _report_failure("stopped", 130)
    os._exit(130)


def _run_command(words: list[str]) -> int:
    """Exit code of a command; an error is one line."""
    try:
        return _dispatch(words)
    except KeyboardInterrupt as stop:
        if signal.getsignal(signal.SIGINT) in (_interrupt, _leave):
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the line is printed here
        return _report_failure(str(stop).replace("the same call", "the same command") or "stopped", 130)
    except BrokenPipeError as error:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
            return 0
        return _report_failure(error, 1)
    except FloatingPointError as error:
        return _report_failure(error, 1)
    except OSError as error:
        # Python has classes of their own for names that are wrong; a disk that is full or broken is a plain OSError.
        return _report_failure(error, 1 if type(error) is OSError else 2)
    except ValueError as error:
        return _report_failure(error, 2)
    except MemoryError as error:
        return _report_failure(f"not enough memory: {error}" if str(error) else "not enough memory", 1)
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)


def _flush_output(code: int) -> int:
    """The exit code, once all output is written; a pipe that is closed counts as written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output(sys.stdout)
        if not code and not isinstance(error, BrokenPipeError):
            return _report_failure(f"cannot write the output: {error.strerror}", 1)
    return code


def _discard_output(stream: TextIO) -> None:
    """Send what a stream still holds nowhere; else the interpreter tries again at its end and complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _dispatch(words: list[str]) -> int:
    match words:
        case [] | ["-h" | "--help" | "help"]:
            print(_print_help())
            return 0 if words else 2
        case ["--version"]:
            print(f"lorascope {__version__}")
            return 0
        case [name, *rest] if name in COMMANDS:
            return importlib.import_module(f"lorascope.cli.{COMMANDS[name].module}").main(rest)
    near = difflib.get_close_matches(words[0], COMMANDS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
    raise ValueError(f"there is no command {words[0]!r}; {hint}")


def _print_help() -> str:
    lines = [f"  {name:<11}{command.summary}" for name, command in COMMANDS.items()]
    head = "usage: lorascope COMMAND ...\n\nLook inside low-rank adaptation: train it, record it, draw it, judge it."
    tail = "lorascope COMMAND --help tells more; lorascope --version the version."
    return "\n".join([head, "", "commands:", *lines, "", _EXAMPLES, "", tail])


def _report_failure(reason: object, code: int) -> int:
    try:
        print(f"lorascope: {printable(' '.join(str(reason).split()))}", file=sys.stderr, flush=True)
    except OSError:
        _discard_output(sys.stderr)
    return code
