"""A user's own images in folders: `root/{train,val,test}/CLASS/`, or `root/CLASS/` split by a seed.

The classes are the folders' names in sorted order; a class's folder is read with all folders in it.
Hidden files and files that are no images by their extension are passed over. Every image is decoded
once before the training: what cannot be decoded is named and left out, up to the share `bad`. What
lies in train and, byte for byte, in val or test as well is told.

train, by `augment`: crop_flip takes a box of .08 to 1 of the area with 3/4 to 4/3 of the input's
own aspect, and mirrors every second image; crop_flip_color also scales brightness, contrast and
saturation by .6 to 1.4 each, in this order. val and test (and train with `none`): the largest
centred box of the input's aspect, less a margin: as if resized to 1.14 times the input and cropped.
A box is read with one antialiased bilinear resampling.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from kornia import enhance
from PIL import Image, ImageOps
from torch import Tensor

from nasattn.config import ImageFolder
from nasattn.data import Batch, Data, Shape, stratify
from nasattn.errors import DataFailed, Stopped, UserError, first_few, suggest
from nasattn.record import counted

Files = list[tuple[Path, int]]
Stamp = tuple[int, int]  # a file's size in bytes, and when it was changed last (ns)
Box = tuple[float, float, float, float]

# What others call the splits; two folders of these names with folders in them are hardly classes.
SPLITS = frozenset("train training val valid validation dev eval test testing".split())
EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
MARGIN = 1.14  # 256 / 224, rounded: what is resized to, over what is cropped from it
AREA, ASPECT, COLOR = (0.08, 1.0), (3 / 4, 4 / 3), (0.6, 1.4)
NAMED = 10  # files named in a message; the rest are counted
SLOW = 10.0  # seconds of checking from which the result is kept for the next run

# ImageNet's mean and deviation; a single channel is their average.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def load(config: ImageFolder, input: Shape, classes: int) -> Data:
    """See nasattn.data.load."""
    mean, std = _checked_normalisation(config, input)
    notes: list[str] = []
    passed_over: Counter[str] = Counter()
    try:
        folders = _folders(config.root)
        names = _names(folders, classes)
        files = {part: _list(folder, names, passed_over) for part, folder in folders.items()}
    except OSError as error:
        raise UserError(f"data.root: {error.filename} cannot be read: {error.strerror}") from None
    if passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        notes.append(f"passed over, as no images of a class: {kinds}")
    splits = _split(files, config, notes)
    stamps = {path: _stamp(path) for part in splits.values() for path, _ in part}
    checked = _checked(stamps, config.root)
    faults = {path: fault for path, (fault, _) in checked.items()}
    contents = {path: content for path, (_, content) in checked.items()}
    notes += _report(faults, config)
    listed = _listed(splits, config.root)
    splits = {name: [file for file in part if not faults[file[0]]] for name, part in splits.items()}
    notes += _check_cover(splits, names, config.root)
    notes += _shared(splits, contents, config.root)
    train, val, test = (
        Images(
            paths=[path for path, _ in splits[name]],
            labels=torch.tensor([label for _, label in splits[name]]),
            input=input,
            mean=mean,
            std=std,
            augment=config.augment if name == "train" else "none",
        )
        for name in ("train", "val", "test")
    )
    return Data(
        classes=classes,
        input=input,
        train=train,
        val=val,
        test=test,
        notes=notes,
        loaders=config.loaders,
        facts={
            "files": len(faults),
            "digest": _digest(listed),
            "readable": sum(map(len, splits.values())),
            "read": _digest(
                [(*row, stamps[config.root / row[1]][0]) for row in _listed(splits, config.root)]
            ),
            "contents": _digest(
                [(row[1], contents[config.root / row[1]]) for row in _listed(splits, config.root)]
            ),
            "names": names,
        },
    )


def _listed(splits: Mapping[str, Files], root: Path) -> list[tuple[str, str, int]]:
    """Each split's files, by their places in the root, and their classes."""
    return [(name, f.relative_to(root).as_posix(), y) for name in splits for f, y in splits[name]]


def _digest(rows: Sequence[tuple[object, ...]]) -> str:
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


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


def normalisation(config: ImageFolder, channels: int) -> tuple[tuple[float, ...], ...]:
    """mean and std, of one number a channel or one for all."""
    pairs = ((config.mean, MEAN), (config.std, STD))
    return tuple(given or (usual if channels == 3 else (sum(usual) / 3,)) for given, usual in pairs)


