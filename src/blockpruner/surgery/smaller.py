"""A stock configuration for what is left of a model, found by trial: models are made on the meta device and looked at.

Which field counts layers, which lists have an entry per layer and which numbers say where a pattern begins is not known
by name. A change is right when the model it makes has the layers that are wanted, in order, with the same shapes and
plain attributes, and all its tensors can be had from the whole model.
"""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from blockpruner.errors import InputError
from blockpruner.loading.strict import first_line, quietly
from blockpruner.surgery.fields import Changes, Path, changed, copied, countings, counts, options
from blockpruner.surgery.likeness import Likeness, looks
from blockpruner.surgery.origins import Origin, Origins
from blockpruner.surgery.pairing import Rest, Unfit

LIMIT = 150  # models made on the meta device before it is said that no configuration was found
_FAR = 1000.0  # a layer too many or too few, counted in layers that are wrong


@dataclass(frozen=True)
class Trial:
    """What came of some changes.

    off: how far it is from what is wanted, 0 when nothing is wrong; why: what is wrong first; lengths: layers per
    stack; fingerprint: equal for equal models; hopeless: what is wrong depends on nothing but a layer's place; ratios:
    by what factors scales inside the layers would have to be others.
    """

    off: float
    why: str
    lengths: tuple[int, ...] = ()
    fingerprint: int = 0
    hopeless: bool = False
    ratios: tuple[float, ...] = ()
    model: PreTrainedModel | None = field(default=None, repr=False)
    origins: Mapping[str, Origin] = field(default_factory=dict[str, Origin])


def smaller(model: PreTrainedModel, rests: Sequence[Rest]) -> tuple[PreTrainedModel, Mapping[str, Origin]]:
    """A model without values, of a configuration that has just the layers of `rests`, and where its tensors come from.

    Unfit, saying what is wrong with the best that was found, if there is none. Cost: a model on the meta device per
    trial (about half a second for 80 layers): two or three for most, up to LIMIT where kinds of layers make a pattern.
    """
    found = _Search(model, rests).best()
    if found.model is None:
        raise Unfit(found.why)
    return found.model, found.origins


