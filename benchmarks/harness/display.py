"""What a run shows: its plan, its progress in a terminal or on a pipe, and the curves it leaves."""
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
import torch.nn as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ran_layers import AttentionModule
from ran_layers.mask_figure import draw_masks


def duration(seconds: float) -> str:
    """``75`` -> ``'1:15'``, ``4000`` -> ``'1:06:40'``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def count(number: int, noun: str) -> str:
    """``(1, 'epoch')`` -> ``'1 epoch'``, ``(2, 'epoch')`` -> ``'2 epochs'``."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def show_plan(rows: dict[str, str]) -> None:
    """Print the plan as a table in a terminal, as plain lines on a pipe."""
    console = Console(markup=False)  # folders may have brackets in their names
    if not console.is_terminal:
        for name, value in rows.items():
            print(f"{name}: {value}", flush=True)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


class Display:
    """Progress of a training: a bar with loss, accuracy, images/s and time left; one line an epoch on a pipe.

    Args:
        work: What of the computing is done at a fraction of the steps, in any unit.
        wait: Waits until the device has done the steps that it was given; called once, before time is estimated.
    """

    def __init__(
            self, epochs: int, steps_per_epoch: int, batch_size: int, first_step: int, work: Callable[[float], float],
            quiet: bool = False, wait: Callable[[], None] = lambda: None) -> None:
        self.epochs, self.steps_per_epoch, self.batch_size = epochs, steps_per_epoch, batch_size
        self.work, self.wait = work, wait
        self.start, self.first_step = time.perf_counter(), first_step
        self.console = Console(markup=False)
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[stats]}"),
            console=self.console, transient=True, disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps_per_epoch, stats="")
        self.estimated = False

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def images_per_s(self, step: int) -> float:
        """Mean speed since the start of this process."""
        return (step - self.first_step) * self.batch_size / max(time.perf_counter() - self.start, 1e-9)

    def time_left(self, step: int) -> float:
        """Seconds to the end, where the work so far is a measure of the rest; one step at least must be done."""
        first, now = (self.work(done / (self.epochs * self.steps_per_epoch)) for done in (self.first_step, step))
        return (self.work(1.0) - now) * (time.perf_counter() - self.start) / (now - first)

    def step(self, step: int, loss: float | None = None, top1: float | None = None) -> None:
        """Note that ``step`` steps are done; ``loss`` and ``top1`` (percent) are means over the epoch so far."""
        epoch, in_epoch = divmod(step - 1, self.steps_per_epoch)
        if not self.estimated and step - self.first_step == 10:
            self.estimated = True
            self.wait()
            self.print(f"estimated time: {duration(self.time_left(step))} at {self.images_per_s(step):.0f} images/s")
        if self.progress.disable:
            return
        stats = f"{self.images_per_s(step):.0f} images/s, {duration(self.time_left(step))} left"
        if loss is not None and top1 is not None:
            stats = f"loss {loss:.3f}, top-1 {top1:.2f} %, {stats}"
        self.progress.update(
            self.task, completed=in_epoch + 1, description=f"epoch {epoch + 1}/{self.epochs}", stats=stats)

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        text = (f"epoch {row['epoch']}/{self.epochs}  loss {row['train_loss']:.3f}  "
                f"train top-1 {row['train_top1']:.2f} %")
        if "eval_top1" in row:
            text += f"  {row['eval_split']} top-1 {row['eval_top1']:.2f} %"
        self.print(f"{text}  {row['images_per_s']:.0f} images/s  "
                   f"{duration(self.time_left(row['epoch'] * self.steps_per_epoch))} left")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self.quiet:
            return
        if self.console.is_terminal:
            self.progress.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def draw_masks_of(model: nn.Module, images: torch.Tensor, names: list[str]) -> bytes | None:
    """Return a PNG of the masks over ``images`` ``(rows, height, width, 3)``, None if the network has no masks."""
    from PIL import Image

    if not any(isinstance(module, AttentionModule) for module in model.modules()):
        return None
    buffer = BytesIO()
    draw_masks(model, [Image.fromarray(image.numpy()) for image in images], names).save(buffer, "PNG")
    return buffer.getvalue()


def draw_curves(epochs: list[dict[str, Any]], title: str) -> bytes:
    """Return a PNG with the loss and the error of each epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = [row["epoch"] for row in epochs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(x, [row["train_loss"] for row in epochs], color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss")
    right.plot(x, [100 - row["train_top1"] for row in epochs], color="tab:blue", label="training (augmented)")
    evaluated = [row for row in epochs if "eval_top1" in row]
    if evaluated:
        right.plot([row["epoch"] for row in evaluated], [100 - row["eval_top1"] for row in evaluated],
                   color="tab:orange", label=evaluated[0]["eval_split"])
    right.set(xlabel="epoch", ylabel="top-1 error, %", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
