"""``lorascope demo``: a page of figures of the examples of the package."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import command
from lorascope.files.printable import printable
from lorascope.pages.demo import write_demo


@command
def main(*, out: Annotated[str, arg(aliases=["-o"], metavar="FILE")] = "lorascope-demo.html") -> int:
    """Write a page of figures of the examples of the package, without training.

    Each figure comes with the Python line that draws it.

    Example: lorascope demo -o demo.html

    Parameters
    ----------
    out
        HTML file to write.
    """
    print(printable(write_demo(out)))
    return 0
