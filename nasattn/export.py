"""Files for use elsewhere, compared with the eager network before they are kept."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from nasattn import __version__
from nasattn.config import ImageFolder
from nasattn.cost.latency import INSTALL, lacking, quiet_exporter
from nasattn.data.image_folder import normalisation
from nasattn.data.images import MARGIN
from nasattn.document import dump_yaml
from nasattn.errors import UserError, first_few
from nasattn.evaluate.candidate import facts_of
from nasattn.files import make_folder
from nasattn.model import build
from nasattn.record import Trial, amount, counted
from nasattn.search.final_text import interval, judged_on
from nasattn.search.study import Study
from nasattn.skeleton import LEFT_OUT, changes

BESIDE = "model.onnx.data"  # the weights of a large network's model.onnx
FILES = "architecture.yaml", "weights.safetensors", "model.onnx", BESIDE, "README.md"
LIMIT = 1e-3  # the largest difference from eager that is let pass, as a share of the largest output
BATCHES = (1, 3)
ONE_FILE = 1_500_000_000  # of weights; more go into a file beside, as ONNX ends at 2 GB


class ExportRefused(Exception):
    """The ONNX exporter cannot express the network, or its file does not compute what it does."""


def check_export(out: Path) -> None:
    """Raise a UserError where an export to the folder `out` cannot succeed, or would replace files
    that are no export's, and leave no trace."""
    if missing := lacking("onnxruntime"):
        names = ", ".join(missing)
        raise UserError(f"the export needs packages that are not here ({names}): {INSTALL}")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"--out: {there} is a file; allowed: a folder")
    if folders := [name for name in FILES if (out / name).is_dir()]:
        raise UserError(f"--out: {out / folders[0]} is a folder; the export writes a file there")
    theirs = [name for name in FILES if (out / name).exists()]
    if theirs and not _exported(out):
        raise UserError(
            f"--out: the export would replace {first_few(theirs)} in {out}, where no export has "
            "been; allowed: a folder without such files, or one that an export was written to"
        )
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".export-").cleanup()
    except OSError as error:
        raise UserError(f"--out: {there} cannot be written: {error.strerror}") from None


def export_trial(study: Study, trial: Trial, weights: Mapping[str, Tensor], out: Path) -> str:
    """Write FILES, BESIDE where it is needed, into the folder `out`.

    Returns what a person should know of them. An error leaves `out` as it was, and files of other
    names are never touched. Raises ExportRefused as `export_onnx` does.
    """
    check_export(out)
    network = build(trial.architecture)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"these are not the weights of trial {trial.number}: {error}") from None
    network.eval()
    assert trial.score is not None
    own = f"{trial.score.accuracies[0]:.6f}"  # the weights are the first seed's
    facts = {"key": trial.architecture.key, "accuracy": own}
    with _replacing(out) as draft:
        trial.architecture.save(draft / "architecture.yaml")
        (draft / "weights.safetensors").write_bytes(save(dict(weights), metadata=facts))
        parity = export_onnx(network, trial.architecture.input, draft / "model.onnx", facts)
        # A folder's name, and so a class's, may be of any bytes.
        readme = _readme(study, trial, parity).encode("utf-8", "backslashreplace")
        (draft / "README.md").write_bytes(readme)
        names = ", ".join(sorted(path.name for path in draft.iterdir()))
    return f"exported trial {trial.number} to {out}: {names}\nmodel.onnx: {parity}"


def weights_path(named: Path | None) -> Path:
    """Where new weights go. A UserError where they would replace an export's that nobody has named,
    or a file of another kind."""
    path = named or Path("weights.safetensors")
    if named is None and "accuracy" in (_facts(path) or {}):
        raise UserError(
            f"{path} is an export's, whose other files tell of it; --out FILE says where the new "
            "weights go"
        )
    if path.is_file() and path.stat().st_size and _facts(path) is None:
        raise UserError(f"--out: {path} is there and holds no weights; allowed: another name")
    return path


def _exported(folder: Path) -> bool:
    """By the file that is written first and that nothing else replaces."""
    with contextlib.suppress(OSError):
        return OURS.encode() in (folder / "README.md").read_bytes()
    return False


def _facts(weights: Path) -> dict[str, str] | None:
    """`facts_of`; None where there are no weights."""
    try:
        return facts_of(weights)
    except (OSError, SafetensorError):
        return None


