"""What one method of a chain made, on disk: a recovery that is killed later in its chain goes on behind it.

A folder `made` with the numbers in safetensors and all else as JSON, whole or not there. Trainings keep their own
checkpoints (`training`), so this is for closed forms. Disk: all of a repair, also what methods before this one made.
"""

import hashlib
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from blockpruner.artifacts import Artifact, new_folder, write_bytes
from blockpruner.blocks import format_mask, parse_mask
from blockpruner.errors import RunFolderError
from blockpruner.loading.models import computation
from blockpruner.repairs.recovery import Bench, GapRecord
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import Repair, device_of, gaps

MADE = "made"
Made = tuple[Repair, tuple[GapRecord, ...]]


class MadeRecord(Artifact):
    """All of a repair but its numbers, and what its method said of it; identity: of all that the result depends on."""

    FORMAT: ClassVar[str] = "blockpruner.repair"
    VERSION: ClassVar[int] = 1

    identity: str
    replacements: dict[str, dict[str, str | int | float]]
    spans: dict[str, str]
    made_up: str
    gaps: tuple[GapRecord, ...]


def keep(bench: Bench, method: str, made: Made) -> None:
    """Write what `method` made on this bench to the bench's folder; nothing where it has none."""
    if bench.folder is None:
        return
    repair, gaps = made
    numbers = {f"weights/{name}": value for name, value in repair.weights.items()}
    for path, replacement in repair.replacements.items():
        numbers |= {f"replacements/{path}/{name}": value for name, value in replacement.state_dict().items()}
    with new_folder(bench.folder / MADE) as aside:
        write_bytes(aside / "numbers.safetensors", save({name: value.contiguous() for name, value in numbers.items()}))
        MadeRecord(
            format=MadeRecord.FORMAT,
            version=MadeRecord.VERSION,
            identity=_identity(bench, method),
            replacements={path: replacement.spec for path, replacement in repair.replacements.items()},
            spans={path: format_mask(blocks) for path, blocks in repair.spans.items()},
            made_up=format_mask(repair.made_up),
            gaps=gaps,
        ).save(aside / "made.json")


def kept(bench: Bench, method: str) -> Made | None:
    """What `keep` wrote for the same method on the same bench, None if nothing; RunFolderError if for another."""
    if bench.folder is None or not (place := bench.folder / MADE).is_dir():
        return None
    record = MadeRecord.load(place / "made.json")
    if record.identity != _identity(bench, method):
        raise RunFolderError(
            f"{place} is of another recovery (other options, text, plan, model or start)",
            fix="name another --run, or remove that folder",
        )
    weights, inside = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for key, value in load_file(place / "numbers.safetensors").items():
        kind, _, rest = key.partition("/")
        if kind == "weights":
            weights[rest] = value.to(bench.model.get_parameter(rest).device)
        else:
            path, _, name = rest.rpartition("/")
            inside.setdefault(path, {})[name] = value
    devices = {gap.path: device_of(bench.model, gap) for gap in gaps(bench.anatomy, bench.mask)}
    replacements = {path: _filled(spec, inside[path], devices[path]) for path, spec in record.replacements.items()}
    spans = {path: parse_mask(blocks) for path, blocks in record.spans.items()}
    return Repair(replacements, weights, spans, parse_mask(record.made_up)), record.gaps


def _filled(spec: dict[str, Any], numbers: dict[str, Tensor], device: torch.device) -> Replacement:
    made = Replacement(**spec).to(device, numbers["bias"].dtype)
    made.load_state_dict(numbers)
    return made.requires_grad_(False)


def _identity(bench: Bench, method: str) -> str:
    parts = (
        *(method, format_mask(bench.mask), computation(bench.model), str(bench.force)),
        *(bench.examples.fingerprint, bench.held_out.fingerprint, bench.start.digest()),
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
