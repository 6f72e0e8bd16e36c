"""The house: who imports whom, what is loaded when, and the public face."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nasattn

PACKAGE = Path(nasattn.__file__).parent

# A module imports only from a row above its own, or from its own package.
LAYERS: list[set[str]] = [
    {"errors", "seed"},
    {"files"},
    {"catalog", "document"},
    {"architecture", "chain", "pareto"},
    {"space_file", "record", "uncertainty"},
    {"config", "skeleton"},
    {"blocks"},
    {"backbones"},
    {"model"},
    {"cost"},
    {"space"},
    {"pricing"},
    {"quote"},
    {"data"},
    {"evaluate"},
    {"search"},
    {"export", "report", "tables"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = LAYERS[: LAYERS.index({"blocks"})]

# Imports by a name that is computed: a module of the user's own.
COMPUTED = {"quote"}

# Packages that only some rooms or files may import, and those that the core never does.
OWNERS: dict[str, set[str]] = {
    "optuna": {"search"},
    "sqlalchemy": {"search"},
    "boto3": {"search.artifacts"},
    "botocore": {"search.artifacts"},
    "google": set(),
    "pytorch_lightning": {"data", "evaluate"},
    "lightning": set(),
    "onnx": {"export"},
    "onnxruntime": {"export", "cost.latency"},
    "executorch": {"cost.latency"},
    "onnxscript": {"export"},
    "matplotlib": {"report"},
    "ray": {"search.ray_launcher"},
    "submitit": {"search.slurm_launcher"},
    "rich": {"search.display", "tables", "cli"},
    "typer": {"cli"},
    "torchvision": set(),
    "timm": set(),
    "torch": set(RANK) - set().union(*TORCH_FREE) - {"cli", "__main__"},
}


def module_name(path: Path) -> str:
    """`blocks` for nasattn/blocks/__init__.py, `blocks.se` for its neighbour; `` for the face."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .strip(".")
    )


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere: at the top, in functions, for types only."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module")):
                yield "(computed)"
            case ast.Call(func=ast.Name(id="__import__" | "exec" | "eval" | "import_module")):
                yield "(computed)"


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the rule."""
    room, wrong = module.partition(".")[0], []
    for name in imported(ast.parse(source)):
        first, *rest = name.split(".")
        if first == "nasattn":
            if rest == ["__version__"] or rest[:1] == [room]:
                continue
            allowed = bool(rest) and RANK.get(rest[0], len(LAYERS)) < RANK[room]
        else:
            owners = COMPUTED if first == "(computed)" else OWNERS.get(first, {room})
            allowed = not name.startswith(".") and bool(owners & {room, module})
        if not allowed:
            wrong.append(f"{module or 'nasattn'} imports {name}")
    return wrong


def test_every_module_has_a_layer() -> None:
    rooms = {module.partition(".")[0] for module in SOURCES} - {""}
    assert rooms <= set(RANK)
    assert len(RANK) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {""}))
def test_imports_only_from_below(module: str) -> None:
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("catalog", "from nasattn.architecture import Site"),
        ("catalog", "import nasattn.document"),
        ("pareto", "def f():\n    from nasattn import space"),
        ("record", "if TYPE_CHECKING:\n    from nasattn.config import Final"),
        ("config", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("record", "from torch import Tensor"),
        ("model", "from nasattn import build"),
        ("model", "import nasattn"),
        ("space", "import optuna.samplers"),
        ("search.loop", "from pytorch_lightning import Trainer"),
        ("search.loop", "from rich.console import Console"),
        ("search", "from nasattn.report import write_report"),
        ("evaluate.train", "import torchvision"),
        ("report", "import nasattn.export"),
        ("cost.table", "from . import analytic"),
        ("cost.table", "importlib.import_module('nasattn.cli')"),
        ("cli", "def f():\n    import torch"),
    ],
)
def test_the_rule_catches(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_the_rule_allows() -> None:
    below = "from nasattn.cost.analytic import count\nfrom nasattn import __version__, model\n"
    assert violations("cost.table", below + "import torch, json\nfrom torch import nn") == []
    assert violations("search.display", "from rich.table import Table") == []


def test_the_face_imports_nothing_itself_and_its_two_lists_agree() -> None:
    """The public names once for type checkers, once as strings for the lazy import."""
    tree = ast.parse(SOURCES[""].read_text(encoding="utf-8"))
    checked = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {name for node in checked for name in imported(node)}
    assert typed == {f"{home}.{name}" for name, home in nasattn._HOMES.items()}
    others = [n for n in tree.body if not isinstance(n, ast.If)]
    assert {name.partition(".")[0] for node in others for name in imported(node)} == {
        "importlib",
        "typing",
        "(computed)",
    }


def test_public_names() -> None:
    for name in (*nasattn.__all__, *nasattn._MODULES):
        assert getattr(nasattn, name) is not None
        assert name in dir(nasattn)
    assert set(nasattn.__all__) == set(nasattn._HOMES)
    with pytest.raises(AttributeError, match="'nasattn' has no attribute 'biuld'"):
        nasattn.biuld  # noqa: B018


def loaded_after(code: str) -> set[str]:
    """The packages and modules of nasattn that a fresh interpreter holds after running the code."""
    report = "import sys; print('LOADED', *sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    names = run.stdout.rpartition("LOADED ")[2].split()
    assert "sys" in names
    return {n if n.startswith("nasattn") else n.partition(".")[0] for n in names}


HEAVY = {*OWNERS, "torchmetrics", "kornia", "sklearn", "numpy", "pydantic", "yaml"} - {"typer"}


def test_import_nasattn_loads_nothing() -> None:
    loaded = loaded_after("import nasattn; dir(nasattn); nasattn.__version__")
    assert not loaded & (HEAVY | {"typer"})
    assert {n for n in loaded if n.startswith("nasattn")} == {"nasattn"}


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "import sys; from nasattn.cli import main; sys.argv = ['nasattn', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )
    assert not loaded & HEAVY
    assert {n for n in loaded if n.startswith("nasattn")} <= {
        "nasattn",
        "nasattn.cli",
        "nasattn.errors",
    }


@pytest.mark.parametrize(
    ("modules", "free_of"),
    [
        (sorted(set().union(*TORCH_FREE)), {"torch", "optuna", "matplotlib", "rich", "sqlalchemy"}),
        (["search.study"], {"torch", "pytorch_lightning", "matplotlib", "kornia", "sklearn"}),
        (["search.workers", "search.retrain"], {"pytorch_lightning", "torchmetrics", "sklearn"}),
        (["data.cued_digits"], {"sklearn", "scipy", "kornia", "optuna", "pytorch_lightning"}),
        (["space"], {"optuna", "pytorch_lightning", "matplotlib", "kornia", "torchmetrics"}),
    ],
    ids=[
        "below the blocks",
        "reading a study",
        "before the first training",
        "the digits",
        "a space",
    ],
)
def test_loads_without(modules: list[str], free_of: set[str]) -> None:
    loaded = loaded_after("import " + ", ".join(f"nasattn.{m}" for m in modules))
    assert {f"nasattn.{m}" for m in modules} <= loaded
    assert not loaded & free_of
