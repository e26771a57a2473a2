"""What a metrics page looks like, figures aside: names with kinds, labels and bucket edges, as prometheus_client reads them."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

#: Labels whose values a deployment chooses; of all others the values belong to the shape.
CHOSEN = frozenset({"engine", "model_name", "le"})


class Shape(NamedTuple):
    """One metric; ``values`` are those of labels such as reason, and none for information, whose values say anything."""

    kind: str
    labels: frozenset[str]
    values: frozenset[tuple[str, str]]
    edges: tuple[float, ...]
    information: bool

    def within(self, real: Shape | None) -> bool:
        """Whether a page that has this metric passes for one that has the real one; of information any part will do."""
        if real is None or (self.kind, self.edges) != (real.kind, real.edges) or not self.values <= real.values:
            return False
        return self.labels <= real.labels if real.information else self.labels == real.labels


def shapes(text: str) -> dict[str, Shape]:
    """The shapes of vLLM's own metrics on a page, by name."""
    found = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("vllm:"):
            continue
        labels = frozenset(label for sample in family.samples for label in sample.labels)
        pairs = {pair for sample in family.samples for pair in sample.labels.items() if pair[0] not in CHOSEN}
        information = family.name.endswith("_info")
        edges = sorted({float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels})
        found[family.name] = Shape(family.type, labels, frozenset(() if information else pairs), tuple(edges), information)
    return found


def total(text: str, sample_name: str) -> float:
    """The sum of a name's samples."""
    return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == sample_name)
