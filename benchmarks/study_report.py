"""The study's tables and plots, from its results and nothing else."""
import re
import statistics
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pages
from checkpoint import write_atomic
from environment import machine
from errors import RunError
from experiments import TABLES, Row, Table
from study_results import Finished, full_epochs, load_results


def read_page(docs: Path) -> str:
    """Return the text of the page that has the tables, which :func:`write_report` will take.

    Raises:
        RunError: It is not there, or lacks the marks between which the tables stand.
    """
    page = docs / "results.md"
    try:
        text = page.read_text()
    except OSError as error:
        raise RunError(f"--docs must be a folder with results.md ({error})") from None
    pages.replace_part(page, text, "study", "")
    return text


def write_report(results: Path, docs: Path) -> None:
    """Write the study's part of ``docs/results.md`` and a plot for each table that has results to compare.

    Raises:
        RunError: The page lacks the marks between which the tables stand, there are no results, or one is damaged.
    """
    text = read_page(docs)
    finished = load_results(results)
    if not finished:
        raise RunError(f"there are no results in {results}; {docs / 'results.md'} stays as it is")
    parts = []
    for key, table in TABLES.items():
        plot = docs / "assets" / f"study-{key}.png"
        if comparable(table, finished):
            plot.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(plot, draw(table, finished))
        else:
            plot.unlink(missing_ok=True)
        parts.append(section(key, table, finished))
    page = docs / "results.md"
    write_atomic(page, pages.replace_part(page, text, "study", "\n\n".join(parts)).encode())


def section(key: str, table: Table, finished: dict[str, list[Finished]]) -> str:
    """Return a table of the study in Markdown, with its plot and the commands that made it."""
    begun = any(row.experiment in finished for row in table.rows)
    head = ("", "published, %", "ours, %", "difference", "to", "M parameters", "MMACs", "epochs", "trained on")
    columns = len(head) if begun else 2
    cells = [line[:columns] for row in table.rows for line in cells_of(row, table, finished)]
    parts = [f"### {table.title}", table.text, pages.table(head[:columns], "lrrrlrrrl"[:columns], cells)]
    if comparable(table, finished):
        published = any(row.published for row in table.rows if row.experiment in finished)
        parts.append(f"![{table.title}: our test errors{', and those published' if published else ''}]"
                     f"(assets/study-{key}.png)")
    if begun:
        commands = [f"# {row.label}\n{command(group.results)}"
                    for row in table.rows for group in finished.get(row.experiment, ())]
        commands.append("# what this table lacks, in full; in the short form with --epochs 10\n"
                        f"python benchmarks/study.py --table {key}")
        parts.append("```text\n" + "\n".join(dict.fromkeys(commands)) + "\n```")
    else:
        parts.append(f"Not run yet: `python benchmarks/study.py --table {key}`.")
    return "\n\n".join(parts)


def comparable(table: Table, finished: dict[str, list[Finished]]) -> bool:
    """Return whether there is something to plot: a lone result is said by its table."""
    return sum(len(finished.get(row.experiment, ())) for row in table.rows) > 1


def cells_of(row: Row, table: Table, finished: dict[str, list[Finished]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of ``row``, a line for each number of epochs and each kind of machine it was run with."""
    published = ""
    if row.published:
        network = "" if row.published.network in row.label else f", {row.published.network}"
        published = f"{row.published.error:.2f} ({row.published.source}{network})"
    groups = finished.get(row.experiment, [])
    if not groups:
        yield row.label, published, *[""] * 7
    for group in groups:
        full = full_epochs(row.experiment)
        short = f"**short**: {group.epochs} of {full}" if group.epochs < full else str(group.epochs)
        ours = f"{group.mean:.2f}"
        ours += f" ± {group.deviation:.2f} ({len(group.errors)} seeds)" if group.deviation is not None else " (1 seed)"
        names = sorted({machine(result["hardware"]) for result in group.results.values()})
        network = next(iter(group.results.values()))
        difference = compare(row, group, finished)
        reference = next((other.label for other in table.rows if other.experiment == row.against), "")
        yield (row.label, published, ours, difference, reference if difference else "",
               f"{network['params'] / 1e6:.2f}", f"{network['macs'] / 1e6:.1f}", short,
               f"{'; '.join(names)}, {way_of(network)}")


def way_of(result: dict[str, Any]) -> str:
    """Return what else than the machine decides whether two runs can be compared."""
    settings = result["settings"]
    kernels = ", fused kernels" if settings.get("cpu_kernels") else ""
    return f"{settings['precision']}{kernels}, torch {result['versions']['torch']}"


def compare(row: Row, group: Finished, finished: dict[str, list[Finished]]) -> str:
    """Return the difference to what ``row`` is compared with, and whether it stands out of the spread."""
    others = [other for other in finished.get(row.against, ())
              if other.epochs == group.epochs and set(other.results) & set(group.results)]
    if not others:
        return ""
    other = next((other for other in others if other.conditions == group.conditions), None)
    if other is None:
        return "not compared: trained under other conditions"
    # Seeds are shared, so the differences are compared pair by pair.
    differences = [group.results[seed]["final"]["error"] - other.results[seed]["final"]["error"]
                   for seed in sorted(set(other.results) & set(group.results))]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}, spread unknown"
    spread = statistics.stdev(differences)
    return f"{mean:+.2f} ± {spread:.2f}" + ("" if abs(mean) > 2 * spread else ", too close to call")


def command(results: dict[int, dict[str, Any]]) -> str:
    """Return the command of the runs, in a loop over their seeds if they are several."""
    first = next(iter(results.values()))["command"]
    if len(results) == 1:
        return first
    seeds = " ".join(str(seed) for seed in sorted(results))
    return f"for seed in {seeds}; do {re.sub(r'--seed [0-9]+', '--seed $seed', first)}; done"


def draw(table: Table, finished: dict[str, list[Finished]]) -> bytes:
    """Return a PNG: the errors of each row, a dot a seed, and a hollow mark where one is published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(row, group) for row in table.rows for group in finished.get(row.experiment, ())]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.38 * len(rows)), layout="constrained")
    for y, (row, group) in enumerate(rows):
        # Seeds one above the other: some errors are equal.
        heights = [y + 0.16 * (i - (len(group.errors) - 1) / 2) for i in range(len(group.errors))]
        if row.published:
            axes.plot([row.published.error], [y], "D", color="tab:gray", fillstyle="none", label="published")
        axes.plot(group.errors, heights, "o", color="tab:blue", alpha=0.7, markersize=5, label="ours, a seed each")
        axes.plot([group.mean], [y], "|", color="tab:blue", markersize=16, label="ours, mean")
    axes.set_yticks(range(len(rows)), labels_of(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("top-1 test error, %")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = dict(sorted(zip(*reversed(axes.get_legend_handles_labels())), key=lambda item: item[0]))
    # Outside: among the points its marks would be read as some of them.
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside upper right", ncols=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def labels_of(rows: list[tuple[Row, Finished]]) -> list[str]:
    """Return the labels of a plot's rows, with how each was trained where they differ in it: compare among equals."""
    ways = [way_of(next(iter(group.results.values()))) for _, group in rows]
    return [f"{row.label.replace('`', '')}, {group.epochs} epochs"
            + (" (short)" if group.epochs < full_epochs(row.experiment) else "")
            + (f"\n{way}" if len(set(ways)) > 1 else "") for (row, group), way in zip(rows, ways)]
