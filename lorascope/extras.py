"""Extras of the installation, and the message for a package that is not installed."""

from __future__ import annotations

_IMPORTED = {
    "train": "torch transformers tokenizers platformdirs",
    "runs": "pyarrow scipy sklearn plotly jinja2 markupsafe",
    "trainer": "accelerate",
    "notebook": "anywidget traitlets IPython",
    "cluster": "dask distributed dask_jobqueue ray submitit",
    "quantized": "bitsandbytes",
    "hub": "datasets",
    "text": "sacrebleu rouge_score",
    "harness": "lm_eval",
    "e2e": "pycocoevalcap",
    "peft": "peft",
    "lightning": "lightning",
    "dev": "psutil",
}
"""Packages that an extra installs and this one imports, by extra."""
_EXTRAS = {package: extra for extra, packages in _IMPORTED.items() for package in packages.split()}
_DISTRIBUTIONS = {"lm_eval": "lm-eval", "rouge_score": "rouge-score", "sklearn": "scikit-learn"}


def requirement(error: ModuleNotFoundError) -> str | None:
    """Return what has to be installed after a failed import, or None if no extra has the package.

    Examples
    --------
    >>> requirement(ModuleNotFoundError(name="torch"))
    "requires torch: pip install 'lorascope[train]'"
    """
    package = error.name or ""
    if package not in _EXTRAS:
        return None
    return f"requires {_DISTRIBUTIONS.get(package, package)}: pip install 'lorascope[{_EXTRAS[package]}]'"
