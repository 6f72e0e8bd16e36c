"""A user's own images in folders: `root/{train,val,test}/CLASS/`, or `root/CLASS/` split by a seed.

The classes are the folders' names in sorted order; a class's folder is read with all folders in it.
Hidden files and files that are no images by their extension are passed over. Every image is decoded
once before the training: what cannot be decoded is named and left out, up to the share `bad`. What
lies in train and, byte for byte, in val or test as well is told.
"""

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from nasattn.config import ImageFolder
from nasattn.data import Data, Shape, stratify
from nasattn.data.images import Images, decode
from nasattn.errors import UserError, first_few, suggest
from nasattn.record import counted

Files = list[tuple[Path, int]]
Stamp = tuple[int, int]  # a file's size in bytes, and when it was changed last (ns)

# What others call the splits; two folders of these names with folders in them are hardly classes.
SPLITS = frozenset("train training val valid validation dev eval test testing".split())
EXTENSIONS = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
NAMED = 10  # files named in a message; the rest are counted
SLOW = 10.0  # seconds of checking from which the result is kept for the next run

# ImageNet's mean and deviation; a single channel is their average.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    faults, contents = _checked(stamps, config.root)
    notes += _report(faults, config)
    listed = _listed(splits, config.root)
    splits = {name: [file for file in part if not faults[file[0]]] for name, part in splits.items()}
    notes += _check_cover(splits, names, config.root)
    notes += _shared(splits, contents, config.root)
    read = _listed(splits, config.root)
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
            "read": _digest([(*row, stamps[config.root / row[1]][0]) for row in read]),
            "contents": _digest([(row[1], contents[config.root / row[1]]) for row in read]),
            "names": names,
        },
    )


def _listed(splits: Mapping[str, Files], root: Path) -> list[tuple[str, str, int]]:
    """Each split's files, by their places in the root, and their classes."""
    return [(name, f.relative_to(root).as_posix(), y) for name in splits for f, y in splits[name]]


def _digest(rows: Sequence[tuple[object, ...]]) -> str:
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


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
    if len(names) == 1 != classes:
        raise UserError(
            f"data.root: {where} has one class folder ({names[0]}), and nothing to tell it from; "
            "allowed: a root with two or more, perhaps the folder above or below"
        )
    if len(names) != classes:
        shown = first_few(names, NAMED)
        empty = [
            name for name in names if os.access(where / name, os.R_OK) and not _inside(where / name)
        ]
        raise UserError(
            f"data.root: class folders in {where}: {len(names)} ({shown}), but the space "
            f"says classes: {classes}; write classes: {len(names)} in the space, or check the root"
            + (f"; there is nothing in {first_few(empty, NAMED)}" if empty else "")
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


def _list(folder: Path, names: Sequence[str], passed_over: Counter[str]) -> Files:
    """The images of the class folders in sorted order; counts what else is there by its kind."""
    labels = {name: label for label, name in enumerate(names)}
    files: Files = []
    for path in _visible(folder):
        first, *rest = path.relative_to(folder).parts
        if path.suffix.lower() not in EXTENSIONS:
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


def _checked(stamps: Mapping[Path, Stamp], root: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """Path -> why it cannot be decoded, or "" where it can; and path -> a digest of its bytes.

    Every file is really decoded, unless an earlier run, whose check took long, found it good and
    its size and time of change are still the same.
    """
    name = hashlib.sha256(os.fsencode(root) + f" {PIL.__version__}".encode()).hexdigest()[:16]
    memory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nasattn", f"images-{name}.json")
    lines = {path: f"{path} {size} {time}" for path, (size, time) in stamps.items()}
    good = _recall(memory.expanduser())
    new = [path for path in stamps if lines[path] not in good]
    start = time.monotonic()
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; the pixels are what is judged
        looked = dict(zip(new, pool.map(_check, new), strict=True))
    faults, contents = dict[Path, str](), dict[Path, str]()
    for path in stamps:
        faults[path], contents[path] = looked.get(path) or ("", good[lines[path]])
    if time.monotonic() - start > SLOW:
        kept = {lines[path]: contents[path] for path in stamps if not faults[path]}
        _remember(memory.expanduser(), kept)
    return faults, contents


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
        with path.open("rb") as file:
            content = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=8)).hexdigest()
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
    """Notes of equal files: of what val or test share with train, which was learned by heart, and
    of what lies in two classes."""
    kinds, trained = dict[str, tuple[Path, int]](), {contents[p]: p for p, _ in splits["train"]}
    twins = []  # of an image of another class
    again: dict[str, list[Path]] = {"val": [], "test": []}
    for part, files in splits.items():
        for path, label in files:
            first, other = kinds.setdefault(contents[path], (path, label))
            if label != other:
                twins.append((path, first))
            elif part != "train" and contents[path] in trained:
                again[part].append(path)
    notes = []
    if twins:
        one, other_one = (path.relative_to(root) for path in twins[0])
        notes.append(
            f"{counted(len(twins), 'image')} of a class {'is' if len(twins) == 1 else 'are'} in "
            f"another as well, byte for byte ({one} is {other_one})"
        )
    for part, paths in again.items():
        if paths:
            twin = trained[contents[paths[0]]]
            notes.append(
                f"{len(paths)} of {len(splits[part])} images of {part} are in train as well, byte "
                f"for byte ({paths[0].relative_to(root)} is {twin.relative_to(root)}): its "
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
