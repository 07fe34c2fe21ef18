"""What a recipe made of a model, as data."""

from typing import ClassVar

from blockpruner.artifacts import Artifact, Estimate, Record, Work
from blockpruner.plan import ModelIdentity
from blockpruner.recipe import Recipe
from blockpruner.texts.calibration import CalibrationRecord


class Contestant(Record):
    """A model without some blocks. removed: as text; parameters: what is left; loss: on text that nobody looked at,
    None where it is not finite."""

    removed: str
    parameters: int
    loss: Estimate | None


class Outcome(Artifact):
    """What a recipe made of a model, beside the dense model and as much removed at random.

    recipe: with all its settings; work: of the search, counted; data: of the losses, in the unit of `objective`.
    """

    FORMAT: ClassVar[str] = "blockpruner.outcome"
    VERSION: ClassVar[int] = 1

    recipe: Recipe
    model: ModelIdentity
    objective: str
    data: CalibrationRecord
    work: Work
    contestants: dict[str, Contestant]
