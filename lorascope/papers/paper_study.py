"""Description of a paper of the study, and its small version, which one can train in minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lorascope.extras import requirement
from lorascope.papers.judging.data_folder import PAPERS


@dataclass(frozen=True)
class PaperStudy:
    """Study of one paper; its module has it as ``PAPER``.

    Parameters
    ----------
    name : str
        Name of its method, a key of ``data_folder.PAPERS``; the module has this name in lower case.
    authors : str
        First author.
    question : str
        Question that the study asks.
    motive : mapping label -> settings
        Arms that show why the method was proposed, and the settings of ``train`` that the small version changes, such
        as fewer steps. Default none.
    """

    name: str
    authors: str
    question: str
    motive: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def arxiv(self) -> str:
        """Number on arXiv, which its claims have in the registration."""
        return PAPERS[self.name]

    @property
    def source(self) -> str:
        """Reference."""
        return f"{self.authors}, {self.name}, arXiv {self.arxiv}"

    def run(self, seeds: int | Sequence[int] = 1, out: str | Path = "report", progress: bool = True) -> Any:
        """Train a small version of the paper's study, and write a page about it.

        It has the arms of the paper's claims on planted teachers, as registered, and the motive of LISA and HydraLoRA
        with fewer steps.

        Parameters
        ----------
        seeds : int or sequence of int
            Number of seeds, counted from 200, the first one of the kept runs, or the seeds themselves. Default 1.
        out : path
            Folder of the page, and of the runs in its folder ``runs``. Finished runs in it are not trained again, and
            interrupted ones resume. Default "report".
        progress : bool
            Whether to show a progress bar. Default True.

        Returns
        -------
        SmallStudy
            ``table``, ``runs`` and ``figures``, which Jupyter shows, and ``path`` of the page.

        Raises
        ------
        ImportError
            torch is not installed.
        FileExistsError
            ``out`` has a page of this name that lorascope did not write, or it has changed since.
        ValueError
            ``seeds`` is invalid, or an arm differs from the registered one.
        """
        try:
            # By name, because the training of the study reads all papers.
            small_studies = import_module("lorascope.papers.training.small_studies")
        except ModuleNotFoundError as error:
            if (required := requirement(error)) is None:
                raise
            raise ImportError(f"lorascope.papers.{self.name.lower()}.run {required}") from error
        return small_studies.run(self, seeds, out, progress)
