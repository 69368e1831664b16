"""Images as task rows: supported formats, equality of images, and batches for a model."""

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
from PIL import Image
from torch import Tensor

from lorascope.array_types import Int
from lorascope.files.printable import printable
from lorascope.files.typed_json import require_regular
from lorascope.inputs.tokenization import EncodedRows, class_numbers, groups_of

MAX_PIXELS = 2**26
"""Maximum pixels of an image: a file of half a megabyte can contain 200 million, which take more than 1 GB."""


class _TooManyPixels(ValueError):
    """Error for an image that is too large to decode."""


def open_image(image: Any) -> Image.Image:
    """Return an image in RGB: a file, its content, a PIL image, or a uint8 array (height, width) or (height, width, 3).

    A dict with ``bytes`` or ``path``, as datasets from the Hugging Face Hub store images, is also accepted.

    Raises
    ------
    ValueError
        The value has another type, is not a readable image, or has more than ``MAX_PIXELS``.
    FileNotFoundError
        The file does not exist.
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
        width, height = image.size
        if width * height > MAX_PIXELS:
            image.close()
            raise _TooManyPixels(f"image must have at most {MAX_PIXELS:,} pixels, got {width} x {height}")
        return image.convert("RGB")
    except _TooManyPixels:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"cannot read image {printable(image)}: no such file") from None
    except Exception as error:  # decoders raise many kinds of errors, such as SyntaxError and struct.error
        is_short = isinstance(image, str | os.PathLike | int | float | None)
        raise ValueError(
            "image must be a readable file, its bytes, a PIL image, or a uint8 array of shape (height, width) or "
            f"(height, width, 3), got {repr(image) if is_short else type(image).__name__}"
        ) from error


def digest_image(image: Any) -> str:
    """Return the SHA-256 of an image row's size and pixels, so that the same image in two files counts once."""
    rgb = open_image(image)
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Images(EncodedRows):
    """Images as task rows, read and preprocessed when they are part of a batch."""

    images: Sequence[Any]  # in any form that `open_image` reads
    processor: Any  # image processor of the model, from transformers

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Ones: the processor scales all images to the same size."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Return pixel values of shape (rows, channels, height, width), and labels."""
        rows = list(map(int, indices))
        inputs = self.processor(images=[open_image(self.images[row]) for row in rows], return_tensors="pt")
        assert self.classes is not None
        return {"pixel_values": inputs["pixel_values"], "labels": torch.from_numpy(self.classes[rows])}


def encode_images(processor: Any, rows: pd.DataFrame, labels: Sequence[str]) -> Images:
    """Return the encoded rows of images with class numbers."""
    return Images(rows["image"].to_list(), processor, classes=class_numbers(rows, labels), groups=groups_of(rows))
