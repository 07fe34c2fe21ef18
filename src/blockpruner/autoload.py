"""Makes a plain `import blockpruner` enough for transformers to load pruned checkpoints; imports no torch for it."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODEL_TYPE = "blockpruner"
_MAPPING_HOME = "transformers.models.auto.configuration_auto"


class LateConfig:
    """What transformers finds under our model type; brings the real class in when a checkpoint is opened."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from blockpruner.standin import BlockprunerConfig

        return BlockprunerConfig.from_dict(config_dict, **kwargs)


def install() -> None:
    """Register the model type with transformers: now if it is loaded, else at the moment it gets loaded."""
    module = sys.modules.get(_MAPPING_HOME)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: ModuleType) -> None:
    module.CONFIG_MAPPING.register(MODEL_TYPE, LateConfig, exist_ok=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MAPPING_HOME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)
