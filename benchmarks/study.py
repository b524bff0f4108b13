"""Run the experiments of the study, and write its tables from their results.

    python benchmarks/study.py --list                              # every experiment and what is there of it
    python benchmarks/study.py --run att56-cifar10-best            # one of them, all its seeds
    python benchmarks/study.py --table learning --epochs 10        # those of one table, in a short form
    python benchmarks/study.py --all --budget 120                  # what fits into two hours
    python benchmarks/study.py --report                            # docs/results.md from benchmarks/results/study
    python benchmarks/study.py --table learning --results mine     # all rows anew, and mine/results.md from them

Experiments are rows of `studies/experiments.py`. Each run is one call of `cifar.py` in a folder of its own, is resumed
if it was interrupted, and is never run again once its result lies in --results: by default benchmarks/results/study,
where those of other machines lie, which are compared with none of yours if they were trained in another way.
"""
from harness import ctrl_c, extras  # noqa: F401  (before torch, see there)

# isort: split
import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm import create_model

import ran_layers  # noqa: F401  (registers the networks with timm)
from harness.arguments import Parser, positive
from harness.checkpoint import FILE_NAME, load_checkpoint
from harness.display import count, duration
from harness.environment import hardware, launcher, machine, pick_device
from harness.errors import RunError, one_line_errors
from harness.evaluate import count_macs
from harness.kernels.cpu_choice import chooses_kernels
from harness.precision import pick_precision
from studies.experiments import EXPERIMENTS, TABLES, Experiment
from studies.report import read_page, write_report
from studies.results import arguments_of, full_epochs, load_result, load_results, recipe_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "study"


@dataclass(frozen=True)
class Run:
    """One experiment with one seed and a number of epochs."""

    name: str
    epochs: int
    seed: int

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}, {count(self.epochs, 'epoch')}"

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.epochs}ep-seed{self.seed}"

    def result(self, results: Path) -> Path:
        return results / f"{self.stem}.json"

    def state(self, results: Path, runs: Path) -> str:
        """``done``, ``interrupted`` or ``missing``."""
        if self.result(results).is_file():
            return "done"
        return "interrupted" if (runs / self.stem / FILE_NAME).is_file() else "missing"

    def progress(self, runs: Path) -> float:
        """The fraction of its epochs that an interrupted run has behind it."""
        folder = runs / self.stem
        try:
            return len(load_checkpoint(folder)[1]["epochs"]) / self.epochs if (folder / FILE_NAME).is_file() else 0.0
        except RunError:  # which the run itself tells when its turn comes
            return 0.0


def plan(names: Sequence[str], epochs: int | None, seeds: Sequence[int] | None) -> list[Run]:
    """Return the runs of the experiments ``names``, seed by seed, so that comparisons are whole early."""
    depth = max((len(seeds or EXPERIMENTS[name].seeds) for name in names), default=0)
    return list(dict.fromkeys(  # what is asked for twice is run once
        Run(name, epochs or full_epochs(name), (seeds or EXPERIMENTS[name].seeds)[i])
        for i in range(depth) for name in names if i < len(seeds or EXPERIMENTS[name].seeds)
    ))


@cache
def macs_of(model: str, model_kwargs: str) -> int:
    """Return the multiply-accumulate operations of ``model`` for one image; ``model_kwargs`` is JSON."""
    return count_macs(create_model(model, num_classes=10, **json.loads(model_kwargs)))


@cache
def common_precision(device: torch.device) -> str:
    """Return the precision in which `cifar.py` trains an Attention-56 on ``device``.

    Left to itself it picks another for other networks, on some processors, and runs in two precisions are not compared.
    """
    return pick_precision(device, create_model("ran_att56_cifar"), chooses_kernels(device))