def _checked_normalisation(config: ImageFolder, input: Shape) -> tuple[Tensor, Tensor]:
    """mean and std as (C, 1, 1); refuses options that disagree with the input."""
    channels, height, width = input
    wrong = []
    if channels not in (1, 3):
        wrong.append(f"input: the space says {list(input)}; images have 1 (grey) or 3 channels")
    if config.size is not None and (height, width) != (config.size, config.size):
        wrong.append(
            f"data.size: got {config.size}, but the space says input: {list(input)}; leave size "
            f"out, or write input: [{channels}, {config.size}, {config.size}] in the space"
        )
    tensors = []
    for name, values in zip(("mean", "std"), normalisation(config, channels), strict=True):
        if len(values) not in (1, channels):
            wrong.append(
                f"data.{name}: got {len(values)} numbers, but the space says input: {list(input)}; "
                f"allowed: 1 number{f' or {channels}' if channels > 1 else ''}"
            )
        if max(values) > 1:
            wrong.append(f"data.{name}: got {max(values):g}; pixels are from 0 to 1: allowed: to 1")
        tensors.append(torch.tensor(values).reshape(-1, 1, 1))
    if wrong:
        raise UserError("\n".join(wrong))
    return tensors[0], tensors[1]


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what is hidden."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders(root: Path) -> dict[str, Path]:
    """Split -> its folder; {"all": root} where the class folders lie in the root itself."""
    if root.exists() and not root.is_dir():
        raise UserError(f"data.root: {root} is a file; allowed: a folder")
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"data.root: there is no folder {root}{suggest(root.name, near)}")
    found = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    others = [p.name for p in _inside(root) if p.is_dir() and p.name not in found]
    if "train" in found and "val" in found:
        return found
    if "train" in found and not others:
        raise UserError(
            f"data.root: {root} has train/ but no val/; add val/ (and test/) with the same class "
            "folders, or put the class folders into the root itself, to have them split by the seed"
        )
    like = [
        path.name
        for path in _inside(root)
        if path.name.lower() in SPLITS and path.is_dir() and any(p.is_dir() for p in _inside(path))
    ]
    if len(like) > 1 and {"train", "training"} & {name.lower() for name in like}:
        raise UserError(
            f"data.root: {root} has {', '.join(like)}, which look like splits that hold the class "
            "folders; the splits' names are train, val and test: rename them, or make links of "
            "these names (as classes they may not have folders in them)"
        )
    return {"all": root}


def _names(folders: Mapping[str, Path], classes: int) -> list[str]:
    """The classes: the folders in train or in the root; as many as the space has."""
    where = folders.get("train") or folders["all"]
    names = [path.name for path in _inside(where) if path.is_dir()]
    if not names:
        raise UserError(
            f"data.root: {where} has no class folders; allowed: ROOT/CLASS/*.jpg, or "
            "ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg"
        )
    if len(names) != classes:
        shown = first_few(names, NAMED)
        empty = [name for name in names if not any(map(_by_name, _visible(where / name)))]
        raise UserError(
            f"data.root: class folders in {where}: {len(names)} ({shown}), but the space "
            f"says classes: {classes}; write classes: {len(names)} in the space, or check the root"
            + (f"; no image is in {first_few(empty, NAMED)}" if empty else "")
        )
    for part, folder in folders.items():
        for path in _inside(folder):
            if path.is_dir() and path.name not in names:
                raise UserError(
                    f"data.root: {part}/ has the class '{path.name}' that train/ has not"
                    f"{suggest(path.name, names)}"
                )
    return names


