"""The study in one table, for readers who want the answers."""
from dataclasses import dataclass

from ran_layers.published import Published
from studies import pages
from studies.differences import Difference, comparable, difference
from studies.experiments import cite, noise, noisy
from studies.results import Finished

EPOCHS = 10  # of the short trainings, which alone have seeds enough to compare


@dataclass(frozen=True)
class Comparison:
    """What is compared with what: the experiments under recipe `best` and `report`, and published pairs of figures."""

    label: str
    best: tuple[str, str] | None = None
    report: tuple[str, str] | None = None
    published: tuple[tuple[Published, Published], ...] = ()


def _variants(variant: str, *sources: str) -> tuple[tuple[Published, Published], ...]:
    return tuple((cite(source, "Attention-56", variant=variant), cite(source, "Attention-56")) for source in sources)


COMPARISONS = (
    Comparison(
        "Attention-92 against Attention-56", ("att92-cifar10-best", "att56-cifar10-best"),
        ("att92-cifar10-report", "att56-cifar10-report"),
        tuple((cite(source, "Attention-92"), cite(source, "Attention-56")) for source in ("paper", "report"))),
    Comparison(
        "... on CIFAR-100", ("att92-cifar100-best", "att56-cifar100-best"),
        ("att92-cifar100-report", "att56-cifar100-report"),
        ((cite("report", "Attention-92", "cifar100"), cite("report", "Attention-56", "cifar100")),)),
    Comparison(
        "naive attention learning against attention residual learning", ("att56-naive-best", "att56-cifar10-best"),
        ("att56-naive-report", "att56-cifar10-report"), _variants("naive attention learning", "paper", "report")),
    Comparison(
        "local against soft mask branch", ("att56-local-best", "att56-cifar10-best"),
        ("att56-local-report", "att56-cifar10-report"), _variants("local convolutions as mask", "paper")),
    Comparison(
        "channel against mixed attention", ("att56-channel-best", "att56-cifar10-best"),
        published=_variants("channel attention", "paper")),
    Comparison(
        "spatial against mixed attention", ("att56-spatial-best", "att56-cifar10-best"),
        published=_variants("spatial attention", "paper")),
    Comparison("trunk with units added, equal MACs, against Attention-56", ("trunk56-macs-best", "att56-cifar10-best")),
    Comparison("... equal parameters", ("trunk56-params-best", "att56-cifar10-best")),
    Comparison(
        "trunk with units added (the paper: ResNet-164), equal parameters, against Attention-92, half of the labels "
        "wrong",
        (noisy("trunk92", 0.5, "best"), noisy("att92", 0.5, "best")),
        published=((noise("ResNet-164", 0.5), noise("Attention-92", 0.5)),)),
    Comparison(
        "plain CNN of 8 layers against Attention-56", ("plain8-best", "att56-cifar10-best"),
        ("plain8-report", "att56-cifar10-report"), ((cite("report", "Plain CNN-8"), cite("report", "Attention-56")),)),
    Comparison("ResNet-18 against Attention-56", ("resnet18-best", "att56-cifar10-best")),
    Comparison("SGD against Muon", ("att56-sgd-best", "att56-cifar10-best")),
    *(Comparison(
        f"Adam against SGD, batches of {batch}",
        report=(f"att56-adam{batch}-report", "att56-cifar10-report" if batch == 64 else f"att56-sgd{batch}-report"))
      for batch in (32, 64, 256)),
    *(Comparison(f"batches of {batch} against 64", report=(f"att56-sgd{batch}-report", "att56-cifar10-report"))
      for batch in (32, 256)),
)


def summary(finished: dict[str, list[Finished]]) -> str:
    """Return the table of :data:`COMPARISONS`."""
    rows = [(
        row.label, _cell(row.best, finished), _cell(row.report, finished),
        "; ".join(f"{first.error - second.error:+.2f} ({first.source})" for first, second in row.published),
    ) for row in COMPARISONS]
    head = ("difference in test error, points", "our recipe", "the report's", "published, full trainings")
    return pages.table(head, "lrrl", rows)


def _cell(pair: tuple[str, str] | None, finished: dict[str, list[Finished]]) -> str:
    found = pair and measured(*pair, finished)
    return f"**{found}**" if found and found.stands_out else str(found or "")


def measured(name: str, against: str, finished: dict[str, list[Finished]]) -> Difference | None:
    """Return the difference of two experiments from the short runs that share most seeds, None if there are none."""
    pairs = [(group, other) for group in finished.get(name, ()) if group.epochs == EPOCHS
             for other in comparable(group, finished.get(against, ())) if other.conditions == group.conditions]
    return max((difference(*pair, finished) for pair in pairs), key=lambda found: found.seeds, default=None)
