"""Differences between the study's rows, seed by seed, with confidence intervals."""
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments import Row
from study_results import Finished


class Spread(NamedTuple):
    """Standard deviation of the differences between two runs of one seed, and its degrees of freedom."""

    deviation: float
    degrees: int


def paired(group: Finished, other: Finished) -> list[float]:
    """Return the error of ``group`` minus that of ``other``, in points, for each seed that both have."""
    return [group.results[seed]["final"]["error"] - other.results[seed]["final"]["error"]
            for seed in sorted(set(other.results) & set(group.results))]


def pooled(rows: Iterable[Row], finished: dict[str, list[Finished]], like: Finished) -> Spread | None:
    """Return the spread of the comparisons among ``rows`` whose runs were trained as those of ``like``.

    Two or three seeds say next to nothing of their spread, and some pairs come out equal by chance. What is compared
    here differs in one part of a network or one setting, so each comparison is taken to spread as the others do.

    Returns:
        None where no comparison has a second seed.
    """
    squares, degrees = 0.0, 0
    for name, against in dict.fromkeys((row.experiment, row.against) for row in rows):
        for group in finished.get(name, ()):
            for other in finished.get(against, ()):
                if family(group) == family(other) == family(like) and group.conditions == other.conditions:
                    differences = paired(group, other)
                    if len(differences) > 1:
                        squares += statistics.variance(differences) * (len(differences) - 1)
                        degrees += len(differences) - 1
    return Spread(math.sqrt(squares / degrees), degrees) if degrees else None


def family(group: Finished) -> tuple[Any, ...]:
    """Return what sets how far two runs are apart by chance: the recipe, its length and the share of wrong labels."""
    result = next(iter(group.results.values()))
    return result["recipe"], group.epochs, result["settings"]["label_noise"]


def half_interval(differences: list[float], spread: Spread) -> float:
    """Return half of the 95 % confidence interval of the mean of ``differences`` (Student's t).

    Where they spread more than the comparisons alike, as an optimiser's may, their own deviation counts.
    """
    from scipy.stats import t  # takes half a second, which only the report needs

    own = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return float(t.ppf(0.975, spread.degrees)) * max(own, spread.deviation) / math.sqrt(len(differences))