class _Search:
    def __init__(self, model: PreTrainedModel, rests: Sequence[Rest]) -> None:
        self._kind, self._config = type(model), type(model.config)
        self._plain = model.config.to_dict()
        self._rests = rests
        whole = self._made(self._plain)
        if isinstance(whole, str):
            raise Unfit(f"no model can be made of the configuration that this one has: {whole}")
        self._likeness = [Likeness([looks(layer) for layer in _layers(whole, rest)], rest) for rest in rests]
        self._origins = Origins(model, rests)
        self._tried = {repr(changed(self._plain, {})): self._judged(whole)}

    def best(self) -> Trial:
        changes: Changes = {}
        best = self._trial(changes)
        for number, rest in enumerate(self._rests):
            for counting in countings(self._plain, rest):
                if best.lengths[number] == len(rest.layers):
                    break
                changes, best = self._improved(changes, best, [counting])
        if best.lengths != tuple(len(rest.layers) for rest in self._rests):
            refused = next((trial.why for trial in self._tried.values() if not trial.lengths), "")
            return replace(best, why=f"{best.why}; transformers says of one that may: {refused}") if refused else best
        mended, found = self._mended(changes, best) if best.off and not best.hopeless else (changes, best)
        return best if found.off else self._consistent(mended, found)

    def _consistent(self, changes: Changes, best: Trial) -> Trial:
        """With every other field changed that says how many layers there are, and of which the model makes nothing."""
        copies = {path: n for rest in self._rests if rest.cut for path, n in counts(self._plain, rest).items()}
        trial = self._trial({**copies, **changes})
        return trial if trial.fingerprint == best.fingerprint and not trial.off else best

    def _mended(self, changes: Changes, best: Trial) -> tuple[Changes, Trial]:
        """Other fields changed too: one at a time, then two at a time of those that make a difference."""
        tries: dict[Path, list[Changes]] = {}
        for rest, likeness in zip(self._rests, self._likeness, strict=True):
            for path, values in options(self._plain, rest, likeness.positions(), best.ratios) if rest.cut else ():
                if type(changes.get(path)) is not int:  # else it counts layers
                    tries.setdefault(path, []).extend({path: value} for value in values)
        changes, best = self._descended(changes, best, [one for ones in tries.values() for one in ones[:2]])
        live = [ones for ones in tries.values() if best.off and self._matters(changes, best, ones)]
        changes, best = self._descended(changes, best, [one for ones in live for one in ones])
        pairs = ({**a, **b} for some, others in itertools.combinations(live, 2) for a in some for b in others)
        return self._improved(changes, best, pairs)

    def _matters(self, changes: Changes, best: Trial, ones: Iterable[Changes]) -> bool:
        trials = (self._trial({**changes, **one}) for one in ones)
        return any(trial.fingerprint not in (0, best.fingerprint) for trial in trials)

    def _descended(self, changes: Changes, best: Trial, ones: Sequence[Changes]) -> tuple[Changes, Trial]:
        """The best of `ones` added to `changes`, again and again for as long as this gets nearer."""
        while best.off:
            nearer, trial = self._improved(changes, best, ones)
            if trial is best:
                break
            changes, best = nearer, trial
        return changes, best

    def _improved(self, changes: Changes, best: Trial, ones: Iterable[Changes]) -> tuple[Changes, Trial]:
        """`changes` with the best of `ones` added, if this gets nearer; a perfect one ends the search."""
        found = changes
        for one in ones:
            if not best.off:
                break
            trial = self._trial({**changes, **one})
            if trial.off < best.off:
                found, best = {**changes, **one}, trial
        return found, best

    def _trial(self, changes: Changes) -> Trial:
        plain = changed(self._plain, changes)
        if (key := repr(plain)) not in self._tried:
            if len(self._tried) >= LIMIT:
                return Trial(float("inf"), "no configuration was found in time")
            made = self._made(plain)
            self._tried[key] = Trial(float("inf"), made) if isinstance(made, str) else self._judged(made)
        return self._tried[key]

    def _made(self, plain: Mapping[str, Any]) -> PreTrainedModel | str:
        """A model of this configuration without values; where transformers makes none, what it says."""
        try:
            with quietly(pathlib.Path("config.json")), torch.device("meta"):
                return self._kind(self._config.from_dict(copied(plain)))
        except InputError as error:
            return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)

    def _judged(self, made: PreTrainedModel) -> Trial:
        stacks = [[looks(layer) for layer in _layers(made, rest)] for rest in self._rests]
        lengths = tuple(map(len, stacks))
        fingerprint = hash(repr(looks(made))) or 1
        off = sum(abs(length - len(rest.layers)) for length, rest in zip(lengths, self._rests, strict=True))
        if off:
            path = next(rest.path for rest, n in zip(self._rests, lengths, strict=True) if n != len(rest.layers))
            why = f"no field of the configuration counts the layers of {path} alone"
            return Trial(off * _FAR, why, lengths, fingerprint)
        wrong: list[str] = []
        for likeness, found in zip(self._likeness, stacks, strict=True):
            wrong += itertools.chain.from_iterable(likeness.misfits(found))
            for new, layer in enumerate(found):
                if why := likeness.positional(new, layer):
                    return Trial(len(wrong), why, lengths, fingerprint, hopeless=True)
        origins, unknown = self._origins.of(made)
        if wrong or unknown:
            why = f"no configuration with these layers was found; in the nearest, {(wrong + unknown)[0]}"
            pairs = zip(self._likeness, stacks, strict=True)
            ratios = {ratio for likeness, found in pairs for ratio in likeness.ratios(found)}
            return Trial(len(wrong) + len(unknown), why, lengths, fingerprint, ratios=tuple(sorted(ratios)))
        return Trial(0, "", lengths, fingerprint, model=made, origins=origins)


def _layers(model: nn.Module, rest: Rest) -> list[nn.Module]:
    try:
        return list(model.get_submodule(rest.path).children())
    except AttributeError:
        return []
