"""Images per second of networks, beside this machine's own ceilings and beside the way others train them.

    python benchmarks/throughput.py --models ran_att56_cifar --batch-sizes 128 --out benchmarks/results

Cases, all in one process and in turn, so that a machine whose speed drifts is fair to each:

- ``harness``: the network as `cifar.py` trains it (channels last, bfloat16 where that is faster, compiled and replayed
  as a CUDA graph on a GPU, with our kernels on a CPU, data resident and augmented in batches);
- ``dataloader``: the same network in float32, NCHW, eager, fed by a DataLoader with per-image PIL transforms, as
  published re-implementations do;
- timm's ``resnet50`` and ``resnetv2_50`` in the harness's form, for the price of the attention.

Training goes from the stored image to the optimiser's step. Forward is the network alone in evaluation mode, on a batch
that is on the device; in the harness's form on a GPU compiled and recorded too.
"""
from harness import ctrl_c, extras, openmp  # noqa: F401  (before torch, see there)

# isort: split
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from harness.arguments import Parser, check_models, positive, positive_number
from harness.checkpoint import check_out, write_atomic, write_json
from harness.display import duration
from harness.environment import command_line, hardware, keep_freed_memory, machine, pick_device, synchronize, versions
from harness.errors import one_line_errors
from harness.gpu import check_gpu_kernels, choose_kernels
from harness.precision import pick_precision
from harness.throughput_cases import Case, Harness, Loaded, load

PRICE_OF_ATTENTION = ("resnet50", "resnetv2_50")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["ran_att56_cifar", "ran_att92_cifar"],
                        help="timm models, beside its ResNets")
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[128], help="images of a step")
    parser.add_argument("--size", type=positive, default=32, help="side of the images, pixels")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--gpu-kernels", action=argparse.BooleanOptionalAction, default=False,
                        help="train in the harness's form with our kernels for GPUs")
    parser.add_argument("--rounds", type=positive, default=7, help="measurements of each case")
    parser.add_argument("--seconds", type=positive_number, default=1.0, help="least duration of one measurement")
    parser.add_argument("--out", type=Path, help="folder for throughput.json and throughput.png")
    parser.add_argument("--plot", type=Path, help="where the plot goes (default: into --out)")
    args = parser.parse_args(argv)
    with one_line_errors():
        check_models(args.models)
        plot = args.plot or (args.out and args.out / "throughput.png")
        for flag, file in (("--out", args.out and args.out / "throughput.json"), ("--plot", plot)):
            if file:
                check_out(file, flag)
        # First of all: forked workers share this process's memory, which it then writes to in copies.
        loaders = {batch_size: load(batch_size, args.size) for batch_size in args.batch_sizes}
        time.sleep(0.5)  # they fill their queues
        keep_freed_memory()
        device = pick_device(args.device)
        if args.gpu_kernels:
            check_gpu_kernels(device, "units")
        command = command_line("throughput.py", sys.argv[1:] if argv is None else argv)
        result = dict(command=command, **measure(args, device, loaders))
        print_table(result)
        if args.out:
            write_json(args.out / "throughput.json", result)
        if plot:
            write_atomic(plot, draw(result))


def measure(
        args: argparse.Namespace, device: torch.device, loaders: dict[int, Iterator[list[torch.Tensor]]],
) -> dict[str, Any]:
    """Time every case ``args.rounds`` times in turn; return medians, extremes, and the machine's ceilings.

    Args:
        loaders: What :func:`load` returned, by batch size.
    """
    choose_kernels(deterministic=False)
    cases: list[Case] = []

    def prepare(case: Case) -> None:
        case.warm_up()
        cases.append(case)
        # On a GPU that takes a minute or two for each network.
        print(f"prepared {case.name}, {case.form}, {case.precision}, batch {case.batch_size} in "
              f"{duration(case.compile_seconds)}", file=sys.stderr)

    for batch_size in args.batch_sizes:
        for name in dict.fromkeys((*args.models, *PRICE_OF_ATTENTION)):
            # timm's networks have no units that our kernels take.
            prepare(Harness(name, batch_size, args.size, device, args.gpu_kernels and name in args.models))
            if name in args.models:
                prepare(Loaded(name, batch_size, args.size, device, loaders[batch_size]))
    precision = pick_precision(device)  # of the faster matrix product, whatever each case trains in
    ceilings: dict[str, list[float]] = {"matmul_flops": [], "copy_bytes": []}
    for done in range(args.rounds):
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
        ceilings["matmul_flops"].append(matmul_flops(device, precision))
        ceilings["copy_bytes"].append(copy_bytes(device))
        for case in cases:
            case.measure(args.seconds)
    # The best round: a ceiling is what the machine can do.
    matmul, copy = max(ceilings["matmul_flops"]), max(ceilings["copy_bytes"])
    return dict(
        hardware=hardware(device), versions=versions(), precision=precision,
        ceilings={"matmul_flops_per_s": matmul, "copy_bytes_per_s": copy},
        cases=[case.summary(matmul) for case in cases],
    )


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = _best_of_three(lambda: a @ a, device)
    return 2 * side ** 3 / seconds


def copy_bytes(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.zeros(2 ** 28 if device.type == "cuda" else 2 ** 26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = _best_of_three(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / seconds


def _best_of_three(function: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def print_table(result: dict[str, Any]) -> None:
    """Print a line a case: medians, and in brackets the lowest and highest round."""
    ceilings = result["ceilings"]
    print(f"{machine(result['hardware'])}: matrix product in {result['precision']} "
          f"{ceilings['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    print(f"{'case':<42}{'batch':>6}{'forward, images/s':>24}{'train, images/s':>24}"
          f"{'of ceiling':>12}{'peak memory':>14}")
    for row in result["cases"]:
        speeds = [f"{row[k]['images_per_s']:.0f} ({row[k]['lowest']:.0f}-{row[k]['highest']:.0f})"
                  for k in ("forward", "train")]
        print(f"{named(row):<42}{row['batch_size']:>6}{speeds[0]:>24}{speeds[1]:>24}"
              f"{100 * row['train']['fraction_of_matmul']:>10.1f} %{(row['peak_bytes'] or 0) / 2 ** 20:>10.0f} MiB")


def named(row: dict[str, Any]) -> str:
    return ", ".join(row[key] for key in ("model", "form", "precision"))


def draw(result: dict[str, Any]) -> bytes:
    """Return a PNG with a bar a case: images/s of training, with the lowest and highest round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["cases"][::-1]
    medians = [row["train"]["images_per_s"] for row in rows]
    spread = [[m - row["train"]["lowest"] for m, row in zip(medians, rows)],
              [row["train"]["highest"] - m for m, row in zip(medians, rows)]]
    colors = ["tab:blue" if row["form"] == "harness" else "tab:gray" for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(rows)), layout="constrained")
    axes.barh([f"{named(row)}, batch {row['batch_size']}" for row in rows], medians, xerr=spread, color=colors,
              capsize=3)
    axes.set(xlabel="training, images/s", title=machine(result["hardware"]))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
