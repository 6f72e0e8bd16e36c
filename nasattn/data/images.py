"""Pictures from files, a batch at a time: decoded, cut to the input, augmented.

train, by `augment`: crop_flip takes a box of .08 to 1 of the area with 3/4 to 4/3 of the input's
own aspect, and mirrors every second image; crop_flip_color also scales brightness, contrast and
saturation by .6 to 1.4 each, in this order. val and test (and train with `none`): the largest
centred box of the input's aspect, less a margin: as if resized to 1.14 times the input and cropped.
A box is read with one antialiased bilinear resampling.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kornia import enhance
from PIL import Image, ImageOps
from torch import Tensor

from nasattn.data import Batch, Shape
from nasattn.errors import DataFailed, Stopped

Box = tuple[float, float, float, float]

MARGIN = 1.14  # 256 / 224, rounded: what is resized to, over what is cropped from it
AREA, ASPECT, COLOR = (0.08, 1.0), (3 / 4, 4 / 3), (0.6, 1.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images that are read from their files a batch at a time."""

    paths: Sequence[Path]
    labels: Tensor
    input: Shape
    mean: Tensor
    std: Tensor
    augment: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = [i % len(self) for i in indices]
        rngs = [None if self.augment == "none" else np.random.default_rng(i) for i in indices]
        x = torch.stack([self._read(self.paths[r], rng) for r, rng in zip(rows, rngs, strict=True)])
        if self.augment == "crop_flip_color":
            x = _recolor(x, [rng for rng in rngs if rng])
        return (x - self.mean) / self.std, self.labels[rows]

    def _read(self, path: Path, rng: np.random.Generator | None) -> Tensor:
        """float32 (C, H, W) in [0, 1]; centred without rng, else a random box, perhaps mirrored."""
        channels, height, width = self.input
        try:
            image = decode(path, channels)
        except Exception as error:  # a decoder may raise anything on a damaged file
            if not os.path.isfile(path):  # Path's own raises for a network that is gone
                lost = path if os.path.isdir(path.parent) else f"the folder {path.parent}"
                raise Stopped(
                    f"{lost} is not there any more: put it back, the same command goes on"
                ) from error
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataFailed(f"{path} could be read before, now it cannot: {why}") from error
        box = _centre(image.size, self.input) if rng is None else _crop(image.size, self.input, rng)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
        if rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1].copy()
        return torch.from_numpy(pixels).permute(2, 0, 1).expand(channels, height, width)


def decode(path: Path, channels: int) -> Image.Image:
    """The picture upright (by its EXIF orientation), values 0 to 255: L or RGB, for 1 or 3
    channels; F for 16-bit grey, which keeps its depth.

    What is transparent lies on white: cut-outs and drawings are made for a light page, and black
    ink would vanish on black. Colour profiles are not applied. Of an animation it is the first
    frame. Floating point and 32-bit grey have no agreed range and are refused by a ValueError; a
    damaged file raises whatever its decoder does.
    """
    with Image.open(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _sixteen_bits(image)
        picture: Image.Image = image
        if image.has_transparency_data:
            page = Image.new("RGBA", image.size, "white")
            picture = Image.alpha_composite(page, image.convert("RGBA"))
        picture = picture.convert("RGB")  # to grey only from here: Pillow has no way from LAB to L
        return picture.convert("L") if channels == 1 else picture


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion to 8 bits clips at 255; this one scales."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"mode {image.mode} has no agreed range; save it with 8 or 16 bits")
    return Image.fromarray(pixels.astype(np.float32) / 257)


def _centre(size: tuple[int, int], input: Shape) -> Box:
    """The box (left, top, right, bottom) of validation in an image of (width, height)."""
    _, height, width = input
    scale = MARGIN * max(width / size[0], height / size[1])
    w, h = width / scale, height / scale
    left, top = (size[0] - w) / 2, (size[1] - h) / 2
    return left, top, left + w, top + h


def _crop(size: tuple[int, int], input: Shape, rng: np.random.Generator) -> Box:
    """A random box of training; after ten that did not fit, the largest centred one."""
    w, h = size
    own = input[2] / input[1]
    for _ in range(10):
        area = w * h * rng.uniform(*AREA)
        aspect = own * np.exp(rng.uniform(*np.log(ASPECT)))
        width, height = float(np.sqrt(area * aspect)), float(np.sqrt(area / aspect))
        if width <= w and height <= h:
            left, top = rng.uniform(0, w - width), rng.uniform(0, h - height)
            return left, top, min(left + width, w), min(top + height, h)
    width, height = min(w, h * own), min(h, w / own)
    left, top = (w - width) / 2, (h - height) / 2
    return left, top, left + width, top + height


def _recolor(x: Tensor, rngs: Iterable[np.random.Generator]) -> Tensor:
    """Each image of x (N, C, H, W), in [0, 1], with its own brightness, contrast and saturation."""
    factors = torch.tensor(np.array([rng.uniform(*COLOR, size=3) for rng in rngs]), dtype=x.dtype)
    brightness, contrast, saturation = factors.unbind(1)
    x = enhance.adjust_brightness_accumulative(x, brightness)
    x = enhance.adjust_contrast_with_mean_subtraction(x, contrast)
    return enhance.adjust_saturation_with_gray_subtraction(x, saturation)
