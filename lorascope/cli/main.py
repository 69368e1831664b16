"""The ``lorascope`` command. Its first argument selects the command module, the only one that is imported.

Exit codes: 0 success; 1 a finding, a failed run or a system error; 2 invalid usage; 130 stopped by the user.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, TextIO

from lorascope import __version__
from lorascope.extras import requirement
from lorascope.files.memory_errors import is_out_of_memory
from lorascope.files.printable import first_line, printable
from lorascope.schema.suggestions import unknown_name

# One line of help for each module of this package that defines a command as ``main(argv)``.
COMMANDS = {
    "demo": "write a page of figures of the examples of the package, without training",
    "reproduce": "show what nine papers' claims come to, train small versions of the studies, and report both",
    "train": "train a model with one method, and record its internals",
    "fork": "continue a run from a stored checkpoint with one change",
    "sweep": "train all runs of a TOML file in parallel, and compare their recipes",
    "inspect": "show norms, ranks and findings of an adapter or run, or compare several",
    "survey": "show one line for each of many adapters and runs",
    "doctor": "diagnose problems of an adapter or run",
    "advise": "say what to change about an adapter or run, from measurements within a budget",
    "dial": "measure what the parts of an adapter buy on its task and cost on other text",
    "price": "measure what smaller ranks of an adapter cost, and whether its rank is too small",
    "read": "read which words the components of an adapter use, and what they write",
    "report": "write the report card of an adapter or run as one page",
    "plot": "plot one or more runs as a figure",
    "texts": "write the generated texts of a run and their references as files",
    "export": "export ranks or an adapter to PEFT, or tables to files",
    "verify": "compute the kept verdicts again from the evidence",
}
_USAGE = """usage: lorascope COMMAND ...

See inside low-rank fine-tuning: train, record, inspect and plot it.

commands:"""
_EXAMPLES = """
examples:
  lorascope demo -o demo.html
  lorascope reproduce -o report
  lorascope train lora --task sentiment --model minilm --steps 300 -o runs/lora
  lorascope inspect runs/lora
  lorascope plot update_norm_heat runs/lora -o figures/lora.pdf

Run lorascope COMMAND --help for its options, lorascope --version for the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after ``lorascope``; by default those of the process.
    """
    if argv is None:
        _prepare_process()
        argv = sys.argv[1:]
    try:
        return _flush_output(_run_command(list(argv)))
    except KeyboardInterrupt:  # a second Ctrl-C while the first one is handled
        return 130
    except Exception:
        if signal.getsignal(signal.SIGINT) is not _exit_now:
            raise
        # Ctrl-C amid an import that is optional for another package, such as that of pandas for pyarrow.
        return _report_failure("stopped", 130)


def _prepare_process() -> None:
    """Prepare the process for any terminal, closed standard streams and repeated Ctrl-C, and pause the collector."""
    gc.disable()
    # The next file that is opened gets the number of a closed standard stream, and would receive its output.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for number, name in (1, "stdout"), (2, "stderr"):
        stream: Any = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8", closefd=False)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, _interrupt)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line, without the place in the code."""
    return f"lorascope: warning: {printable(' '.join(str(message).split()))}\n"


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _exit_now)
    raise KeyboardInterrupt


def _exit_now(number: int, frame: FrameType | None) -> None:
    """Exit on the second Ctrl-C without waiting for the cleanup that the first one started."""
    # Workers of a sweep accept Ctrl-C only during a job. The module is imported if there are any.
    if (processes := sys.modules.get("multiprocessing.process")) is not None:
        for worker in processes.active_children():
            worker.terminate()
    _report_failure("stopped", 130)
    os._exit(130)


def _require_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("the working directory was removed: change to another one") from None


def _run_command(words: list[str]) -> int:
    """Run a command and return its exit code; an error is printed in one line."""
    try:
        _require_working_directory()
        match words:
            case [] | ["-h" | "--help" | "help"]:
                print("\n".join([_USAGE, *(f"  {name:<11}{summary}" for name, summary in COMMANDS.items()), _EXAMPLES]))
                return 0 if words else 2
            case ["--version"]:
                print(f"lorascope {__version__}")
                return 0
            case [name, *arguments] if name in COMMANDS:
                command = importlib.import_module(f"lorascope.cli.{name}")
                if not gc.isenabled():
                    # Modules are never garbage. Traversing them takes a tenth of the time of a fast command.
                    gc.freeze()
                    gc.enable()
                return command.main(arguments)
        raise ValueError(unknown_name("command", words[0], COMMANDS))
    except KeyboardInterrupt as stop:
        if signal.getsignal(signal.SIGINT) in (_interrupt, _exit_now):
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the message is printed below
        return _report_failure(str(stop).replace("the same call", "the same command") or "stopped", 130)
    except BrokenPipeError as error:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader of the output, such as `head`, has ended
            return 0
        return _report_failure(error, 1)
    except ModuleNotFoundError as error:
        if (required := requirement(error)) is None:
            raise
        return _report_failure(required, 2, f"lorascope {words[0]}")
    except (FloatingPointError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _report_failure(f"cannot open {str(error.filename)[:100]!r} ...: {error.strerror}", 2)
        # A wrong file name raises a subclass of OSError; a full or broken disk raises OSError itself.
        return _report_failure(error, 1 if type(error) in (FloatingPointError, OSError) else 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _report_failure(f"not enough memory: {first_line(error)}" if str(error) else "not enough memory", 1)
    except SystemExit as stop:  # raised by --help
        return int(stop.code or 0)


def _flush_output(code: int) -> int:
    """Flush stdout and return the exit code; a closed pipe is not an error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output(sys.stdout)
        if not code and not isinstance(error, BrokenPipeError):
            return _report_failure(f"cannot write the output: {error.strerror}", 1)
    return code


def _discard_output(stream: TextIO) -> None:
    """Redirect a stream to the null device, because the interpreter would flush it again at exit and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report_failure(reason: object, code: int, subject: str = "lorascope:") -> int:
    try:
        print(f"{subject} {printable(' '.join(str(reason).split()))}", file=sys.stderr, flush=True)
    except OSError:
        _discard_output(sys.stderr)
    return code