class Clock:
    """Estimates how long a run has to go on this machine, from what finished here, by MACs."""

    def __init__(self, results: Path, runs: Path, device: torch.device) -> None:
        self.runs = runs
        self.name = machine(hardware(device))
        self.speeds: list[tuple[tuple[Any, ...], float]] = []  # model, recipe and batch size, and MACs/s
        for groups in load_results(results).values():
            for group in groups:
                for result in group.results.values():
                    self.add(result)
        for file in (HERE.parent / "ran_layers" / "weights").glob("*.json"):
            self.add(json.loads(file.read_text()))

    def add(self, result: dict[str, Any]) -> None:
        """Learn from a finished run, if it was on such a machine."""
        if machine(result["hardware"]) == self.name:
            key = result["model"], result["recipe"], result["settings"]["batch_size"]
            self.speeds.append((key, result["images_per_s"] * result["macs"]))

    def seconds(self, run: Run) -> float | None:
        """Return the estimate from the runs most like ``run``, None if nothing finished here yet."""
        experiment = run.experiment
        key = experiment.model, experiment.recipe, recipe_of(run.name).batch_size
        rows = 50_000 - arguments_of(run.name).holdout
        for alike in (3, 2, 0):  # of the model, the recipe and the batch size
            speeds = [speed for known, speed in self.speeds if known[:alike] == key[:alike]]
            if speeds:
                macs = macs_of(experiment.model, json.dumps(dict(experiment.model_kwargs), sort_keys=True))
                return run.epochs * (1 - run.progress(self.runs)) * rows * macs / statistics.median(speeds)
        return None


def choose(runs: list[Run], clock: Clock, seconds: float | None) -> tuple[list[Run], list[Run]]:
    """Split ``runs`` into those that fit into ``seconds`` together, in their order, and the rest.

    Where none fits, it is the first: stopped in time it is saved, and resumed in the next ``seconds``.
    """
    if seconds is None:
        return runs, []
    chosen, left = [], []
    for run in runs:
        estimate = clock.seconds(run) or 0.0
        if estimate <= seconds:
            chosen.append(run)
            seconds -= estimate
        else:
            left.append(run)
    return (chosen, left) if chosen else (left[:1], left[1:])


def execute(run: Run, args: argparse.Namespace, deadline: float | None) -> bool:
    """Run ``run`` to its end or to the deadline (a time of ``time.monotonic``); return whether its result is there.

    One that goes on keeps the precision that it began in.

    Raises:
        RunError: The training failed.
    """
    out = args.runs / run.stem
    command = [*launcher(args.nproc), str(HERE / "cifar.py"), *run.experiment.arguments(), "--epochs", str(run.epochs),
               "--seed", str(run.seed), "--out", str(out)]
    for flag in ("data_dir", "device"):
        if getattr(args, flag):
            command += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    if not (out / "result.json").is_file():
        if (out / FILE_NAME).is_file():
            command.append("--resume")
        else:
            command += ["--precision", args.precision or common_precision(pick_device(args.device))]
        stopped = False
        with ctrl_c.all_as_ctrl_c():  # the training must not outlive this process
            child = subprocess.Popen(command)
            try:
                child.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
                # The training saves itself; Ctrl-C in a terminal has reached it already.
                stopped = True
                child.send_signal(signal.SIGTERM)
                child.wait()
                if isinstance(reason, KeyboardInterrupt):
                    raise
        if stopped:
            return False
        if child.returncode:
            raise RunError(f"{run.title} ended with exit code {child.returncode}; see above")
    load_result(out / "result.json", run.name, run.epochs, run.seed)
    shutil.copyfile(out / "result.json", run.result(args.results).with_suffix(".tmp"))
    run.result(args.results).with_suffix(".tmp").replace(run.result(args.results))
    return True


def list_experiments(args: argparse.Namespace) -> None:
    """Print each experiment with the runs that are there, of its full form and of shorter ones."""
    finished = load_results(args.results)
    for key, table in TABLES.items():
        print(f"{key}: {table.title}")
        for row in table.rows:
            full = full_epochs(row.experiment)
            runs = plan([row.experiment], args.epochs, args.seeds)
            states = [run.state(args.results, args.runs) for run in runs]
            text = f"{states.count('done')} of {len(runs)} runs of {runs[0].epochs} epochs"
            if "interrupted" in states:
                text += f", {states.count('interrupted')} interrupted"
            others = Counter[int]()
            for group in finished.get(row.experiment, ()):
                others[group.epochs] += len(group.results)
            for epochs, there in sorted(others.items()):
                if epochs != runs[0].epochs:
                    text += f"; {there} of {count(epochs, 'epoch')}{' (short)' if epochs < full else ''}"
            published = f"  [{row.published.source}: {row.published.error:.2f} %]" if row.published else ""
            print(f"  {row.experiment:<28} {text}{published}")


