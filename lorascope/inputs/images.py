"""Images as rows of a task: what counts as one, when two are the same, and how a model gets them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from lorascope.files.printable import printable
from lorascope.files.typed_json import require_regular
from lorascope.inputs.tokenization import EncodedRows, groups_of, numbers


def open_image(image: Any) -> Image.Image:
    """An image in RGB.

    Parameters
    ----------
    image : str, path, bytes, array or PIL image
        A file or what is in one; uint8 of shape (height, width) or (height, width, 3); or a dict of ``bytes`` and
        ``path``, as data sets of the hub store them.

    Raises
    ------
    ValueError
        It is none of these, or no image that can be read.
    FileNotFoundError
        There is no such file.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            require_regular(Path(image))
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {printable(image)}") from None
    except Exception as error:  # decoders raise errors of many kinds, such as SyntaxError and struct.error
        raise ValueError(
            f"{describe_value(image)} is no image that can be read: a file, its bytes, a PIL image, or an array of "
            "uint8, (height, width) or (height, width, 3)"
        ) from error


def digest(image: Any) -> str:
    """SHA-256 of the pixels, so that one picture in two files counts as one."""
    picture = open_image(image)
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Images(EncodedRows):
    """Images that are read and scaled when a batch asks for them.

    Parameters
    ----------
    images : sequence
        See ``open_image``.
    processor
        The image processor of transformers that belongs to the model.
    """

    images: Sequence[Any]
    processor: Any

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """All alike: a processor makes them of one size."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Pixels (rows, channels, height, width), and labels."""
        rows = [int(index) for index in indices]
        found = self.processor(images=[open_image(self.images[row]) for row in rows], return_tensors="pt")
        assert self.classes is not None
        return {"pixel_values": found["pixel_values"], "labels": torch.from_numpy(self.classes[rows])}


def encode_images(processor: Any, rows: pd.DataFrame, labels: Sequence[str]) -> Images:
    """Images with class numbers."""
    return Images(rows["image"].to_list(), processor, classes=numbers(rows, labels), groups=groups_of(rows))


def describe_value(image: Any) -> str:
    return repr(image) if isinstance(image, str | os.PathLike | int | float | None) else f"a {type(image).__name__}"
