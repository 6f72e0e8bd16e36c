"""The data sets: what the pictures hold, who sees which of them, and what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets
from sklearn.datasets import load_digits

from nasattn.config import CuedDigits, ImageFolder
from nasattn.data import Data, Split, cued_digits, image_folder, load, stratify
from nasattn.data.cued_digits import MEAN, STD
from nasattn.data.images import decode
from nasattn.errors import DataFailed, Stopped, UserError

CUED = ((1, 32, 64), 10)


def everything(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return split.__getitems__(range(len(split)))


# --- cued digits ---


def cued(**options: float) -> Data:
    sizes = {"train": 300, "val": 120, "test": 120}
    return load(CuedDigits.model_validate({"name": "cued_digits"} | sizes | options), *CUED)


def pixels(split: Split) -> np.ndarray:
    """(N, 32, 64) in [0, 1]."""
    return np.asarray(everything(split)[0] * STD + MEAN)[:, 0]


def read(picture: np.ndarray, known: dict[bytes, int]) -> tuple[int, list[int]]:
    """The cued band of a picture without noise, and scikit-learn's number of each band's digit."""
    (cue,) = [b for b in range(4) if picture[8 * b : 8 * b + 8, :8].any()]
    square = np.zeros((8, 8))
    square[2:6, :4] = 1
    np.testing.assert_allclose(picture[8 * cue : 8 * cue + 8, :8], square, atol=1e-6)
    found = []
    for band in range(4):
        row = picture[8 * band : 8 * band + 8]
        cells = [c for c in range(16, 64, 8) if row[:, c : c + 8].any()]
        assert len(cells) == 1 and not row[:, 8:16].any()
        digit = np.rint(row[:, cells[0] : cells[0] + 8] * 16).astype(np.uint8)
        found.append(known[digit.tobytes()])
    return cue, found


@pytest.fixture(scope="module")
def known() -> dict[bytes, int]:
    images = load_digits().images.astype(np.uint8)
    assert len({image.tobytes() for image in images}) == 1797
    return {image.tobytes(): i for i, image in enumerate(images)}


def test_cued_digits_say_what_the_cue_points_to_and_share_no_handwriting(
    known: dict[bytes, int],
) -> None:
    classes = load_digits().target
    data = cued(noise=0)
    seen: list[set[int]] = []
    for split in (data.train, data.val, data.test):
        readings = [read(picture, known) for picture in pixels(split)]
        labels = everything(split)[1]
        assert [classes[found[cue]] for cue, found in readings] == labels.tolist()
        assert set(np.bincount(labels)) == {len(split) // 10}
        bands = np.bincount([cue for cue, _ in readings], minlength=4)
        assert bands.min() > len(split) / 8
        seen.append({i for _, found in readings for i in found})
    assert seen[0].isdisjoint(seen[1] | seen[2]) and seen[1].isdisjoint(seen[2])
    assert min(map(len, seen)) > 150


def test_the_handwriting_is_what_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_digits(return_X_y=True)
    loaded: list[bool] = []
    monkeypatch.setattr(datasets, "load_digits", lambda **_: loaded.append(True) or expected)
    for changed in ("", "place", "form"):  # scikit-learn promises neither
        loaded.clear()
        with monkeypatch.context() as patch:
            if changed == "place":
                patch.setattr(Path, "exists", lambda self: False)
            if changed == "form":
                patch.setattr(np, "loadtxt", lambda *_, **__: np.zeros((1797, 66)))
            for found, wanted in zip(cued_digits._handwriting(), expected, strict=True):
                np.testing.assert_array_equal(found, wanted, strict=True)
        assert bool(loaded) == bool(changed)


def test_cued_digits_noise_is_a_clipped_normal_variable() -> None:
    clean, noisy = pixels(cued(noise=0).train), pixels(cued(noise=0.1).train)
    middle = (clean > 0.4) & (clean < 0.6)
    added = (noisy - clean)[middle]
    assert abs(added.mean()) < 0.004 and abs(added.std() - 0.1) < 0.004
    dark = noisy[clean == 0]
    assert (
        abs((dark == 0).mean() - 0.5) < 0.02 and abs(dark.mean() - 0.1 / np.sqrt(2 * np.pi)) < 1e-3
    )
    assert noisy.min() == pytest.approx(0, abs=1e-6) and noisy.max() == pytest.approx(1, abs=1e-6)


def test_cued_digits_are_normalised_float_batches() -> None:
    x, y = cued().train.__getitems__([7, 3, 300 + 7])
    assert (x.shape, x.dtype, y.dtype) == ((3, 1, 32, 64), torch.float32, torch.int64)
    assert torch.equal(x[0], x[2]) and y.tolist() == [7, 3, 7]
    x, _ = everything(cued().train)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05


def test_cued_digits_depend_on_the_seed_and_on_nothing_else(known: dict[bytes, int]) -> None:
    first, second = (pixels(cued(seed=seed, noise=0, val=900).val) for seed in (1, 2))
    cued(seed=3), cued(seed=4)  # push them out of the cache
    assert np.array_equal(first, pixels(cued(seed=1, noise=0, train=50, val=900).val))
    readings = [[read(picture, known) for picture in pictures] for pictures in (first, second)]
    cues = [[cue for cue, _ in reading] for reading in readings]
    assert cues[0] != cues[1]
    digits = [{i for _, found in reading for i in found} for reading in readings]
    assert len(digits[0] & digits[1]) < 80  # of 270 each: two independent splits share about 40


@pytest.mark.parametrize("space", [((3, 32, 64), 10), ((1, 32, 64), 7)])
def test_cued_digits_refuse_another_space(space: tuple[tuple[int, int, int], int]) -> None:
    with pytest.raises(
        UserError, match=r"\[1, 32, 64\] and 10 .*says input: .* classes: \d+; write"
    ):
        load(CuedDigits(name="cued_digits"), *space)


# --- loaders and splitting ---


def test_training_batches_depend_on_seed_and_epoch() -> None:
    data = cued(train=100, noise=0)

    def order(seed: int, epoch: int) -> torch.Tensor:
        loader = data.loader("train", 32, seed)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert [len(y) for _, y in batches] == [32, 32, 32]
        return torch.cat([x for x, _ in batches])

    assert torch.equal(order(0, 0), order(0, 0))
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert len(torch.unique(orders[0], dim=0)) == 96


def test_validation_is_in_order_and_whole() -> None:
    data = cued(val=70)
    labels = torch.cat([y for _, y in data.loader("val", 32, 5)])
    assert torch.equal(labels, everything(data.val)[1])


def test_loading_leaves_the_global_random_state_alone() -> None:
    data = cued()
    before = torch.get_rng_state()
    for split in ("train", "val"):
        list(data.loader(split, 64, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_a_train_split_below_one_batch_is_refused() -> None:
    data = cued(train=40)
    with pytest.raises(UserError, match=r"batch_size: got 64.*40 images.*up to 40"):
        data.loader("train", 64, 0)
    assert len(data.loader("train", 40, 0)) == 1


def test_stratify_gives_each_class_its_shares() -> None:
    labels = np.repeat([0, 1, 2], [100, 18, 3])
    groups = stratify(labels, (0.15, 0.3), 0)
    assert sorted(np.concatenate(groups)) == list(range(121))
    assert [np.bincount(labels[g]).tolist() for g in groups] == [
        [15, 3, 1],
        [30, 5, 1],
        [55, 10, 1],
    ]
    assert not np.array_equal(groups[0], stratify(labels, (0.15, 0.3), 1)[0])
    for size, counts in ((1, [0, 0, 1]), (2, [1, 0, 1]), (3, [1, 1, 1])):
        few = stratify(np.zeros(size, np.int64), (0.15, 0.3), 0)
        assert [len(group) for group in few] == counts, "there is always one to train on"


# --- image folder ---


def write(path: Path, color: int | tuple[int, ...] = 100, mode: str = "L", size: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), color).save(path)
    return path


def fill(root: Path, counts: dict[str, int]) -> Path:
    """Pictures `root/FOLDER/00.png`, ..., each of another grey."""
    for folder, count in counts.items():
        for i in range(count):
            with write(root / folder / f"{i:02}.png", color=i).open("ab") as file:
                file.write(folder.encode())  # behind the picture: no two files are equal
    return root


def test_the_digest_is_that_of_the_splits_lists(tmp_path: Path) -> None:
    """Not of where they lie, nor of what cannot be read, which moves no other from its split."""
    counts = {f"{split}/{name}": 4 for split in ("train", "val", "test") for name in "ab"}
    home = fill(tmp_path / "one", counts)
    fill(tmp_path / "two", counts)
    first = folder(home).facts
    assert first["files"] == 24 and first["names"] == ["a", "b"]
    assert folder(tmp_path / "two").facts == first
    whole = (home / "train/a/00.png").read_bytes()
    (home / "train/a/00.png").write_bytes(b"broken")
    broken = folder(home, bad=0.5).facts
    assert broken["read"] != first["read"] and broken["readable"] == 23
    readable = ("read", "readable", "contents")
    assert {k: v for k, v in broken.items() if k not in readable} == {
        k: v for k, v in first.items() if k not in readable
    }
    (home / "train/a/00.png").write_bytes(b"nothing")
    assert folder(home, bad=0.5).facts["contents"] == broken["contents"], "of what is not read"
    (home / "train/a/00.png").write_bytes(whole)
    assert folder(home).facts == first
    (home / "train/a/00.png").rename(home / "val/a/99.png")
    moved = folder(home).facts
    assert moved["files"] == 24 and moved["digest"] != first["digest"]
    (home / "val/a/99.png").rename(home / "train/a/99.png")
    renamed = folder(home).facts["digest"]
    assert len({first["digest"], moved["digest"], renamed}) == 3
    drawn = fill(tmp_path / "all", {"a": 20, "b": 20})
    assert folder(drawn, seed=0).facts["digest"] != folder(drawn, seed=1).facts["digest"]


def folder(
    root: Path,
    classes: int = 2,
    channels: int = 1,
    shape: tuple[int, int] = (8, 8),
    **options: object,
) -> Data:
    """Pixels as they are, unless the options say otherwise."""
    fields = {"name": "image_folder", "root": root, "mean": (0.0,), "std": (1.0,)} | options
    return load(ImageFolder.model_validate(fields), (channels, *shape), classes)


def greys(split: Split) -> list[int]:
    """Which pictures of `fill` a split holds."""
    return [int(v) for v in (everything(split)[0][:, 0, 0, 0] * 255).round()]


SPLITS = {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 1, "test/b": 1}


def palette(path: Path, **options: object) -> None:
    image = Image.new("P", (12, 12), 1)
    image.putpalette([9, 9, 9, 200, 100, 0])
    image.save(path, **options)


def deep(path: Path, value: int, kind: type[np.generic]) -> None:
    Image.fromarray(np.full((12, 12), value, kind)).save(path)


HALF = 128 / 255

# How a file is written, and the red, green and blue that must be read, over white.
MODES: dict[str, tuple[Callable[[Path], object], tuple[float, float, float]]] = {
    "grey.png": (lambda p: write(p, 100, "L"), (100, 100, 100)),
    "grey.JPG": (lambda p: write(p, 100, "L"), (100, 100, 100)),
    "bit.png": (lambda p: write(p, 1, "1"), (255, 255, 255)),
    "rgb.png": (lambda p: write(p, (200, 100, 0), "RGB"), (200, 100, 0)),
    "rgb.webp": (lambda p: write(p, (100, 100, 100), "RGB"), (100, 100, 100)),
    "rgba.png": (
        lambda p: write(p, (200, 100, 0, 128), "RGBA"),
        tuple(v * HALF + 255 * (1 - HALF) for v in (200, 100, 0)),
    ),
    "la.png": (lambda p: write(p, (100, 0), "LA"), (255, 255, 255)),
    "palette.png": (palette, (200, 100, 0)),
    "palette.gif": (palette, (200, 100, 0)),
    "key.png": (lambda p: palette(p, transparency=1), (255, 255, 255)),
    "key.gif": (lambda p: palette(p, transparency=1), (255, 255, 255)),
    "alphas.png": (
        lambda p: palette(p, transparency=bytes([255, 128])),
        tuple(v * HALF + 255 * (1 - HALF) for v in (200, 100, 0)),
    ),
    "rgb_key.png": (
        lambda p: Image.new("RGB", (12, 12), (1, 2, 3)).save(p, transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "cmyk.tif": (
        lambda p: write(p, (51, 102, 153, 51), "CMYK"),
        tuple((255 - v) * 0.8 for v in (51, 102, 153)),
    ),
    "cmyk.jpg": (
        lambda p: write(p, (51, 102, 153, 51), "CMYK"),
        tuple((255 - v) * 0.8 for v in (51, 102, 153)),
    ),
    "ycbcr.jpg": (lambda p: write(p, (100, 128, 128), "YCbCr"), (100, 100, 100)),
    "lab.tif": (lambda p: write(p, (136, 128, 128), "LAB"), (127, 127, 127)),
    "deep.png": (lambda p: deep(p, 25700, np.uint16), (100, 100, 100)),
    "deep.tif": (lambda p: deep(p, 25700 + 64, np.uint16), (100.25, 100.25, 100.25)),
    "deep_int.tif": (lambda p: deep(p, 25700, np.int32), (100, 100, 100)),
}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_image_is_read_to_its_values(tmp_path: Path, channels: int) -> None:
    fill(tmp_path, {"train/a": 2, "train/b": 2, "val/b": 1})
    (tmp_path / "val/a").mkdir()
    for name, (writer, _) in MODES.items():
        writer(tmp_path / "val/a" / name)
    data = folder(tmp_path, channels=channels, bad=0.9)
    x, y = everything(data.val)
    assert y.tolist() == [0] * len(MODES) + [1], data.notes
    for name, got in zip(sorted(MODES), x * 255, strict=False):
        red, green, blue = MODES[name][1]
        wanted = (red, green, blue)
        if channels == 1:
            wanted = (0.299 * red + 0.587 * green + 0.114 * blue,)
        close = 4 if name.lower().endswith(("jpg", "webp", "lab.tif")) else 1.01
        close = 0.01 if name.startswith("deep") else close
        for channel, value in zip(got, wanted, strict=True):
            np.testing.assert_allclose(channel, value, atol=close, err_msg=name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path: Path, orientation: int) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    read = np.asarray(decode(tmp_path / "a.png", 1))
    np.testing.assert_array_equal(read, upright[orientation])


def ramps(path: Path, width: int, height: int) -> None:
    """Red is the column, green the row."""
    row, column = np.mgrid[:height, :width]
    path.parent.mkdir(parents=True)
    Image.fromarray(np.stack([column, row, row * 0], -1).astype(np.uint8)).save(path)


def ramped(root: Path, height: int, **options: object) -> Data:
    """One picture, 200 wide, for each split, read 16 high and 32 wide."""
    for split in ("train", "val", "test"):
        ramps(root / split / "a/0.png", 200, height)
    return folder(root, classes=1, channels=3, shape=(16, 32), **options)


def test_validation_is_a_centred_crop_after_a_resize_of_the_short_side(tmp_path: Path) -> None:
    data = ramped(tmp_path / "usual", 160, augment="crop_flip")
    plain = ramped(tmp_path / "plain", 160, augment="none")
    for split in (data.val, data.test, plain.train):
        x = everything(split)[0][0] * 255
        step = 200 / (32 * 1.14)  # source pixels for one of the input: the width is the short side
        rows, columns = (torch.arange(16) - 7.5) * step, (torch.arange(32) - 15.5) * step
        torch.testing.assert_close(x[0, 8], 99.5 + columns, atol=0.6, rtol=0)
        torch.testing.assert_close(x[1, :, 8], 79.5 + rows, atol=0.6, rtol=0)


def test_training_crops_have_the_usual_areas_and_aspects_and_half_are_mirrored(
    tmp_path: Path,
) -> None:
    data = ramped(tmp_path, 100, augment="crop_flip")
    x, _ = data.train.__getitems__(range(300))  # 300 draws of the one picture
    inner = x[:, :, 4:12, 4:28] * 255  # away from the edges, where resampling flattens a ramp
    width = (inner[:, 0, 4, -1] - inner[:, 0, 4, 0]) * 32 / 23
    height = (inner[:, 1, -1, 4] - inner[:, 1, 0, 4]) * 16 / 7
    assert 0.4 < (width < 0).float().mean() < 0.6
    left = inner[:, 0].mean((1, 2)) + 0.5 - width.abs() / 2
    top = inner[:, 1].mean((1, 2)) + 0.5 - height / 2
    assert -1 < left.min() < 5 and 80 < left.max() < 200 * 0.8
    assert -1 < top.min() < 5 and 40 < top.max() < 100 * 0.8
    area, aspect = width.abs() * height / (200 * 100), width.abs() / height / (32 / 16)
    assert 0.07 < area.min() < 0.12 and 0.6 < area.max() < 1.02
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37


def test_colors_change_image_by_image(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path / split / "a/0.png", (128, 77, 77), "RGB")
    x, _ = folder(tmp_path, classes=1, channels=3, augment="crop_flip_color").train.__getitems__(
        range(100)
    )
    assert x.flatten(2).std(-1).max() < 1e-6  # the picture has one colour, and keeps one
    red, green, blue = x[..., 0, 0].T
    brightness = (0.299 * red + 0.587 * green + 0.114 * blue) / (92.2 / 255)
    colour = (red - green) / (51 / 255) / brightness  # contrast times saturation
    assert torch.equal(green, blue)
    assert 0.59 < brightness.min() < 0.65 and 1.35 < brightness.max() < 1.41
    assert 0.35 < colour.min() < 0.6 and 1.4 < colour.max() < 1.97


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 1), ("test", 1)):
        for i in range(count):
            ramps(tmp_path / split / f"a/{i}/{i}.png", 40 + i, 30)  # a size, so a picture, each

    def epoch(number: int, seed: int = 0, batch: int = 4, loaders: int = 0) -> torch.Tensor:
        data = folder(tmp_path, classes=1, channels=3, augment="crop_flip_color", loaders=loaders)
        loader = data.loader("train", batch, seed)
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return torch.cat([x for x, _ in loader])

    first = epoch(0)
    assert torch.equal(first, epoch(0, batch=2))
    assert torch.equal(first, epoch(0, loaders=2))
    assert not torch.isin(first, epoch(1)).flatten(1).all(1).any()
    assert not torch.isin(first, epoch(0, seed=1)).flatten(1).all(1).any()


def test_split_by_the_seed_is_stratified_and_disjoint(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 40, "b": 20})
    data = folder(tmp_path, val=0.2, test=0.1, augment="none")
    parts = [data.train, data.val, data.test]
    assert [np.bincount(everything(p)[1]).tolist() for p in parts] == [[28, 14], [8, 4], [4, 2]]
    held = [list(zip(greys(p), everything(p)[1].tolist(), strict=True)) for p in parts]
    assert len({*held[0], *held[1], *held[2]}) == 60
    other = folder(tmp_path, val=0.2, test=0.1, augment="none", seed=1)
    assert greys(other.val) != greys(data.val)
    (tmp_path / "a/39.png").write_bytes(b"")
    (tmp_path / "b/00.png").write_bytes(b"")
    after = folder(tmp_path, val=0.2, test=0.1, augment="none", bad=0.1)
    for before, part in zip(held, [after.train, after.val, after.test], strict=True):
        assert set(zip(greys(part), everything(part)[1].tolist(), strict=True)) <= set(before)


def test_without_a_test_folder_a_share_of_train_is_the_test_split(tmp_path: Path) -> None:
    fill(tmp_path, {"train/a": 20, "train/b": 10, "val/a": 3, "val/b": 3})
    data = folder(tmp_path, test=0.2, augment="none")
    assert np.bincount(everything(data.test)[1]).tolist() == [4, 2]
    assert sorted(greys(data.train) + greys(data.test)) == sorted([*range(20), *range(10)])
    assert len(data.val) == 6
    assert "no test folder: 0.2 of the images in train, drawn by seed 0" in data.notes[0]


def test_hidden_nested_and_other_files_are_handled(tmp_path: Path) -> None:
    fill(tmp_path, SPLITS)
    write(tmp_path / "train/a/more/deeper/x.PNG", 77)
    write(tmp_path / "train/.thumbnails/y.png")
    write(tmp_path / "train/a/.hidden.png")
    write(tmp_path / "train/stray.png")
    for name in ("train/a/.DS_Store", "train/a/Thumbs.db", "val/b/labels.TXT", "val/b/LICENSE"):
        (tmp_path / name).write_text("no image")
    data = folder(tmp_path, augment="none")
    assert greys(data.train) == [0, 1, 2, 3, 77, 0, 1, 2, 3]
    assert data.notes == [
        "passed over, as no images of a class: 1 .db, 1 .txt, 1 no extension, "
        "1 outside the class folders"
    ]


def broken(root: Path) -> list[str]:
    """A data set of 24 images, and three broken ones in it."""
    fill(root, {"train/a": 8, "train/b": 8, "val/a": 4, "val/b": 4, "test/a": 1, "test/b": 1})
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(255, size=(64, 64, 3), dtype=np.uint8)).save(root / "full.png")
    whole = (root / "full.png").read_bytes()
    (root / "full.png").unlink()
    (root / "train/a/00.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/b/00.png").write_text("this is no image")
    (root / "val/a/00.png").unlink()
    deep(root / "val/a/00.tif", 1, np.float32)
    return ["train/a/00.png", "train/b/00.png", "val/a/00.tif"]


def test_broken_files_are_named_and_left_out_up_to_a_share(tmp_path: Path) -> None:
    names = broken(tmp_path)
    data = folder(tmp_path, bad=3 / 26, augment="none")
    assert (len(data.train), len(data.val), len(data.test)) == (14, 7, 2)
    (note,) = data.notes
    assert note.startswith("3 of 26 images cannot be read") and all(name in note for name in names)
    assert "no agreed range" in note and "truncated" in note
    with pytest.raises(UserError, match=r"3 of 26 images") as refusal:
        folder(tmp_path, bad=0.11)
    message = str(refusal.value)
    assert all(name in message for name in names)
    assert "data.bad: got 0.11;" in message and "write bad: 0.1154 to" in message
    assert len(folder(tmp_path, bad=0.1154).train) == 14


def test_ten_broken_files_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    fill(tmp_path, SPLITS)
    for i in range(13):
        (tmp_path / f"train/a/x{i:02}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"x09.jpg: .*\n  and 3 more\n") as refusal:
        folder(tmp_path)
    assert "x10" not in str(refusal.value)


def test_a_file_that_breaks_later_fails_the_trial_by_name(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, SPLITS))
    (tmp_path / "train/b/02.png").write_bytes(b"gone")
    with pytest.raises(DataFailed, match=r"^/\S*/train/b/02\.png could be .*cannot: cannot ident"):
        list(data.loader("train", 8, 0))


def test_a_file_or_a_folder_that_goes_away_ends_the_search(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, SPLITS))
    (tmp_path / "train/b/02.png").unlink()
    with pytest.raises(Stopped, match=r"^/\S*/train/b/02\.png is not there any more: put it back"):
        list(data.loader("train", 8, 0))
    (tmp_path / "train").rename(tmp_path / "unmounted")
    with pytest.raises(Stopped, match=r"the folder .*train.* is not there any more"):
        list(data.loader("train", 8, 0))


def test_a_long_check_is_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoded: list[str] = []
    check = image_folder._check
    monkeypatch.setattr(image_folder, "_check", lambda p: decoded.append(p.name) or check(p))
    root = fill(tmp_path / "images", SPLITS)
    (root / "val/b/01.png").write_bytes(b"")
    facts = folder(root, bad=0.5).facts
    assert len(decoded) == 14 and not (tmp_path / "cache").exists()
    monkeypatch.setattr(image_folder, "SLOW", -1.0)
    folder(root, bad=0.5)
    decoded.clear()
    assert folder(root, bad=0.5).facts == facts
    assert decoded == ["01.png"]  # what is broken is looked at each time
    (memory,) = (tmp_path / "cache/nasattn").iterdir()
    memory.write_text(json.dumps(list(json.loads(memory.read_text()))))
    decoded.clear()
    folder(root, bad=0.5)
    assert len(decoded) == 14, "an earlier version's says nothing of the contents"
    decoded.clear()
    folder(root, bad=0.5)
    os.utime(root / "val/a/00.png", ns=(1, 1))
    folder(root, bad=0.5)
    assert sorted(decoded) == ["00.png", "01.png", "01.png"]


def test_what_is_judged_by_images_of_the_training_is_told(tmp_path: Path) -> None:
    """By copies, by links, and by a whole split that leads to another."""
    root = fill(tmp_path / "images", SPLITS)
    assert not any("byte for byte" in note for note in folder(root).notes)
    shutil.copy(root / "train/b/02.png", root / "test/b/copy.png")
    (root / "test/a/link.png").symlink_to(root / "train/a/00.png")
    (note,) = (note for note in folder(root).notes if "byte for byte" in note)
    total = SPLITS["test/a"] + SPLITS["test/b"] + 2
    assert note.startswith(f"2 of {total} images of test are in train as well, byte for byte (")
    assert "(test/a/link.png is train/a/00.png)" in note
    assert not any("of a class" in note for note in folder(root).notes)
    shutil.copy(root / "val/a/00.png", root / "val/b/same.png")
    (note,) = (note for note in folder(root).notes if "of a class" in note)
    assert note == (
        "1 image of a class is in another as well, byte for byte (val/b/same.png is val/a/00.png)"
    )
    shutil.copy(root / "train/a/01.png", root / "val/b/other.png")
    notes = folder(root).notes
    assert not any("of val are in train" in note for note in notes), "that is no flattery"
    assert sum("2 images of a class are in another" in note for note in notes) == 1
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")
    notes = [note for note in folder(root).notes if "are in train as well" in note]
    assert [note.split(" images")[0] for note in notes] == ["8 of 8", "2 of 4"]


@pytest.mark.parametrize(
    "names", [("train", "validation"), ("Train", "Val", "Test"), ("train", "valid", "test")]
)
def test_splits_of_other_names_are_not_taken_for_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    fill(tmp_path, {f"{split}/{name}": 4 for split in names for name in "ab"})
    with pytest.raises(UserError, match=r"look like splits .* names are train, val and test"):
        folder(tmp_path, classes=len(names))


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    home = fill(tmp_path, {"dev/x": 9, "test/x": 9, "test/y": 3})
    assert folder(home).facts["names"] == ["dev", "test"]


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    home = fill(tmp_path, {"a": 9, "b": 9})
    for above in ("..", "../..", "."):
        (home / "a" / "loop").symlink_to(above)
        with pytest.raises(UserError, match=r"the link .*a/loop leads to a folder that it lies in"):
            folder(home)
        (home / "a" / "loop").unlink()
    (home / "a" / "loop").symlink_to("..")
    (home / "a" / "loop").unlink()
    fill(tmp_path.with_name("far"), {"more": 3})
    (home / "a" / "more").symlink_to(tmp_path.with_name("far") / "more")
    assert folder(home).facts["files"] == 21


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, listed = fill(tmp_path, SPLITS), Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path.name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"data.root: .*/train/b cannot be read: Permission denied"):
        folder(home)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_normalisation_is_of_pixels_up_to_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}: got 123; pixels are from 0 to 1"):
        folder(fill(tmp_path, SPLITS), **{key: (123.0,)})


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")
    with pytest.raises(UserError, match=r"one is a file; allowed: a folder"):
        folder(tmp_path / "one")


def test_a_class_missing_in_val_is_noted(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, {**SPLITS, "val/b": 0}))
    assert data.notes == ["val has no image of the class b: its accuracy says nothing of it"]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (SPLITS, {"classes": 3}, r"class folders in .*train: 2 \(a, b\), but .* classes: 3; write"),
        ({"a": 5}, {"classes": 2}, r"has one class folder \(a\), and nothing to tell it from"),
        ({}, {}, r"has no class folders; allowed: ROOT/CLASS/\*\.jpg, or ROOT/train/CLASS"),
        ({"train/a": 2, "train/b": 2}, {}, "has train/ but no val/; add val/"),
        ({**SPLITS, "val/aa": 1}, {}, r"val/ has the class 'aa'.*did you mean 'a'\?"),
        ({"a": 9, "b": 0}, {}, "no image to train on for the class b; add images"),
        (
            {"a": 9, "b": 0},
            {"classes": 1},
            r"class folders in .*: 2 \(a, b\).*; there is nothing in b$",
        ),
        (SPLITS, {"size": 9}, r"data.size: got 9, .* says input: \[1, 8, 8\]; leave size out"),
        (
            SPLITS,
            {"mean": (0.5, 0.5, 0.5)},
            r"data.mean: got 3 numbers, .*; allowed: 1 number$",
        ),
        (SPLITS, {"channels": 2}, r"the space says \[2, 8, 8\]; images have 1 \(grey\) or 3"),
    ],
)
def test_what_disagrees_is_refused(
    tmp_path: Path, counts: dict[str, int], options: dict[str, object], message: str
) -> None:
    for name in counts:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        folder(fill(tmp_path, counts), **options)  # type: ignore[arg-type]


def test_an_empty_class_folder_or_split_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {**SPLITS, "val/a": 0, "val/b": 0})
    (tmp_path / "val/a").mkdir(parents=True)
    with pytest.raises(UserError, match="no image for the split val"):
        folder(tmp_path)
    (tmp_path / "train/c").mkdir()
    with pytest.raises(UserError, match="no image to train on for the class c"):
        folder(tmp_path, classes=3)


def test_a_missing_root_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(UserError, match=r"no folder .*flower; did you mean 'flowers'\?"):
        folder(tmp_path / "flower")


def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val and test take 0.5 \+ 0.5 .* together below 1"):
        folder(tmp_path, val=0.5, test=0.5)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, {"train": 8, "bus": 8}))
    assert len(data.train) + len(data.val) + len(data.test) == 16


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (1, (0.449,), (0.226,))],
)
def test_pixels_are_normalised_as_for_imagenet_unless_said(
    tmp_path: Path, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    fields = {"name": "image_folder", "root": tmp_path, "mean": 0.5, "std": "1e-1"}
    one = ImageFolder.model_validate(fields)
    assert (one.mean, one.std) == ((0.5,), (0.1,))
    data = folder(fill(tmp_path, SPLITS), channels=channels, mean=None, std=None)
    x, _ = data.val.__getitems__([1])
    wanted = (1 / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(x[0, :, 4, 4], wanted)
