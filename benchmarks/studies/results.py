"""The finished runs of the study: what `cifar.py` left of each, checked, and grouped by how it was trained."""
import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from harness.display import count
from harness.environment import machine
from harness.errors import RunError
from harness.options import parse_args
from harness.recipes import Recipe, make_recipe
from studies.experiments import EXPERIMENTS

FILE = re.compile(r"(?P<name>.+)-(?P<epochs>\d+)ep-seed(?P<seed>\d+)\.json")


class Finished(NamedTuple):
    """Runs of an experiment at one number of epochs, trained under the same conditions: a result for each seed."""

    epochs: int
    results: dict[int, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """The result of one of the seeds, for what all share."""
        return next(iter(self.results.values()))

    @property
    def conditions(self) -> tuple[Any, ...]:
        return conditions(self.first)

    @property
    def errors(self) -> list[float]:
        return [error_of(result) for result in self.results.values()]

    @property
    def mean(self) -> float:
        return statistics.mean(self.errors)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None

    @property
    def errors_text(self) -> str:
        """Mean and deviation of the errors in percent, and of how many seeds they are."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread} ({count(len(self.errors), 'seed')})"


def error_of(result: dict[str, Any]) -> float:
    """Return the error of a run in percent: on its held-out images where it has some, otherwise on the test images."""
    if result["settings"]["holdout"]:
        return float(100 - result["epochs"][-1]["eval_top1"])
    return float(result["final"]["error"])


def load_results(folder: Path) -> dict[str, list[Finished]]:
    """Return what is finished of each experiment, fewest epochs first.

    Raises:
        RunError: A file there is damaged, or not the result that its name says.
    """
    found: dict[str, dict[tuple[Any, ...], dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*.json")):
        match = FILE.fullmatch(file.name)
        if match is None or match["name"] not in EXPERIMENTS:
            raise RunError(f"{file} is not the result of an experiment of the study; keep it elsewhere")
        name, epochs, seed = match["name"], int(match["epochs"]), int(match["seed"])
        result = load_result(file, name, epochs, seed)
        found[name][epochs, conditions(result)][seed] = result
    return {
        name: sorted((Finished(epochs, results) for (epochs, _), results in groups.items()),
                     key=lambda group: (group.epochs, min(group.results)))
        for name, groups in found.items()}


def load_result(file: Path, name: str, epochs: int, seed: int) -> dict[str, Any]:
    """Return the result of the experiment ``name`` from ``file``.

    Raises:
        RunError: The file is damaged, or of another run, as where it was copied or renamed.
    """
    run = f"{name}, seed {seed}, {count(epochs, 'epoch')}"
    try:
        result = json.loads(file.read_text())
        settings = result["settings"]
        found = [result["model"], result["dataset"], result["recipe"], settings["epochs"], result["seed"],
                 settings["model_kwargs"]]
        hash(conditions(result))
        rounds = len(result["epochs"])
        # What the tables and the estimates of time read later.
        figures = [float(result[key]) for key in ("params", "macs", "images_per_s")] + [error_of(result)]
        if not all(map(math.isfinite, figures)) or not all(
                isinstance(text, str) for text in (machine(result["hardware"]), result["command"])):
            raise ValueError("not a figure")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({error!r}); remove it to run {run} anew") from error
    asked = arguments_of(name, "--epochs", str(epochs), "--seed", str(seed))
    expected = [asked.model, asked.dataset, asked.recipe, epochs, seed, asked.model_kwargs]
    # Older results lack the settings that came later, which had the values of today.
    recipe = asdict(make_recipe(asked.recipe, asked.dataset, asked.overrides))
    others = {key: value for key, value in recipe.items() if key in settings or key in asked.overrides}
    others |= dict(label_noise=asked.label_noise, limit=asked.limit, holdout=asked.holdout)
    differing = [key for key, value in json.loads(json.dumps(others)).items() if settings.get(key) != value]
    if asked.label_noise and "labels_sha256" not in result:
        differing.append("from before wrong labels had random numbers of their own")
    if settings.get("initial_checkpoint"):
        differing.append("initial_checkpoint")
    if rounds != epochs:
        differing.append(f"{rounds} epochs are recorded")
    if found != expected or differing:
        raise RunError(f"{file} is of another run than {run}{f' ({differing[0]})' if differing else ''}; remove it, or "
                       "the folder that it is in, to run that")
    return result


def conditions(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a run was trained with, which two runs must share to be compared.

    Two processors differ by rounding, as two orders of the same sums on one do: not more than the seeds differ.
    """
    settings = result["settings"]
    return (result["hardware"]["device"], result["versions"]["torch"], result["processes"], settings["precision"],
            settings.get("cpu_kernels", False), settings.get("gpu_kernels", False))


def conditions_text(group: Finished) -> str:
    """Return what else than the machine decides whether two runs can be compared."""
    settings = group.first["settings"]
    kernels = ", fused kernels" if settings.get("cpu_kernels") or settings.get("gpu_kernels") else ""
    return f"{settings['precision']}{kernels}, torch {group.first['versions']['torch']}"


def arguments_of(name: str, *more: str) -> argparse.Namespace:
    """Return what `cifar.py` makes of an experiment's command line, with ``more`` words at its end."""
    return parse_args([*EXPERIMENTS[name].arguments(), *more])


def recipe_of(name: str) -> Recipe:
    """Return the hyper-parameters of an experiment in its full form."""
    args = arguments_of(name)
    return make_recipe(args.recipe, args.dataset, args.overrides)


def full_epochs(name: str) -> int:
    """Epochs of an experiment in its full form."""
    return recipe_of(name).epochs
