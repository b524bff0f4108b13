"""The study's tables and plots, from its results and nothing else."""
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import write_atomic
from cifar import parse_args
from environment import machine
from errors import RunError
from experiments import EXPERIMENTS, TABLES, Row, Table
from recipes import make_recipe

BEGIN, END = "<!-- begin study -->", "<!-- end study -->"


class Finished(NamedTuple):
    """The finished runs of an experiment at one number of epochs: a result for each seed."""

    epochs: int
    results: dict[int, dict[str, Any]]

    @property
    def errors(self) -> list[float]:
        return [result["final"]["error"] for result in self.results.values()]

    @property
    def mean(self) -> float:
        return statistics.mean(self.errors)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None


def load_results(folder: Path) -> dict[str, list[Finished]]:
    """Return what is finished of each experiment, fewest epochs first."""
    found: dict[str, dict[int, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*-*ep-seed*.json")):
        name, epochs, seed = file.stem.rsplit("-", 2)
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); remove it and run {name} again") from error
        found[name][int(epochs.removesuffix("ep"))][int(seed.removeprefix("seed"))] = result
    return {name: [Finished(*item) for item in sorted(groups.items())] for name, groups in found.items()}


def full_epochs(name: str) -> int:
    """Epochs of an experiment in its full form."""
    args = parse_args(EXPERIMENTS[name].arguments())
    return make_recipe(args.recipe, args.dataset, args.overrides).epochs


def write_report(results: Path, docs: Path) -> None:
    """Write the study's part of ``docs/results.md`` and a plot for each table that has results to compare.

    Raises:
        RunError: The page lacks the marks between which the tables stand, or a result is damaged.
    """
    finished = load_results(results)
    page = docs / "results.md"
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{page} must have the lines '{BEGIN}' and '{END}' once each; the tables go between them")
    parts = []
    for key, table in TABLES.items():
        plot = docs / "assets" / f"study-{key}.png"
        if comparable(table, finished):
            plot.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(plot, draw(table, finished))
        else:
            plot.unlink(missing_ok=True)
        parts.append(section(key, table, finished))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomic(page, "\n\n".join([before + BEGIN, *parts, END + after]).encode())


def section(key: str, table: Table, finished: dict[str, list[Finished]]) -> str:
    """Return a table of the study in Markdown, with its plot and the commands that made it."""
    head = ("", "published, %", "ours, %", "difference", "M parameters", "MMACs", "epochs", "hardware")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --: |" * (len(head) - 2) + " --- |"]
    lines += [f"| {' | '.join(cells)} |" for row in table.rows for cells in cells_of(row, finished)]
    parts = [f"### {table.title}", table.text, "\n".join(lines)]
    if comparable(table, finished):
        parts.append(f"![{table.title}: test errors, ours and published](assets/study-{key}.png)")
    if any(row.experiment in finished for row in table.rows):
        commands = [f"# {row.label}\n{command(group.results)}"
                    for row in table.rows for group in finished.get(row.experiment, ())]
        parts.append("```text\n" + "\n".join(dict.fromkeys(commands)) + "\n```")
    else:
        parts.append(f"Not run yet: `python benchmarks/study.py --table {key}`.")
    return "\n\n".join(parts)


def comparable(table: Table, finished: dict[str, list[Finished]]) -> bool:
    """Return whether there is something to plot: a lone result is said by its table."""
    return sum(len(finished.get(row.experiment, ())) for row in table.rows) > 1


def cells_of(row: Row, finished: dict[str, list[Finished]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of ``row``, a line for each number of epochs it was run for."""
    published = f"{row.published.error:.2f} ({row.published.source})" if row.published else ""
    groups = finished.get(row.experiment, [])
    if not groups:
        yield row.label, published, *[""] * 6
    for group in groups:
        full = full_epochs(row.experiment)
        short = f"**short**: {group.epochs} of {full}" if group.epochs < full else str(group.epochs)
        ours = f"{group.mean:.2f}"
        ours += f" ± {group.deviation:.2f} ({len(group.errors)} seeds)" if group.deviation is not None else " (1 seed)"
        names = sorted({f"{machine(result['hardware'])}, {result['settings']['precision']}"
                        for result in group.results.values()})
        network = next(iter(group.results.values()))
        yield (row.label, published, ours, compare(row, group, finished), f"{network['params'] / 1e6:.2f}",
               f"{network['macs'] / 1e6:.1f}", short, "; ".join(names))


def compare(row: Row, group: Finished, finished: dict[str, list[Finished]]) -> str:
    """Return the difference to what ``row`` is compared with, and whether it stands out of the spread."""
    other = next((item for item in finished.get(row.against, ()) if item.epochs == group.epochs), None)
    both = sorted(set(other.results) & set(group.results)) if other is not None else []
    if other is None or not both:
        return ""
    # Seeds are shared, so the differences are compared pair by pair, of those trained in the same way.
    shared = [seed for seed in both if conditions(group.results[seed]) == conditions(other.results[seed])]
    if not shared:
        return "not compared: trained under other conditions"
    differences = [group.results[seed]["final"]["error"] - other.results[seed]["final"]["error"] for seed in shared]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}, spread unknown"
    spread = statistics.stdev(differences)
    return f"{mean:+.2f} ± {spread:.2f}" + ("" if abs(mean) > spread else ", within the spread")


def conditions(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a run was trained with, which two runs must share to be compared.

    Two processors differ by rounding, as two orders of the same sums on one do: not more than the seeds differ.
    """
    settings = result["settings"]
    return (result["hardware"]["device"], result["versions"]["torch"], result["processes"], settings["precision"],
            settings.get("cpu_kernels", False))


def command(results: dict[int, dict[str, Any]]) -> str:
    """Return the command of the runs, with a word for their seeds."""
    first = next(iter(results.values()))["command"]
    seeds = " ".join(str(seed) for seed in sorted(results))
    return re.sub(r"--seed \d+", f"--seed {{{seeds}}}" if len(results) > 1 else f"--seed {seeds}", first)


def draw(table: Table, finished: dict[str, list[Finished]]) -> bytes:
    """Return a PNG: the errors of each row, a dot a seed, and a hollow mark where one is published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(row, group) for row in table.rows for group in finished.get(row.experiment, ())]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.38 * len(rows)), layout="constrained")
    for y, (row, group) in enumerate(rows):
        axes.plot(group.errors, [y] * len(group.errors), "o", color="tab:blue", alpha=0.7, label="ours, a seed each")
        axes.plot([group.mean], [y], "|", color="tab:blue", markersize=16, label="ours, mean")
        if row.published:
            axes.plot([row.published.error], [y], "D", color="tab:gray", fillstyle="none", label="published")
    labels = [f"{row.label.replace('`', '')}, {group.epochs} epochs" for row, group in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set_xlabel("top-1 test error, %")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    # Outside: among the points its marks would be read as some of them.
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside upper right", ncols=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