def _visible(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """Files in a folder and all folders in it, sorted, without what is hidden. above: the folders
    that it lies in, to which no link in it may lead back."""
    above |= {folder.resolve()}
    found: list[Path] = []
    for path in _inside(folder):
        if not path.is_dir():
            found.append(path)
            continue
        inner = path.resolve()
        if path.is_symlink() and any(outer.is_relative_to(inner) for outer in above):
            raise UserError(f"data.root: the link {path} leads to a folder that it lies in")
        found += _visible(path, above)
    return found


def _by_name(path: Path) -> bool:
    """Whether it is an image by its name's extension."""
    return path.suffix.lower() in EXTENSIONS


def _list(folder: Path, names: Sequence[str], passed_over: Counter[str]) -> Files:
    """The images of the class folders in sorted order; counts what else is there by its kind."""
    labels = {name: label for label, name in enumerate(names)}
    files: Files = []
    for path in _visible(folder):
        first, *rest = path.relative_to(folder).parts
        if not _by_name(path):
            passed_over[path.suffix.lower() or "no extension"] += 1
        elif not rest:
            passed_over["outside the class folders"] += 1
        else:
            files.append((path, labels[first]))
    return files


def _split(files: Mapping[str, Files], config: ImageFolder, notes: list[str]) -> dict[str, Files]:
    """The three splits. They are drawn before unreadable files are left out, so that mending a file
    moves no other one from split to split."""
    if "test" in files:
        return dict(files)
    if "all" in files:
        whole, given = files["all"], {}
        shares = {"val": config.val, "test": config.test}
    else:
        whole, given = files["train"], {"val": files["val"]}
        shares = {"test": config.test}
        notes.append(
            f"there is no test folder: {config.test:g} of the images in train, drawn by seed "
            f"{config.seed}, are the test split"
        )
    labels = np.array([label for _, label in whole], np.int64)
    parts = stratify(labels, list(shares.values()), config.seed)
    drawn = dict(zip([*shares, "train"], parts, strict=True))
    return given | {name: [whole[i] for i in part] for name, part in drawn.items()}


def _checked(stamps: Mapping[Path, Stamp], root: Path) -> dict[Path, tuple[str, str]]:
    """Path -> why it cannot be decoded, or "" where it can, and a digest of its bytes.

    Every file is really decoded, unless an earlier run, whose check took long, found it good and
    its size and time of change are still the same.
    """
    name = hashlib.sha256(f"{root} {PIL.__version__}".encode()).hexdigest()[:16]
    memory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nasattn", f"images-{name}.json")
    lines = {path: f"{path} {size} {time}" for path, (size, time) in stamps.items()}
    good = _recall(memory.expanduser())
    new = [path for path in stamps if lines[path] not in good]
    start = time.monotonic()
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; the pixels are what is judged
        looked = dict(zip(new, pool.map(_check, new), strict=True))
    checked = {path: looked.get(path) or ("", good[lines[path]]) for path in stamps}
    if time.monotonic() - start > SLOW:
        kept = {lines[path]: content for path, (fault, content) in checked.items() if not fault}
        _remember(memory.expanduser(), kept)
    return checked


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:  # such as a link to nowhere: the decoder's to say
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _recall(memory: Path) -> dict[str, str]:
    try:
        return dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # or of an earlier version, a list
        return {}


def _remember(memory: Path, stamps: Mapping[str, str]) -> None:
    part = memory.with_suffix(f".{os.getpid()}")
    # A home that cannot be written to costs only the next check's time.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(stamps), encoding="utf-8")
        part.replace(memory)


def _check(path: Path) -> tuple[str, str]:
    content = ""
    try:
        content = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        decode(path, 3)
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"{type(error).__name__}: {error}", content
    return "", content


def _report(faults: Mapping[Path, str], config: ImageFolder) -> list[str]:
    """A note that names the unreadable files; a UserError where they exceed the share `bad`."""
    bad = {path: why for path, why in faults.items() if why}
    if not bad:
        return []
    lines = [f"{len(bad)} of {len(faults)} images cannot be read:"]
    lines += [
        f"  {path.relative_to(config.root)}: {why}" for path, why in list(bad.items())[:NAMED]
    ]
    lines += [f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    if len(bad) / len(faults) > config.bad:
        share = math.ceil(1e4 * len(bad) / len(faults)) / 1e4
        hint = f", or write bad: {share:g} to go on without them" if share < 1 else ""
        lines.append(f"data.bad: got {config.bad:g}; mend or delete the files{hint}")
        raise UserError("\n".join(lines))
    return ["\n".join([*lines, "they are left out"])]


def _shared(splits: Mapping[str, Files], contents: Mapping[Path, str], root: Path) -> list[str]:
    """Notes of equal files: of a split that holds images of train, which were learned by heart, and
    of classes that share images."""
    trained = {contents[path]: path for path, _ in splits["train"]}
    notes, first = [], dict[str, tuple[Path, int]]()
    twins = [
        (path, first[content][0])
        for path, label in sorted(itertools.chain.from_iterable(splits.values()))
        if first.setdefault(content := contents[path], (path, label))[1] != label
    ]
    if twins:
        one, other = (path.relative_to(root) for path in twins[0])
        notes.append(
            f"{counted(len(twins), 'image')} of a class {'is' if len(twins) == 1 else 'are'} in "
            f"another as well, byte for byte ({one} is {other})"
        )
    for part in ("val", "test"):
        again = [path for path, _ in splits[part] if contents[path] in trained]
        if again:
            twin = trained[contents[again[0]]]
            notes.append(
                f"{len(again)} of {len(splits[part])} images of {part} are in train as well, byte "
                f"for byte ({again[0].relative_to(root)} is {twin.relative_to(root)}): its "
                "accuracy is flattered"
            )
    return notes


def _check_cover(splits: Mapping[str, Files], names: Sequence[str], root: Path) -> list[str]:
    """Refuses a class without an image in train, or an empty split; notes other gaps."""
    notes = []
    for part, files in splits.items():
        held = {label for _, label in files}
        absent = [name for label, name in enumerate(names) if label not in held]
        shown = first_few(absent, NAMED)
        if absent and part == "train":
            raise UserError(
                f"data.root: {root} leaves no image to train on for the class {shown}; add images, "
                "or delete the folder and lower classes in the space"
            )
        if not files:
            raise UserError(f"data.root: {root} has no image for the split {part}")
        if absent:
            notes.append(
                f"{part} has no image of the class {shown}: its accuracy says nothing of it"
            )
    return notes
