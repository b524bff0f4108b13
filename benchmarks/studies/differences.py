"""Differences between the study's rows, seed by seed, with confidence intervals."""
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from studies.results import Finished, error_of


class Spread(NamedTuple):
    """Standard deviation of the error over the seeds of a network, in points, and its degrees of freedom."""

    deviation: float
    degrees: int


class Difference(NamedTuple):
    """Mean over the seeds of what one row's error is above another's, in points."""

    mean: float
    half: float | None  # half of its 95 % confidence interval, None where nothing tells how far seeds are apart
    seeds: int

    @property
    def stands_out(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.2f}, spread unknown"
        return f"{self.mean:+.2f} ± {self.half:.2f}" + (" (1 seed)" if self.seeds == 1 else "")


def comparable(group: Finished, others: Iterable[Finished]) -> list[Finished]:
    """Return those of ``others`` that have seeds and the number of epochs in common with ``group``."""
    return [other for other in others if other.epochs == group.epochs and set(other.results) & set(group.results)]


def difference(group: Finished, other: Finished, finished: dict[str, list[Finished]]) -> Difference:
    """Return the error of ``group`` minus that of ``other``, with its interval from all that is ``finished``."""
    differences = paired(group, other)
    spread = pooled(finished, group)
    return Difference(statistics.mean(differences), spread and half_interval(spread, len(differences)),
                      len(differences))


def paired(group: Finished, other: Finished) -> list[float]:
    """Return the error of ``group`` minus that of ``other``, in points, for each seed that both have."""
    return [error_of(group.results[seed]) - error_of(other.results[seed])
            for seed in sorted(set(other.results) & set(group.results))]


def pooled(finished: dict[str, list[Finished]], like: Finished) -> Spread | None:
    """Return the spread over the seeds of all that was trained as ``like``.

    Two or three seeds say next to nothing of it, and some come out equal by chance. So rows that differ in one part of
    a network or one setting are taken to spread alike, and each is counted once.

    Returns:
        None where nothing has a second seed.
    """
    groups = [group for groups in finished.values() for group in groups
              if group.deviation is not None and family(group) == family(like)]
    degrees = sum(len(group.errors) - 1 for group in groups)
    squares = sum(statistics.variance(group.errors) * (len(group.errors) - 1) for group in groups)
    return Spread(math.sqrt(squares / degrees), degrees) if degrees else None


def family(group: Finished) -> tuple[Any, ...]:
    """Return what sets how far two runs are apart by chance, as far as there are runs enough to tell."""
    result = group.first
    settings = result["settings"]
    return result["dataset"], result["recipe"], group.epochs, settings["label_noise"], settings["holdout"]


def half_interval(spread: Spread, seeds: int) -> float:
    """Return half of the 95 % confidence interval of a mean of ``seeds`` differences (Student's t).

    The two errors of one seed share the order of the images and little else: they are taken to be independent.
    """
    from scipy.stats import t  # takes half a second, which only the report needs

    return float(t.ppf(0.975, spread.degrees)) * spread.deviation * math.sqrt(2 / seeds)
