"""The study's tables and plots, from its results and nothing else."""
import re
from collections.abc import Iterator
from pathlib import Path

from harness.checkpoint import write_atomic
from harness.environment import machine
from harness.errors import RunError
from studies import pages
from studies.differences import comparable, difference
from studies.experiments import TABLES, Row, Table
from studies.plots import draw, panels
from studies.results import Finished, conditions_text, full_epochs, load_results

NEW_PAGE = f"# Results\n\n{pages.BEGIN.format('study')}\n{pages.END.format('study')}\n"


def read_page(docs: Path, results: Path) -> str:
    """Return the text of the page that has the tables, which :func:`write_report` will take.

    In the folder of the results themselves the page may be missing, and begins as an empty one.

    Raises:
        RunError: It is not there, or lacks the marks between which the tables stand.
    """
    page = docs / "results.md"
    if docs == results and not page.exists():
        return NEW_PAGE
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"--docs must be a folder with results.md ({error})") from None
    pages.replace_part(page, text, "study", "")
    return text


def write_report(results: Path, docs: Path) -> None:
    """Write the study's part of ``docs/results.md`` and a plot for each table that has results to compare.

    Raises:
        RunError: The page lacks the marks between which the tables stand, there are no results, or one is damaged.
    """
    text = read_page(docs, results)
    finished = load_results(results)
    if not finished:
        raise RunError(f"there are no results in {results}; {docs / 'results.md'} stays as it is")
    parts = []
    for key, table in TABLES.items():
        plot = docs / "assets" / f"study-{key}.png"
        if panels(table, finished):
            plot.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(plot, draw(table, finished))
        else:
            plot.unlink(missing_ok=True)
        parts.append(section(key, table, finished))
    page = docs / "results.md"
    write_atomic(page, pages.replace_part(page, text, "study", "\n\n".join(parts)).encode())


def section(key: str, table: Table, finished: dict[str, list[Finished]]) -> str:
    """Return a table of the study in Markdown, with its plot and the commands that made it."""
    missing = [row for row in table.rows if row.experiment not in finished]
    begun = len(missing) < len(table.rows)
    whole = f"python benchmarks/study.py --table {key} --results runs/results"
    parts = [f"### {table.title}", table.text]
    if begun:
        ours = "ours, %" if table.images == "test" else f"{table.images} images, %"
        head = ("", "published, %", ours, "difference", "to", "M parameters", "MMACs", "epochs", "trained on")
        cells = [head, *(line for row in table.rows for line in cells_of(row, table, finished))]
        align = "lrrrlrrrl"
        if not any(row.published for row in table.rows):
            cells, align = [(line[0], *line[2:]) for line in cells], align[:1] + align[2:]
        parts.append(pages.table(cells[0], align, cells[1:]))
    if missing:
        names = [f"{row.label}, published: {published(row)}" if row.published else row.label for row in missing]
        parts.append(f"Not run yet: {'; '.join(names)}.")
    if compared := panels(table, finished):
        beside = any(row.published for rows in compared.values() for row, _ in rows)
        parts.append(f"![{table.title}: our {table.images} errors{', and those published' if beside else ''}]"
                     f"(assets/study-{key}.png)")
    commands = []
    for row in table.rows:
        groups = finished.get(row.experiment, [])
        ways = {conditions_text(group) for group in groups}
        commands += [f"# {row.label}{f'; {conditions_text(group)}' if len(ways) > 1 else ''}\n"
                     f"{command(row.experiment, group)}" for group in groups]
    commands.append(f"# all of this table on a machine of your own; a short form of it with --epochs 10\n{whole}")
    # Folded: on GitHub, and by md_in_html on the site.
    parts.append('<details markdown="1"><summary>Commands</summary>\n\n```text\n'
                 + "\n".join(dict.fromkeys(commands)) + "\n```\n\n</details>")
    return "\n\n".join(parts)


def published(row: Row) -> str:
    """Return the published figure beside ``row``, and whose it is."""
    if row.published is None:
        return ""
    network = row.published.network
    network = "" if network.lower() in row.label.lower() else f", {network}"
    return f"{row.published.error:.2f} ({row.published.source}{network})"


def cells_of(row: Row, table: Table, finished: dict[str, list[Finished]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of ``row``, a line for each number of epochs and each kind of machine it was run with."""
    for group in finished.get(row.experiment, []):
        full = full_epochs(row.experiment)
        short = f"**short**: {group.epochs} of {full}" if group.epochs < full else str(group.epochs)
        names = sorted({machine(result["hardware"]) for result in group.results.values()})
        compared = compare(row, group, finished)
        reference = next((other.label for other in table.rows if other.experiment == row.against), "")
        yield (row.label, published(row), group.errors_text, compared, reference if compared else "",
               f"{group.first['params'] / 1e6:.2f}", f"{group.first['macs'] / 1e6:.1f}", short,
               f"{'; '.join(names)}, {conditions_text(group)}")


def compare(row: Row, group: Finished, finished: dict[str, list[Finished]]) -> str:
    """Return the difference to what ``row`` is compared with, and whether it stands out of the spread."""
    others = comparable(group, finished.get(row.against, ()))
    if not others:
        return ""
    other = next((other for other in others if other.conditions == group.conditions), None)
    if other is None:
        return "not compared: trained under other conditions"
    found = difference(group, other, finished)
    return f"{found}" + ("" if found.stands_out or found.half is None else ", too close to call")


def command(name: str, group: Finished) -> str:
    """Return the command of the runs, in a loop over their seeds if they are several, into a folder for each."""
    seeds = " ".join(str(seed) for seed in sorted(group.results))
    first = group.first["command"]
    several = len(group.results) > 1
    if several:
        first = re.sub(r" --seed[ =][0-9]+", "", first) + " --seed $seed"
    first += f" --out runs/study/{name}-{group.epochs}ep-seed{'$seed' if several else seeds}"
    return f"for seed in {seeds}; do {first}; done" if several else first
