"""The data: three splits of images and their labels. Each source is one file that offers `load`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nasattn.config import CuedDigits, ImageFolder
from nasattn.errors import UserError

Batch = tuple[Tensor, Tensor]
Shape = tuple[int, int, int]
SplitName = Literal["train", "val", "test"]


class Split(Protocol):
    """The images of one split, composed or read a batch at a time. labels: int64 (N,)."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """x: float32 (N, C, H, W), normalised; y: int64 (N,).

        Index i is one draw of sample i % len: all that is random about it (the augmentation) is
        seeded with i, so it depends neither on the batch nor on the worker that it falls to.
        """
        ...


class Shuffled(Sampler[int]):
    """Every sample once, in an order and as draws (see Split) that depend on (seed, epoch) alone.

    Lightning calls `set_epoch` before each epoch; its count starts at 0 also where a training goes
    on, then `first` epochs are added to it.
    """

    def __init__(self, size: int, seed: int, first: int = 0) -> None:
        self.size, self.seed, self.first, self.epoch = size, seed, first, first

    def set_epoch(self, epoch: int) -> None:
        self.epoch = self.first + epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        draw = int(rng.integers(2**62))
        return iter([draw * self.size + i for i in rng.permutation(self.size).tolist()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What networks are trained and judged on. `input` is (C, H, W) of an image, `loaders` the
    number of worker processes that read, `notes` what the user should be told, such as files that
    were skipped. `facts`: what a study keeps of images that lie elsewhere and may change: how many
    there are and can be read, digests of the splits' lists of either and of what can be read, the
    names of the classes."""

    classes: int
    input: Shape
    train: Split
    val: Split
    test: Split
    notes: list[str] = field(default_factory=list)
    loaders: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def loader(
        self, split: SplitName, batch_size: int, seed: int, *, first: int = 0
    ) -> DataLoader[Batch]:
        """Batches of (x, y). train: shuffled and augmented anew each epoch by (seed, epoch),
        without the last incomplete batch; val and test: whole and in order. first: epochs done.

        Raises a UserError where train is smaller than one batch.
        """
        images: Split = getattr(self, split)
        train = split == "train"
        if train and len(images) < batch_size:
            raise UserError(
                f"batch_size: got {batch_size}, but the train split has {len(images)} images and "
                f"an incomplete batch is left out; allowed: up to {len(images)}"
            )
        return DataLoader(
            cast("Dataset[Batch]", images),
            batch_size=batch_size,
            sampler=Shuffled(len(images), seed, first) if train else None,
            drop_last=train,
            collate_fn=tuple,  # __getitems__ gives the whole batch: nothing is left to collate
            num_workers=self.loaders,
            persistent_workers=self.loaders > 0,
            # Without a generator of its own each epoch would draw from the global one, and so
            # would change whatever else is random in the training.
            generator=Generator().manual_seed(0),
        )


def load(config: CuedDigits | ImageFolder, input: Shape, classes: int) -> Data:
    """The data of an experiment, for networks that take `input` (C, H, W) and tell `classes` apart.

    Raises a UserError where the data and the space (input, classes) disagree or files are missing.
    """
    if isinstance(config, CuedDigits):
        from nasattn.data import cued_digits

        return cued_digits.load(config, input, classes)
    from nasattn.data import image_folder

    return image_folder.load(config, input, classes)


def stratify(
    labels: NDArray[np.int64], shares: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Sorted indices of one group for each share and, last, of the rest, drawn by the seed.

    Each class gives each group its share, rounded, but at least one sample while it has any. The
    rest gets what is left over; of a class that is too small for all, it gets one first.
    """
    rng = np.random.default_rng(seed)
    groups = [[np.empty(0, np.int64)] for _ in range(len(shares) + 1)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum([max(1, round(share * len(members))) for share in shares])
        cuts = cuts.clip(max=len(members) - 1)
        for group, part in zip(groups, np.split(members, cuts), strict=True):
            group.append(part)
    return [np.sort(np.concatenate(group)) for group in groups]
