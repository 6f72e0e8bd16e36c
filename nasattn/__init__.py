"""nasattn: find where to place light non-local attention in a mobile network, within a budget.

The public names are loaded when they are first used: `import nasattn` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Architecture": "nasattn.architecture",
    "SearchSpace": "nasattn.space",
    "build": "nasattn.model",
    "insert": "nasattn.model",
    "load_study": "nasattn.search.opening",
    "measure": "nasattn.cost",
}
_MODULES = ("blocks", "search")

__all__ = ["Architecture", "SearchSpace", "build", "insert", "load_study", "measure"]

if TYPE_CHECKING:
    from nasattn.architecture import Architecture
    from nasattn.cost import measure
    from nasattn.model import build, insert
    from nasattn.search.opening import load_study
    from nasattn.space import SearchSpace


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"nasattn.{name}")
    raise AttributeError(f"module 'nasattn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
