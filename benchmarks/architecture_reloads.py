"""How the architecture sweep compares, and how it opens checkpoints where this package is not installed.

Nothing of the package is imported here.
"""

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import dynamic_module_utils

Model = Any
Inputs = Mapping[str, Tensor]
TOLERANCE = 1e-4  # of the largest number; rounding stays two orders of magnitude below


@torch.no_grad()
def logits(model: Model, inputs: Inputs, **options: Any) -> Tensor:
    output = model(**inputs, **options)
    return (output["logits"] if "logits" in output else output[0]).float().contiguous()


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or a number is none."""
    if found.shape != expected.shape:
        return float("inf")
    gap = float((found.double() - expected.double()).abs().max())
    return gap if gap == gap else float("inf")


def close(gap: float, expected: Tensor) -> bool:
    """Whether a difference from `expected` may be rounding."""
    return gap <= TOLERANCE * max(1.0, float(expected.abs().max()))


def outcome(found: Tensor, expected: Tensor, info: Mapping[str, Any]) -> str:
    """`equal`, bit for bit; else what is wrong with a reloaded checkpoint."""
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(name):
            return f"{name}: {', '.join(sorted(map(str, info[name]))[:3])}"
    gap = difference(found, expected)
    return "equal" if gap == 0.0 else f"differs by {gap:.3g}"


def told(error: Exception) -> str:
    """One line on what was raised; of this package's own errors, what happened."""
    text = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400]


class Absent(MetaPathFinder):
    """Makes this package look as if it was not installed."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] == "blockpruner":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def opened(cases: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Case name -> `outcome` of its checkpoint, opened as its users would, or what was raised.

    Each case has its folder, the class of transformers to load it with, and whether its remote code may run.
    """
    assert not [name for name in sys.modules if name.partition(".")[0] == "blockpruner"]
    sys.meta_path.insert(0, Absent())
    modules: Any = dynamic_module_utils
    modules.HF_MODULES_CACHE = str(folder / "modules")
    inputs = load_file(folder / "inputs.safetensors")
    answers: dict[str, str] = {}
    for case in cases:
        expected = load_file(Path(case["folder"], "expected"))["logits"]
        try:
            answers[case["name"]] = outcome(*reloaded(case, inputs, expected))
        except Exception as error:  # that it does not open is an answer
            answers[case["name"]] = told(error)
    return answers


def reloaded(case: Mapping[str, Any], inputs: Inputs, expected: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    model, info = getattr(transformers, case["class"]).from_pretrained(
        case["folder"], trust_remote_code=bool(case.get("remote")), output_loading_info=True
    )
    return logits(model.eval(), inputs), expected, info