def export_onnx(
    network: nn.Module, shape: tuple[int, int, int], path: Path, facts: Mapping[str, str]
) -> str:
    """Write a network in eval mode as ONNX, with `image` (N, *shape) in, `logits` out and any N.

    Returns the difference from eager in words. Raises ExportRefused where it is beyond LIMIT or the
    exporter fails.
    """
    try:
        with quiet_exporter():
            _write_onnx(network, shape, path, facts)
            largest, share = _difference(network, shape, path)
    except OSError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportRefused(f"the network cannot be written as ONNX: {first}") from error
    words = (
        f"largest difference from eager {largest:.2g} ({share:.2g} of the largest output), "
        f"batches of {' and '.join(map(str, BATCHES))}"
    )
    if not share <= LIMIT:  # a NaN is refused too
        raise ExportRefused(f"the ONNX file is refused: {words}; allowed: {LIMIT:g}")
    return words


def _write_onnx(
    network: nn.Module, shape: tuple[int, int, int], path: Path, facts: Mapping[str, str]
) -> None:
    import onnx

    program = torch.onnx.export(
        network,
        (torch.zeros(2, *shape),),  # a batch of one would be taken for a constant
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # they hold stack traces, and so this machine's paths
    program.model.metadata_props.update(facts)
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    program.save(path, external_data=size > ONE_FILE)
    onnx.checker.check_model(path)


def _difference(network: nn.Module, shape: tuple[int, int, int], path: Path) -> tuple[float, float]:
    """The largest |ONNX - eager| over random inputs, and its share of the largest |eager|."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    dice = torch.Generator().manual_seed(0)
    largest = scale = torch.zeros(())
    for batch in BATCHES:
        image = torch.randn(batch, *shape, generator=dice)
        with torch.no_grad():
            eager = network(image)
        logits = torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
        largest = torch.maximum(largest, (logits - eager).abs().max())
        scale = torch.maximum(scale, eager.abs().max())
    return largest.item(), (largest / scale).item() if largest else 0.0


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder to write in; what it holds at the end moves into `out`, on an error nothing does.

    It lies inside `out`, as only there a move is sure to stay on one file system.
    """
    made = not out.exists()
    make_folder(out)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
            yield Path(folder)
            large = (Path(folder) / BESIDE).exists()
            for path in sorted(Path(folder).iterdir()):
                path.replace(out / path.name)
            if not large:
                (out / BESIDE).unlink(missing_ok=True)  # an earlier export's
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from None
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _readme(study: Study, trial: Trial, parity: str) -> str:
    import onnx
    import onnxruntime

    architecture, score = trial.architecture, trial.score
    assert score is not None
    baseline = next(t for t in study.trials if t.baseline)
    rows = [("validation accuracy", *(t.score.text if t.score else "-" for t in (trial, baseline)))]
    for metric, value in trial.cost.values.items():
        plain = study.facts["plain"][metric]
        rows.append((metric, f"{amount(value)} ({value / plain:.3f}x)", amount(plain)))
    changed = changes(study.config.space, architecture.backbone)
    blocks = [f"- `{spec}` after `{site}`" for site, spec in architecture.specs.items()]
    varied = [
        f"- `{position}` is left out" if label == LEFT_OUT else f"- `{position}`: `{label}`"
        for position, label in changed.items()
    ]
    none = "- none" if varied else "- none: this is the plain backbone"
    versions: dict[str, Any] = {
        "nasattn": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    # Where the images lie on the machine that trained is nobody else's business.
    data = study.config.data.model_dump(mode="json", exclude={"root"}, exclude_none=True)
    return README.format(
        ours=OURS,
        study=study.name,
        number=trial.number,
        key=architecture.key,
        backbone=architecture.backbone.name,
        blocks="\n".join(blocks) or none,
        varied=VARIED.format("\n".join(varied)) if varied else "",
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        evaluator=score.evaluator,
        own=f", of {score.accuracies[0]:.4f}" if score.repeats else "",
        classes=architecture.classes,
        shape=", ".join(map(str, architecture.input)),
        prepared=_prepared(study, architecture.input),
        latency=_latency(study, trial),
        final=_final(study, trial),
        data=dump_yaml(data, flow=True, width=96).strip(),
        parity=parity,
        date=datetime.now(UTC).date().isoformat(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _prepared(study: Study, shape: tuple[int, int, int]) -> str:
    """How an image becomes an input, with the names of the outputs."""
    config = study.config.data
    if not isinstance(config, ImageFolder):
        return "\nIt was trained on images that nasattn.data.cued_digits composes.\n"
    channels, height, width = shape
    mean, std = normalisation(config, channels)
    names = study.facts.get("images", {}).get("names", ())
    known = "".join(f"\n    {i}  {name}" for i, name in enumerate(names))
    return PREPARED.format(
        grey="" if channels == 3 else '.convert("L")',
        height=height,
        width=width,
        channels=channels,
        margin=MARGIN,
        mean=list(mean),
        std=list(std),
    ) + (f"\nThe classes, in the order of the logits:\n{known}\n" if known else "")


def _latency(study: Study, trial: Trial) -> str:
    """Where the latency is that of."""
    if "latency_s" not in trial.cost.values or not study.config.latency:
        return ""
    context = study.config.latency["context"]
    keys = (key for key in ("runtime", "chip", "threads", "date") if key in context)
    place = ", ".join(f"{key} {context[key]}" for key in keys)
    return f"`latency_s` is in seconds, for one image, by a table of measurements ({place}).\n"


def _final(study: Study, trial: Trial) -> str:
    """What the trainings at the end of the search gave, which are less flattered."""
    final = study.final()
    rows = final["rows"] if final and final["done"] else []
    row = next((r for r in rows if r["number"] == trial.number), None)
    if not final or not row or not (figures := row[judged_on(final)]):
        return ""
    seeds = final["seeds"]
    gain = figures.get("gain")
    over = f", {interval(gain, seeds, '+')} over the plain backbone" if gain else ""
    return (
        f"\nTrained anew at the end, {counted(seeds, 'seed')}: {judged_on(final)} accuracy "
        f"{interval(figures, seeds)}{over} (means with 95 % intervals; these weights are the "
        "search's own).\n"
    )


# The same as nasattn.data.images does it: a test holds the two together.
PREPARED = """
```python
import numpy as np
from PIL import Image, ImageOps

picture = ImageOps.exif_transpose(Image.open("photo.jpg"))
if picture.mode.startswith("I"):  # 16 bits of grey
    picture = Image.fromarray(np.asarray(picture).astype(np.float32) / 257)
else:
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    picture = picture.convert("RGB"){grey}
width, height = {width}, {height}
scale = {margin} * max(width / picture.width, height / picture.height)
w, h = width / scale, height / scale
left, top = (picture.width - w) / 2, (picture.height - h) / 2
box = (left, top, left + w, top + h)
picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
pixels = np.asarray(picture, np.float32).reshape(height, width, -1) / 255
pixels = np.broadcast_to(pixels, (height, width, {channels}))
pixels = (pixels - np.float32({mean})) / np.float32({std})
image = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
```
"""
OURS = "found by nasattn, with these blocks placed"
VARIED = """
The backbone's own blocks, where they are not the plain one's:

{}
"""
README = """\
# Trial {number} of {study}

A `{backbone}` for {classes} classes, {ours} (key `{key}`):

{blocks}
{varied}
| | this network | plain backbone |
|---|---|---|
{table}

The accuracy is that of the validation split, which also chose this network among the others, so
it is a little flattered. Evaluator: {evaluator}; ± is one standard deviation over the seeds; the
weights are the first seed's{own}. `macs` are multiply-adds of one image, norms and activations not
counted.
{latency}{final}
## Load it in Python

```python
import nasattn
from safetensors.torch import load_file

architecture = nasattn.Architecture.load("architecture.yaml")
network = nasattn.build(architecture).eval()
network.load_state_dict(load_file("weights.safetensors"))
```

Neither file can run code when it is loaded.

## Run the ONNX file

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
image = np.zeros((1, {shape}), np.float32)
logits = session.run(["logits"], {{"image": image}})[0]
```

`image` is float32 (N, {shape}) for any N, prepared as below; `logits` is (N, {classes}).
Compared with the network above: {parity}.

## Prepare an image
{prepared}
The options of the data:

    {data}

Written {date} with {versions}.
"""
