"""Training speed of one process against several, by short trainings on digits.

    python benchmarks/scaling.py --out benchmarks/results            # 1 against 2
    python benchmarks/scaling.py --processes 1 2 4 8                 # on a machine with 8 GPUs

The forms take turns, so that whatever else the machine does meets all of them alike. The speed of a run is that of
its fastest epoch after the first; of a form, the median of its runs.
"""
from harness import ctrl_c  # before torch, see there

# isort: split
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness.arguments import Parser, positive
from harness.checkpoint import check_out, write_json
from harness.environment import command_line, hardware, launcher, pick_device, versions
from harness.errors import RunError, one_line_errors

SCRIPT = Path(__file__).parent / "cifar.py"


def forms(processes: list[int], device: torch.device) -> list[dict[str, Any]]:
    """Return the ways to train that are compared: processes, threads of each on a CPU, batch normalisation."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = []
    for n in processes:
        if device.type == "cpu":
            threads = sorted({1, cores}) if n == 1 else [max(1, cores // n)]
        else:
            threads = [1]
        for count in threads:
            found += [dict(processes=n, threads=count, sync_bn=sync) for sync in ((True, False) if n > 1 else (False,))]
    return found


def measure(form: dict[str, Any], args: argparse.Namespace, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Return images/s of one training in ``form``, and the settings that it ran with.

    Raises:
        RunError: The training failed.
    """
    with TemporaryDirectory() as folder:
        with subprocess.Popen(
            [*launcher(form["processes"]), str(SCRIPT), "--dataset", "digits", "--model", args.model,
             "--device", device.type,
             "--recipe", args.recipe, "--epochs", str(args.epochs), "--batch-size", str(args.batch_size),
             "--limit", str(args.limit), "--resolutions", "--sync-bn" if form["sync_bn"] else "--no-sync-bn",
             "--out", f"{folder}/run"],
            env={**os.environ, "OMP_NUM_THREADS": str(form["threads"])}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True) as child:
            try:
                _, said = child.communicate()
            except BaseException:
                child.terminate()  # which torchrun passes on, where SIGKILL would leave its processes
                raise
        if child.returncode:
            lines = said.strip().splitlines() or ["no message"]
            told = [line for line in lines if line.startswith("error")]  # torchrun adds a page of its own
            raise RunError(f"the training with {form['processes']} processes failed: {(told or lines)[-1]}")
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    return max(row["images_per_s"] for row in result["epochs"][1:]), result["settings"]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", nargs="+", type=positive, default=[1, 2], help="numbers of them to compare")
    parser.add_argument("--model", default="ran_att56_cifar", help="a timm model")
    parser.add_argument("--recipe", default="best", help="as for cifar.py, at full resolution")
    parser.add_argument("--batch-size", type=positive, default=256, help="of all processes together")
    parser.add_argument("--limit", type=positive, default=1280, help="training images")
    parser.add_argument("--epochs", type=int, default=3, help="of each run, at least 2")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each form")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for scaling.json")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {args.epochs}")
    with one_line_errors(), ctrl_c.all_as_ctrl_c():  # no training outlives this process
        device = pick_device(args.device)
        if args.out:
            check_out(args.out / "scaling.json")
        rows = [dict(form, runs=[]) for form in forms(args.processes, device)]
        for _ in range(args.rounds):
            for row in rows:
                speed, settings = measure(row, args, device)
                row["runs"].append(round(speed, 1))
                row["cpu_kernels"] = settings["cpu_kernels"]
        print(f"{'processes':>9}{'threads':>9}{'sync-bn':>9}{'images/s':>10}   (lowest-highest)")
        for row in rows:
            row["images_per_s"] = statistics.median(row["runs"])
            print(f"{row['processes']:>9}{row['threads']:>9}{'yes' if row['sync_bn'] else 'no':>9}"
                  f"{row['images_per_s']:>10.0f}   ({min(row['runs']):.0f}-{max(row['runs']):.0f})")
        if args.out:
            report = dict(
                command=command_line("scaling.py", sys.argv[1:] if argv is None else argv),
                model=args.model, recipe=args.recipe, batch_size=args.batch_size, precision=settings["precision"],
                hardware=hardware(device), versions=versions(), rows=rows)
            write_json(args.out / "scaling.json", report)


if __name__ == "__main__":
    main()
