"""Finds the residual blocks a Transformer does not need, removes them for good, and saves a model that loads.

Public names are loaded on first use, so that `import blockpruner` is quick and brings no torch. It does tell
transformers, which may come later, how to load pruned checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from blockpruner import autoload

if TYPE_CHECKING:
    from blockpruner.api import bench, evaluate, explain, inspect, pareto, recover, save, score, search
    from blockpruner.blocks import Block, Move
    from blockpruner.errors import BlockprunerError
    from blockpruner.loading.models import load
    from blockpruner.plan import Plan
    from blockpruner.surgery.removal import prune_, skipped

    __version__: str

__all__ = [
    "Block",
    "BlockprunerError",
    "Move",
    "Plan",
    "__version__",
    "bench",
    "evaluate",
    "explain",
    "inspect",
    "load",
    "pareto",
    "prune_",
    "recover",
    "save",
    "score",
    "search",
    "skipped",
]

_HOME = {
    "Block": "blockpruner.blocks",
    "BlockprunerError": "blockpruner.errors",
    "Move": "blockpruner.blocks",
    "Plan": "blockpruner.plan",
    "bench": "blockpruner.api",
    "evaluate": "blockpruner.api",
    "explain": "blockpruner.api",
    "inspect": "blockpruner.api",
    "load": "blockpruner.loading.models",
    "pareto": "blockpruner.api",
    "prune_": "blockpruner.surgery.removal",
    "recover": "blockpruner.api",
    "save": "blockpruner.api",
    "score": "blockpruner.api",
    "search": "blockpruner.api",
    "skipped": "blockpruner.surgery.removal",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value = version("blockpruner")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload.install()
