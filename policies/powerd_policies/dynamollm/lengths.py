"""How long an answer will be, before it is written: known, known as well as wished, or learned (DynamoLLM section 4.2).

House rules: a predictor is a function of arrays and gives the same whether asked one by one or all at once; what only a study can
know (the true length) comes as a hint, and a predictor that needs it says so; an accuracy is told beside that of always guessing
the commonest size.

Where the answer cannot be told (a table that has seen nothing, sizes that are equally likely) the largest size is said: a pool
for long answers holds short ones and wastes a little; one for short answers that gets long ones fills its KV cache and is late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from powerd_policies.dynamollm.classes import Classes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

#: Output tokens that stand for a size where nothing better is known.
TYPICAL_TOKENS: Final = (50, 200, 500)


@dataclass(frozen=True, slots=True)
class Hints:
    """What else may be known of the requests: ``output_tokens`` is the truth, which only simulations and studies have."""

    output_tokens: Any = None  # array-like, one a request
    ids: Any = None  # whole numbers, one a request: what tells requests of equal lengths apart


class LengthPredictor(Protocol):
    """Predicts for each prompt (an array-like of tokens) the size of its answer: 0, 1 or 2 for short, medium and long."""

    name: str

    def predict(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the sizes; raises ``ValueError`` when a hint that it needs is missing."""
        ...

    def tokens(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the output tokens to plan with."""
        ...


class Oracle:
    """Knows the truth: for studies of what prediction is worth."""

    name = "oracle"

    def __init__(self, classes: Classes | None = None) -> None:
        self._classes = classes or Classes()

    def predict(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the true sizes."""
        return sizes_of(self._truth(prompt_tokens, hints), self._classes)

    def tokens(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the true lengths."""
        return self._truth(prompt_tokens, hints)

    def _truth(self, prompt_tokens: Any, hints: Hints | None) -> Ints:
        import numpy as np

        if hints is None or hints.output_tokens is None:
            raise ValueError(f"the length predictor {self.name} needs to be told the true output tokens")
        truth = np.asarray(hints.output_tokens, dtype=np.int64)
        if truth.shape != np.shape(prompt_tokens):
            raise ValueError(f"{np.size(prompt_tokens)} prompts and {truth.size} outputs: one of each per request")
        return truth


class NoisyOracle(Oracle):
    """Knows the truth with a wished probability, else says one of the two other sizes; the same for the same request and seed."""

    def __init__(self, accuracy: float, seed: int = 0, classes: Classes | None = None) -> None:
        super().__init__(classes)
        if not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"accuracy {accuracy:g}: it is a share between 0 and 1")
        self.accuracy = accuracy
        self.name = f"noisy-{100 * accuracy:g}%"
        self._seed = seed

    def predict(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the sizes, as many of them right as the accuracy says."""
        import numpy as np

        truth = self._truth(prompt_tokens, hints)
        sizes = sizes_of(truth, self._classes)
        ids = np.asarray(0 if hints is None or hints.ids is None else hints.ids, dtype=np.int64)
        dice = _uniform(np.asarray(prompt_tokens, dtype=np.int64), truth, ids, self._seed)
        wrong = dice >= self.accuracy
        other = np.where((dice - self.accuracy) * 2.0 < 1.0 - self.accuracy, 1, 2)
        return np.where(wrong, (sizes + other) % 3, sizes)

    def tokens(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the true length where the size is right, else what is typical of the wrong size."""
        import numpy as np

        truth = self._truth(prompt_tokens, hints)
        said = self.predict(prompt_tokens, hints)
        return np.where(said == sizes_of(truth, self._classes), truth, np.asarray(TYPICAL_TOKENS)[said])


class LengthTable:
    """Learned from a trace: how often answers were short, medium and long after prompts of this length.

    Prompts of a service come from few templates, and a template shows in its length: cells of ``cell_tokens`` are trusted as far
    as they were seen, and lean on quantile bins otherwise. ``caution`` is how much worse a size too small is than one too large.
    """

    def __init__(
        self,
        classes: Classes | None = None,
        *,
        cell_tokens: int = 16,
        bins: int = 40,
        believe: float = 5.0,
        caution: float = 1.0,
    ) -> None:
        import numpy as np

        self.name = "table"
        self._classes = classes or Classes()
        self._cell_tokens = cell_tokens
        self._bins = bins
        self._believe = believe  # requests that it takes to believe a cell as much as its bin
        # costs[said, true]
        self._costs = np.array([[0.0, caution, caution], [1.0, 0.0, caution], [1.0, 1.0, 0.0]])
        self._edges: Floats = np.zeros(0)
        self._by_bin: Floats = np.zeros((1, 3))
        self._by_cell: Floats = np.zeros((1, 3))
        self._typical: Ints = np.asarray(TYPICAL_TOKENS, dtype=np.int64)

    @classmethod
    def train(cls, prompt_tokens: Any, output_tokens: Any, classes: Classes | None = None, **knobs: Any) -> LengthTable:
        """Return a table of these requests; raises ``ValueError`` for none or for arrays of different lengths."""
        table = cls(classes, **knobs)
        table.learn(prompt_tokens, output_tokens)
        return table

    def learn(self, prompt_tokens: Any, output_tokens: Any) -> None:
        """Count finished requests; the first that are learned decide where the bins lie."""
        import numpy as np

        prompts = np.asarray(prompt_tokens, dtype=np.int64)
        outputs = np.asarray(output_tokens, dtype=np.int64)
        if prompts.size == 0 or prompts.shape != outputs.shape:
            raise ValueError(f"{prompts.size} prompts and {outputs.size} outputs: one of each per request, and at least one")
        if not self._by_bin.any():
            self._edges = np.unique(np.quantile(prompts, np.linspace(0.0, 1.0, self._bins + 1)[1:-1]))
            self._by_bin = np.zeros((len(self._edges) + 1, 3))
        sizes = sizes_of(outputs, self._classes)
        np.add.at(self._by_bin, (np.searchsorted(self._edges, prompts, "right"), sizes), 1.0)
        cells = prompts // self._cell_tokens
        if (missing := int(cells.max()) + 1 - len(self._by_cell)) > 0:
            self._by_cell = np.vstack([self._by_cell, np.zeros((missing, 3))])
        np.add.at(self._by_cell, (cells, sizes), 1.0)
        for size in range(3):
            if (sizes == size).any():
                self._typical[size] = round(float(outputs[sizes == size].mean()))

    def chances(self, prompt_tokens: Any) -> Floats:
        """Return for each prompt the chances of a short, a medium and a long answer."""
        import numpy as np

        prompts = np.asarray(prompt_tokens, dtype=np.int64)
        binned = self._by_bin[np.searchsorted(self._edges, prompts, "right")]
        seen = binned.sum(axis=-1, keepdims=True)
        prior = np.where(seen > 0.0, binned / np.maximum(seen, 1.0), 1.0 / 3.0)
        cells = prompts // self._cell_tokens
        known = cells < len(self._by_cell)
        counted = np.where(known[..., None], self._by_cell[np.where(known, cells, 0)], 0.0)
        chances: Floats = (counted + self._believe * prior) / (counted.sum(axis=-1, keepdims=True) + self._believe)
        return chances

    def predict(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the size that is expected to cost least; of equal ones the largest."""
        import numpy as np

        costs = self.chances(prompt_tokens) @ self._costs.T
        sizes: Ints = 2 - np.argmin(np.round(costs[..., ::-1], 12), axis=-1)
        return sizes

    def tokens(self, prompt_tokens: Any, hints: Hints | None = None) -> Ints:
        """Return the mean length that answers of the predicted size had."""
        return self._typical[self.predict(prompt_tokens)]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of requests: whose size was said right, said too small, and whose size is the commonest of those learned from."""

    right: float
    too_small: float
    commonest: float


def accuracy(
    predictor: LengthPredictor, prompt_tokens: Any, output_tokens: Any, commonest: int, classes: Classes | None = None
) -> Accuracy:
    """Return how good a predictor is on requests that it was not made from, beside always saying ``commonest``."""
    truth = sizes_of(output_tokens, classes or Classes())
    said = predictor.predict(prompt_tokens, Hints(output_tokens))
    return Accuracy(float((said == truth).mean()), float((said < truth).mean()), float((truth == commonest).mean()))


def sizes_of(output_tokens: Any, classes: Classes) -> Ints:
    """Return the sizes of these answers: ``Classes.size_of_output`` of an array."""
    import numpy as np

    return np.searchsorted(np.asarray(classes.output_bounds), np.asarray(output_tokens), "right")


def _uniform(prompts: Ints, outputs: Ints, ids: Ints, seed: int) -> Floats:
    """Return a number in [0, 1) for each request, of its lengths, its number and the seed alone."""
    import numpy as np

    lengths = (prompts.astype(np.uint64) << np.uint64(32)) ^ outputs.astype(np.uint64)
    numbers = ids.astype(np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    mixed = _mixed(_mixed(lengths) ^ numbers)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


def _mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return what splitmix64 makes of these numbers."""
    import numpy as np

    with np.errstate(over="ignore"):
        key = key + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    return key
