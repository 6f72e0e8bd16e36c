"""Cued digits: the embedded data set, in which a network must join two distant places.

Four 8x8 digits of real handwriting stand on a 32x64 canvas: one in each 8-pixel row band, each in a
random one of the six 8-pixel cells from column 16 on. A solid 4x4 square at the left edge of one
band is the cue, and the label is the digit in that band. The cue lies in the rows of the digit that
it points to, so attention along rows (criss-cross) is favoured by construction: results here say
nothing about photographs.

The handwriting is scikit-learn's 1,797 digits (part of UCI's Optical Recognition of Handwritten
Digits). They are split first, .70 / .15 / .15 and class by class, so that no digit is seen in two
splits; the writers are not known. The cued digits are balanced over the classes; the cued band, the
cells and the other three digits are uniform. Then comes the noise: to every pixel, in [0, 1], is
added an independent normal variable of standard deviation `noise`; the sum is clipped to [0, 1] and
rounded to 8 bits.

The images are composed once and are the same in every epoch. A seed gives another split of the
handwriting and other images; a split does not depend on the size of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasattn.config import CuedDigits
from nasattn.data import Batch, Data, Shape, stratify
from nasattn.errors import UserError

INPUT: Shape = (1, 32, 64)
CLASSES = 10
CELL = 8  # a digit's height and width: the canvas is 4 bands of 8 cells
BANDS, CELLS, FREE = 4, 8, 2  # the first FREE cells of a band hold no digit
CHUNK = 1024  # images composed at once, so that float32 pixels never take more than a few MB

# Of a pixel at noise .10, so that the network's input has about zero mean and unit variance.
MEAN, STD = 0.082, 0.184


@dataclass(frozen=True, slots=True)
class Composed:
    """Images that are held as bytes. images: uint8 (N, 1, 32, 64); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor([i % len(self) for i in indices])
        return (self.images[rows].float() / 255 - MEAN) / STD, self.labels[rows]


def load(config: CuedDigits, input: Shape, classes: int) -> Data:
    """See nasattn.data.load; the images are kept for the life of the process."""
    if input != INPUT or classes != CLASSES:
        raise UserError(
            f"data.name: cued_digits has images of {list(INPUT)} and {CLASSES} classes, "
            f"but the space says input: {list(input)} and classes: {classes}; "
            f"write input: {list(INPUT)} and classes: {CLASSES} in the space, or name other data"
        )
    train, val, test = _splits(config)
    return Data(classes=CLASSES, input=INPUT, train=train, val=val, test=test)


@lru_cache(maxsize=2)
def _splits(config: CuedDigits) -> tuple[Composed, Composed, Composed]:
    digits, labels = _handwriting()
    ink = (digits / 16).astype(np.float32).reshape(-1, CELL, CELL)
    val, test, train = stratify(labels, (0.15, 0.15), config.seed)
    train_images, val_images, test_images = (
        _compose(
            ink[part], labels[part], count, config.noise, np.random.default_rng([config.seed, i])
        )
        for i, (part, count) in enumerate(
            [(train, config.train), (val, config.val), (test, config.test)]
        )
    )
    return train_images, val_images, test_images


def _handwriting() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Ink (1797, 64), in sixteenths, and classes."""
    # By the file: to load scikit-learn takes half a second, and a search needs nothing else of it.
    spec = find_spec("sklearn")
    if spec and spec.origin:
        file = Path(spec.origin).parent / "datasets/data/digits.csv.gz"
        if file.exists() and (rows := np.loadtxt(file, delimiter=",")).shape == (1797, 65):
            return rows[:, :-1], rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # which knows where it lies by now, and its form

    digits, labels = load_digits(return_X_y=True)
    return digits, labels


def _compose(
    ink: NDArray[np.float32],
    classes: NDArray[np.int64],
    count: int,
    noise: float,
    rng: np.random.Generator,
) -> Composed:
    """`count` images of the digits `ink` (D, 8, 8), whose classes are given."""
    labels = np.arange(count) % CLASSES
    cued = rng.integers(BANDS, size=count)
    cells = rng.integers(FREE, CELLS, size=(count, BANDS))
    chosen = rng.integers(len(ink), size=(count, BANDS))
    for label in range(CLASSES):
        (rows,) = np.nonzero(labels == label)
        chosen[rows, cued[rows]] = rng.choice(np.flatnonzero(classes == label), len(rows))
    images = np.empty((count, 1, *INPUT[1:]), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        n = np.arange(len(cued[part]))
        canvas = np.zeros((len(n), BANDS, CELL, CELLS, CELL), np.float32)
        canvas[n[:, None], np.arange(BANDS), :, cells[part]] = ink[chosen[part]]
        canvas[n, cued[part], 2:6, 0, :4] = 1
        canvas += noise * rng.standard_normal(canvas.shape, np.float32)
        pixels = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
        images[part] = pixels.reshape(-1, *INPUT)
    return Composed(torch.from_numpy(images), torch.from_numpy(labels))
