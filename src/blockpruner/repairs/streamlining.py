"""Layers of a pruned model trained to make up for those that are gone, by the dense model's stream."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockpruner.anatomy.parts import Anatomy
from blockpruner.blocks import Block, Mask, format_mask
from blockpruner.repairs.closed_form import left_alone
from blockpruner.repairs.pupil import Ends, Pupil
from blockpruner.repairs.recovery import Bench, GapRecord, Trained
from blockpruner.repairs.spans import numbered
from blockpruner.repairs.tuning import Gauge, left_of, record_of, told, tuned
from blockpruner.surgery.gaps import Repair
from blockpruner.texts.examples import Examples


@dataclass(frozen=True)
class Place:
    """The layer at `path`, which stands for itself and for those behind it up to the one at `behind`.

    blocks: what is gone of these, and before it where it is the first that is left; numbered: all those layers, where
    they are more than one.
    """

    path: str
    behind: str
    blocks: Mask
    numbered: str


def places(anatomy: Anatomy, mask: Mask) -> list[Place]:
    """The layers that are to make up for what is gone, in the order in which the model runs; see `streamline`."""
    found: list[Place] = []
    for stack in anatomy.stacks:
        gone = [mask.intersection(part.block for part in layer.parts) for layer in stack.layers]
        left = [n for n, layer in enumerate(stack.layers) if not layer.parts or len(gone[n]) < len(layer.parts)]
        if not left:
            continue
        for number, following in zip(left, [*left[1:], len(gone)], strict=True):
            first = 0 if number == left[0] else number
            if blocks := frozenset[Block]().union(*gone[first:following]):
                layers = stack.layers[number], stack.layers[following - 1]
                said = numbered(stack.name, first, following - 1) if following - first > 1 else ""
                found.append(Place(layers[0].path, layers[1].path, blocks, said))
    return found


def parameters(bench: Bench, beside: Sequence[Place]) -> dict[str, nn.Parameter]:
    """The parameters of these layers that are left, by name."""
    return {name: p for name, p in left_of(bench).items() if any(name.startswith(f"{place.path}.") for place in beside)}


def train_layers(bench: Bench, options: Trained) -> tuple[Repair, tuple[GapRecord, ...]]:
    """New values for the layers beside gaps; see the recovery `streamline`."""
    beside = places(bench.anatomy, bench.mask)
    trained = parameters(bench, beside)
    if not trained:
        return bench.start, (left_alone(format_mask(bench.mask), "", "no layer is left beside it"),)

    def lesson(pupil: Pupil) -> tuple[Streams, Gauge]:
        streams = Streams(pupil, [place.behind for place in beside])
        return streams, streams.measure

    made, trace = tuned(bench, options, trained, lesson)
    shared = told(options, trace, bench.force)
    each = [{**shared, "stands for": place.numbered} if place.numbered else shared for place in beside]
    return made, tuple(
        record_of(bench, place.path, settings, trace, place.blocks)
        for place, settings in zip(beside, each, strict=True)
    )


class Streams:
    """|s - t|^2 / |t|^2, mean over tokens and layers, summed over windows.

    ends_at: paths of the layers behind which s is the stream of the pruned model, t that of the dense one, in the order
    in which they run. Cost: a forward pass of either up to the last of them, and one back.
    """

    def __init__(self, pupil: Pupil, ends_at: Sequence[str]) -> None:
        self.pupil, self.ends_at, self.ends = pupil, list(ends_at), Ends(pupil.model, pupil.anatomy)

    def weigh(self, part: Examples) -> float:
        """Windows."""
        return float(len(part.targets))

    def backward(self, part: Examples, scale: float) -> float:
        with torch.inference_mode(False), torch.enable_grad():
            return self._missing(part, scale)

    @torch.no_grad()
    def measure(self, part: Examples) -> float:
        """The sum over these windows."""
        return self._missing(part)

    def _missing(self, part: Examples, scale: float | None = None) -> float:
        """With a scale, its gradients times that are added to those there are."""
        part = part.to(self.pupil.model.device)
        with torch.no_grad():
            _, wanted = self.ends.body(part, self.ends_at, self.ends_at[-1])
        with self.pupil.pruned():  # on the way back too, where operations look at weights again
            # behind the run, where maps that stand in it have added theirs
            _, found = self.ends.body(part, self.ends_at, self.ends_at[-1])
            shares = [_share(found[at], wanted[at]) for at in self.ends_at]
            value = self.weigh(part) * torch.stack([share.to(shares[0].device) for share in shares]).mean()
            if scale is not None:
                (value * scale).backward()
        return float(value.detach())


def _share(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens."""
    wanted = wanted.to(found.device).float()
    return ((found.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)).mean()
