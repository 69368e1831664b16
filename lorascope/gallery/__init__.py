"""Gallery: the figures of the README and the docs, which show runs of the evidence, one module per paper.

A module of this package with ``HEADING`` and ``FIGURES`` is a section of the gallery.
"""

from importlib import import_module
from pkgutil import iter_modules

from lorascope.gallery.base import GalleryFigure

__all__ = ["SECTIONS", "GalleryFigure"]

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
SECTIONS: dict[str, list[GalleryFigure]] = {
    module.HEADING: module.FIGURES for module in _modules if hasattr(module, "FIGURES")
}
"""Figures by heading: the method, or what a study of this project shows."""