def run_all(names: Sequence[str], args: argparse.Namespace) -> None:
    """Run what is missing of the experiments ``names``, as far as the budget goes, and rewrite the tables.

    Raises:
        RunError: Runs failed, which the others do not wait for, or a folder is not to be used, before any run.
    """
    for flag, folder in (("results", args.results), ("runs", args.runs)):
        try:  # before hours of training
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--{flag} {folder} is not a folder and cannot be made one ({error.strerror})") from None
    read_page(args.docs, args.results)
    runs = [run for run in plan(names, args.epochs, args.seeds) if run.state(args.results, args.runs) != "done"]
    clock = Clock(args.results, args.runs, pick_device(args.device))
    seconds = None if args.budget is None else 60 * args.budget
    deadline = None if seconds is None else time.monotonic() + seconds
    chosen, left = choose(runs, clock, seconds)
    if not runs:
        print("nothing is missing")
    estimates = [clock.seconds(run) for run in chosen]
    begun_all_the_same = seconds is not None and len(chosen) == 1 and (estimates[0] or 0) > seconds
    if unfit := [*chosen, *left] if begun_all_the_same else left:
        print(f"{len(unfit)} of {len(runs)} runs do not fit into {args.budget:g} minutes; the first is "
              f"{unfit[0].title}, about {duration(clock.seconds(unfit[0]) or 0)}"
              + (", which is begun all the same" if begun_all_the_same else ""))
    if len(chosen) > 1 and None not in estimates:
        print(f"{len(chosen)} runs, about {duration(sum(filter(None, estimates)))} in all", flush=True)
    failed = []
    try:
        for i, run in enumerate(chosen, 1):
            estimate = clock.seconds(run)
            about = f", about {duration(estimate)}" if estimate else ""
            print(f"[{i}/{len(chosen)}] {run.title}{about}", flush=True)
            try:
                finished = execute(run, args, deadline)
            except RunError as error:  # as where an optimiser diverges: the others run all the same
                print(f"failed: {error}", file=sys.stderr, flush=True)
                failed.append(run.title)
                continue
            if not finished:
                begun = run.state(args.results, args.runs) == "interrupted"
                print(f"stopped in time; {run.title} " + ("is saved and goes on next time" if begun else
                                                          "had not begun to train"))
                break
            clock.add(json.loads(run.result(args.results).read_text()))
    finally:
        if any(args.results.glob("*.json")):
            write_report(args.results, args.docs)
    if any(args.results.glob("*.json")):
        print(f"tables: {args.docs / 'results.md'}")
    if failed:
        raise RunError(f"{len(failed)} of {len(chosen)} runs failed: {'; '.join(failed)}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="show every experiment and its state")
    action.add_argument("--run", nargs="+", metavar="NAME", help="run these experiments")
    action.add_argument("--table", choices=TABLES, help="run the experiments of one table")
    action.add_argument("--all", action="store_true", help="run all that are missing")
    action.add_argument("--report", action="store_true", help="only write docs/results.md and its plots")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="run what fits, and stop in time")
    parser.add_argument("--epochs", type=positive, help="a shorter (or longer) form than the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the experiments'")
    parser.add_argument("--data-dir", help="Parquet files on disk, as for cifar.py")
    parser.add_argument("--device", help="as for cifar.py")
    parser.add_argument("--precision", choices=("bf16", "fp32"),
                        help="of all networks, so that they can be compared (default: that of ran_att56_cifar there)")
    parser.add_argument("--nproc", type=positive, default=1, help="processes of torchrun")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/study with the default --results, "
                                                  "otherwise runs in the folder of the results)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, help="folder of results.md, whose tables are written anew (default: docs "
                                                  "with the default --results, otherwise the folder of the results)")
    args = parser.parse_args(argv)
    ours = args.results.resolve() == RESULTS
    args.docs = args.docs or (HERE.parent / "docs" if ours else args.results)
    args.runs = args.runs or (Path("runs") / "study" if ours else args.results / "runs")
    with one_line_errors():
        unknown = sorted(set(args.run or ()) - set(EXPERIMENTS))
        if unknown:
            raise RunError(f"--run {unknown[0]} is not an experiment; --list shows them")
        if args.budget is not None and not args.budget > 0:  # nor NaN
            raise RunError(f"--budget must be above 0 minutes, got {args.budget:g}")
        if args.list:
            list_experiments(args)
        elif args.report:
            write_report(args.results, args.docs)
        else:
            names = args.run or list(EXPERIMENTS)
            if args.table:
                names = list(dict.fromkeys(row.experiment for row in TABLES[args.table].rows))
            run_all(names, args)


if __name__ == "__main__":
    main()
