"""The study's plots: a panel for each data set and way of training, so that what stands together can be compared."""
import textwrap
from collections.abc import Iterator
from io import BytesIO

from studies.experiments import DATASETS, Row, Table
from studies.results import Finished, conditions_text, full_epochs

Panel = list[tuple[Row, Finished]]
# Less than this, in points, would fill the width with what the seeds and the choice of test images make of one network.
LEAST_SPAN = 4.0


def panels(table: Table, finished: dict[str, list[Finished]]) -> dict[tuple[str, str], Panel]:
    """Return the rows of each panel, by data set and way of training: those that have something to be compared with."""
    found: dict[tuple[str, str], Panel] = {}
    for row in table.rows:
        for group in finished.get(row.experiment, ()):
            dataset = group.first["dataset"]
            found.setdefault((DATASETS.get(dataset, dataset), conditions_text(group)), []).append((row, group))
    return {key: rows for key, rows in sorted(found.items()) if len(rows) > 1}


def draw(table: Table, finished: dict[str, list[Finished]]) -> bytes:
    """Return a PNG: the errors of each row, a dot a seed, and a hollow mark where one is published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = panels(table, finished)
    heights = [0.75 + 0.4 * len(rows) for rows in parts.values()]
    figure, columns = plt.subplots(len(parts), squeeze=False, figsize=(8, 0.4 + sum(heights)), layout="constrained",
                                   height_ratios=heights)
    for axes, ((dataset, way), rows) in zip(columns[:, 0], parts.items(), strict=True):
        lengths = {_length(row, group) for row, group in rows}
        for y, (row, group) in enumerate(rows):
            # Seeds one above the other: some errors are equal.
            at = [y + 0.16 * (i - (len(group.errors) - 1) / 2) for i in range(len(group.errors))]
            axes.plot(group.errors, at, "o", color="tab:blue", alpha=0.7, markersize=5, label="ours, a seed each")
            axes.plot([group.mean], [y], "|", color="tab:blue", markersize=16, label="ours, mean")
            if row.published:  # last, so that no dot of ours covers it
                axes.plot([row.published.error], [y], "D", color="black", fillstyle="none",
                          label="published, whole training")
        axes.set_title(", ".join([dataset, way, *(lengths if len(lengths) == 1 else ())]),
                       fontsize="small", loc="left")
        axes.set_yticks(range(len(rows)), list(_labels(rows, dataset, len(lengths) > 1)))
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(*_limits([other for (name, _), others in parts.items() if name == dataset for other in others]))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    columns[-1, 0].set_xlabel(f"top-1 {table.images} error, %")
    handles = {label: handle for axes in columns[:, 0]
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    # Outside: among the points its marks would be read as some of them.
    figure.legend(handles.values(), handles, frameon=False, fontsize="small", loc="outside upper right", ncols=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _length(row: Row, group: Finished) -> str:
    return f"{group.epochs} epochs" + (" (short)" if group.epochs < full_epochs(row.experiment) else "")


def _labels(rows: Panel, dataset: str, with_length: bool) -> Iterator[str]:
    """Yield what stands beside each row: what the title says already is left out."""
    for row, group in rows:
        label = row.label.replace("`", "").replace(f", {dataset}", "")
        yield textwrap.fill(f"{label}, {_length(row, group)}" if with_length else label, 34)


def _limits(rows: Panel) -> tuple[float, float]:
    """Return the ends of the axis of errors for ``rows``."""
    errors = [error for _, group in rows for error in group.errors]
    errors += [row.published.error for row, _ in rows if row.published]
    margin = max(0.05 * (max(errors) - min(errors)), (LEAST_SPAN - max(errors) + min(errors)) / 2)
    return min(errors) - margin, max(errors) + margin
