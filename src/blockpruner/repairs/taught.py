"""What a pruned model is taught, as options have it, and the lesson that does it."""

from typing import Literal, NamedTuple

from blockpruner.repairs.fisher import FisherMetric
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.sampled_divergence import SampledDivergence
from blockpruner.repairs.teaching import Predictions
from blockpruner.texts.examples import Examples

Loss = Literal["lm", "kl", "fisher"]


class Taught(NamedTuple):
    """What a pruned model is taught; see the recovery `distill`."""

    loss: Loss
    temperature: float = 1.0
    hidden: float = 0.0
    vocabulary: int = 0

    @property
    def told(self) -> dict[str, str | int | float]:
        """What a record says of it: the loss, and what is not as usual."""
        return {key: value for key, value in self._asdict().items() if value != self._field_defaults.get(key)}

    def lesson(self, pupil: Pupil, text: Examples) -> Predictions:
        """text: that what means over tokens are needed for is taken from."""
        if self.loss == "fisher":
            return FisherMetric(pupil, text)
        if self.vocabulary:
            return SampledDivergence(pupil, text, self.vocabulary, self.temperature)
        return Predictions(pupil, self.loss, self.temperature, self.hidden)
