"""How much faster inference is with `ran_layers.fuse`: how much by folding, how much by the memory order.

    python benchmarks/fuse.py --out benchmarks/results
    python benchmarks/fuse.py --threads 1 --models ran_att92_cifar --batch-sizes 1

Four forms of each network take turns, so that whatever else the machine does meets all of them alike; a speedup is
the median over the rounds of the time of the plain network over the form's in the same round.
"""
from harness import ctrl_c, openmp  # noqa: F401  (before torch, see there)

# isort: split
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

import ran_layers
from harness.arguments import Parser, check_models, positive
from harness.checkpoint import check_out, write_json
from harness.environment import command_line, hardware, pick_device, synchronize, versions
from harness.errors import RunError, one_line_errors
from harness.precision import exact_float32

FORMS = ("plain", "plain, channels last", "folded", "folded, channels last (fuse)")


def four_forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the network as it is and fused, each in both memory orders."""
    fused = ran_layers.fuse(model)
    return dict(zip(FORMS, (
        model,
        copy.deepcopy(model).to(memory_format=torch.channels_last),
        copy.deepcopy(fused).to(memory_format=torch.contiguous_format),
        fused,
    )))


def set_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Give each BN the statistics of ``images``: without any, an untrained network's features grow without bound."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        model.train()(images)
    model.eval()


@torch.inference_mode()
def measure(model: nn.Module, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Time the four forms in turns; return their medians and speedups, and how far their outputs differ."""
    forms = four_forms(model)
    expected = model(images)
    largest_difference = max(float((form(images) - expected).abs().max()) for form in forms.values())  # warms up too
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            synchronize(images.device)
            start = time.perf_counter()
            form(images)
            synchronize(images.device)
            seconds[name].append(time.perf_counter() - start)
    return {
        "rounds": rounds,
        "largest_difference": largest_difference,
        "milliseconds": {name: round(1000 * statistics.median(times), 2) for name, times in seconds.items()},
        "speedup": {
            name: round(statistics.median(a / b for a, b in zip(seconds["plain"], times)), 2)
            for name, times in seconds.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["ran_att56_cifar", "ran_att92_cifar_orig"],
                        help="timm models")
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 64], help="images of a forward")
    parser.add_argument("--rounds", type=positive, default=15, help="measurements of each form, in turns")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, help="folder for fuse.json")
    args = parser.parse_args(argv)
    with one_line_errors():
        device = pick_device(args.device)
        if args.out:
            check_out(args.out / "fuse.json")
        exact_float32()
        results = measure_all(args, device)
        if args.out:
            command = command_line("fuse.py", sys.argv[1:] if argv is None else argv)
            write_json(args.out / "fuse.json", dict(
                command=command, precision="fp32", hardware=hardware(device), versions=versions(), results=results))


def measure_all(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print each network at each batch size.

    Raises:
        RunError: There is no such network, or fused it gives other outputs.
    """
    check_models(args.models)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    print(f"{'network':24}{'batch':>6}  {'form':30}{'ms':>10}{'speedup':>9}")
    for name in args.models:
        model = timm.create_model(name).to(device)
        size = model.pretrained_cfg["input_size"]
        set_statistics(model, torch.randn(32, *size, device=device))
        for batch_size in args.batch_sizes:
            result = measure(model, torch.randn(batch_size, *size, device=device), args.rounds)
            if result["largest_difference"] > 1e-4:
                raise RunError(f"fused, {name} is off by {result['largest_difference']}")
            results.append({"model": name, "batch_size": batch_size, **result})
            for form in FORMS:
                print(f"{name:24}{batch_size:6}  {form:30}{result['milliseconds'][form]:10.2f}"
                      f"{result['speedup'][form]:8.2f}x")
    return results


if __name__ == "__main__":
    main()
