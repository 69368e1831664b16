"""Images as task rows: supported formats, equality of images, batches for a model, and random crops in training."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
AUGMENTATIONS = ("none", "crop-flip")
_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
_ATTEMPTS = 10
# Options of a processor for images that have the size of the model.
_AS_IT_IS = {"do_resize": False, "do_center_crop": False}


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


class Box(NamedTuple):
    """Box in an image, in pixels from its upper left corner, without the pixels at ``right`` and ``bottom``."""

    left: int
    top: int
    right: int
    bottom: int


def draw_crop(width: int, height: int, generator: np.random.Generator) -> Box:
    """Draw a box with the distribution of torchvision's RandomResizedCrop.

    A fraction of the area, uniform from 0.08 to 1, and a ratio of width to height, log-uniform from 3/4 to 4/3, are
    drawn until a box fits, at most ten times. Otherwise it is the largest box in the center with a ratio within these
    bounds.

    Parameters
    ----------
    width, height : int
        Size of the image in pixels.
    generator : Generator
        Source of the random numbers.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(*_AREAS)
        ratio = math.exp(generator.uniform(*np.log(_RATIOS)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return Box(left, top, left + crop_width, top + crop_height)
    crop_width, crop_height = width, height
    if width / height < _RATIOS[0]:
        crop_height = round(width / _RATIOS[0])
    elif width / height > _RATIOS[1]:
        crop_width = round(height * _RATIOS[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Box(left, top, left + crop_width, top + crop_height)


def crop_flip(image: Image.Image, edge: int, generator: np.random.Generator) -> Image.Image:
    """Return a random crop of an image, resized to a square, and flipped left to right in half of the cases.

    The interpolation is bilinear, as in torchvision.
    """
    box = draw_crop(*image.size, generator)
    crop = image.crop(box).resize((edge, edge), Image.Resampling.BILINEAR)
    if generator.random() < 0.5:
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def center_crop(image: Image.Image, edge: int) -> Image.Image:
    """Return the square in the center of an image whose shorter side is resized to that of the square."""
    width, height = image.size
    shorter = min(width, height)
    # Rounded down, as in torchvision.
    width, height = edge * width // shorter, edge * height // shorter
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - edge) / 2), round((height - edge) / 2)
    return resized.crop((left, top, left + edge, top + edge))


@dataclass(frozen=True, eq=False)
class Images(EncodedRows):
    """Images as task rows, read and preprocessed when they are part of a batch."""

    images: Sequence[Any]  # in any form that `open_image` reads
    processor: Any  # image processor of the model, from transformers
    augment: str = "none"  # one of AUGMENTATIONS

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Ones: the processor scales all images to the same size."""
        return np.ones(len(self), dtype=np.int64)

    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Return pixel values of shape (rows, channels, height, width), and labels."""
        rows = list(map(int, indices))
        images = [open_image(self.images[row]) for row in rows]
        if self.augment == "none":
            return self._to_inputs(rows, images)
        for number, image in enumerate(images):
            images[number] = center_crop(image, crop_edge(self.processor))
        return self._to_inputs(rows, images, **_AS_IT_IS)

    def training_batch(self, indices: Iterable[Any], generator: np.random.Generator) -> dict[str, Tensor]:
        """Return the batch of these rows, with random crops of the images if ``augment`` is "crop-flip"."""
        rows = list(map(int, indices))
        if self.augment == "none":
            return self.batch(rows)
        images = []
        for row in rows:
            images.append(crop_flip(open_image(self.images[row]), crop_edge(self.processor), generator))
        return self._to_inputs(rows, images, **_AS_IT_IS)

    def _to_inputs(self, rows: list[int], images: list[Image.Image], **options: bool) -> dict[str, Tensor]:
        inputs = self.processor(images=images, return_tensors="pt", **options)
        assert self.classes is not None
        return {"pixel_values": inputs["pixel_values"], "labels": torch.from_numpy(self.classes[rows])}


def crop_edge(processor: Any) -> int:
    """Return the width and height, which are equal, of the images that an image processor passes to its model.

    Raises
    ------
    ValueError
        They are not equal.
    """
    size = processor.size
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    if edge := size.get("shortest_edge"):
        return edge
    if size["width"] != size["height"]:
        raise ValueError(f"augment requires a model of square images, got {size['width']} x {size['height']} pixels")
    return size["width"]


def encode_images(processor: Any, rows: pd.DataFrame, labels: Sequence[str], augment: str = "none") -> Images:
    """Return the encoded rows of images with class numbers.

    Raises
    ------
    ValueError
        Images are augmented, but those of the model are not square.
    """
    if augment != "none":
        crop_edge(processor)
    classes, groups = class_numbers(rows, labels), groups_of(rows)
    return Images(rows["image"].to_list(), processor, augment, classes=classes, groups=groups)
