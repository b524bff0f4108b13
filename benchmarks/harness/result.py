"""What a finished run leaves in its folder: the model, result.json, curves.png and masks.png."""
import json
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import write_atomic, write_json
from harness.data import Dataset
from harness.display import draw_curves, draw_masks_of, duration
from harness.errors import RunError
from harness.evaluate import evaluate
from harness.export import load_exported
from harness.recipes import Recipe

TOP1_GOALS = (90, 94, 95, 96)


def write_result(
        out: Path, data: Dataset, result: dict[str, Any], device: torch.device, autocast: Any,
) -> None:
    """Evaluate the exported model on the test set, write result.json and the pictures, and print the figure."""
    model = load_exported(out).to(device, memory_format=torch.channels_last)
    scores = evaluate(model, data.test_images, data.test_labels, device, autocast)
    flipped = evaluate(model, data.test_images, data.test_labels, device, autocast, flip=True)
    result["final"] = dict(scores, error=100 - scores["top1"], top1_flip=flipped["top1"])
    result["seconds_to_top1"] = seconds_to_top1(result["epochs"], scores["top1"])
    write_json(out / "result.json", result)
    title = f"{result['model']} on {result['dataset']}: {result['final']['error']:.2f} % test error"
    write_atomic(out / "curves.png", draw_curves(result["epochs"], title))
    picture = draw_masks_of(
        model.cpu(), data.test_images[:6], [data.class_names[label] for label in data.test_labels[:6]])
    if picture is not None:
        write_atomic(out / "masks.png", picture)
    print_final(result, f"trained in {duration(result['seconds'])}; saved in {out}")


def selection(holdout: int, recipe: Recipe, epochs: list[dict[str, Any]]) -> str:
    """Say what the weights were chosen by, and which images were looked at during the training."""
    watched = {row.get("eval_split") for row in epochs}
    return ("none: the weights are those of the last step" + (" (their moving average)" if recipe.ema_decay else "")
            + (f"; {holdout} training images were held out and watched" if "held-out" in watched else "")
            + ("; the test set was watched, nothing was picked by it" if "test" in watched else ""))


def earlier_runs(weights: Path) -> list[dict[str, Any]]:
    """Return what led to the file ``weights``, run by run, from the result.json beside it; nothing if there is none.

    Raises:
        RunError: The result.json is damaged.
    """
    record = weights.with_name("result.json")
    if not record.is_file():
        return []
    try:
        result = json.loads(record.read_text())
        last = {name: result[name] for name in ("command", "seed", "seconds", "hardware", "versions")}
        return [*result.get("earlier", ()), dict(
            last, epochs=len(result["epochs"]), error=result["final"]["error"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{record} is damaged ({error}); remove it, or give the weights from another folder") from error


def seconds_to_top1(epochs: list[dict[str, Any]], final_top1: float) -> dict[str, float | None]:
    """Return the seconds of training after which test accuracy was first seen to reach each goal, None if it was not.

    It is seen after the last epoch, and with ``--eval-every`` after others. Compilation and evaluation are not counted.
    """
    seconds, reached = 0.0, {f"{goal}": None for goal in TOP1_GOALS}
    for row in epochs:
        seconds += row["seconds"]
        seen = row["eval_top1"] if row.get("eval_split") == "test" else None
        if row is epochs[-1]:
            seen = final_top1
        for goal in reached:
            if reached[goal] is None and seen is not None and seen >= float(goal):
                reached[goal] = round(seconds, 1)
    return reached


def print_final(result: dict[str, Any], remark: str = "") -> None:
    """Print the accuracy, the headline of a run, and a ``remark`` behind it."""
    final = result["final"]
    print(f"{result['model']} on {result['dataset']}: test top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} %, "
          f"error {100 - final['top1']:.2f} %" + (f", {remark}" if remark else ""), flush=True)
