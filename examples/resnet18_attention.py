"""timm's resnet18 with and without Attention Modules, trained alike on CIFAR-10: what is gained, and what it costs.

    python examples/resnet18_attention.py                      # part of CIFAR-10, a few minutes on two CPU cores
    python examples/resnet18_attention.py --data-dir DIR       # ... from Parquet files on disk
    python examples/resnet18_attention.py --images 50000 --epochs 30 --seeds 0 1 2   # ... and hours
"""
import argparse
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.scheduler import CosineLRScheduler
from training import (
    Dataset,
    Parser,
    RunError,
    accuracy,
    check_out,
    load_dataset,
    one_line_errors,
    pick_device,
    positive,
    positive_number,
    steps_of,
    train,
    write_report,
)

import ran_layers

MASK_DEPTHS = {"layer1": 3, "layer2": 2, "layer3": 1}  # the paper's: each mask reaches the resolution of the last stage


def create_model(attention: bool, seed: int) -> nn.Module:
    """Return resnet18 for 32-px images; both variants begin with the same weights and the same outputs."""
    torch.manual_seed(seed)
    # Its stages are made for images of 224 px: on 32 px they have 8, 4, 2 and 1.
    model = timm.create_model("resnet18", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    if attention:
        for name, mask_depth in MASK_DEPTHS.items():
            ran_layers.insert_attention(model, name, mask_depth=mask_depth)
    return model


def run(attention: bool, seed: int, data: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    device = pick_device(args.device)
    model = create_model(attention, seed).to(device, memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim >= 2]  # neither BN nor the modules' gates are decayed
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.SGD(
        [dict(params=decay, weight_decay=5e-4), dict(params=rest)], lr=args.lr, momentum=0.9, nesterov=True)
    steps = steps_of(data, args.images, args.batch_size, args.epochs)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 5, t_in_epochs=False)
    seconds = train(
        model, optimizer, scheduler, data, epochs=args.epochs, batch_size=args.batch_size, images=args.images,
        device=device, seed=seed)
    figures = {
        "attention": attention,
        "seed": seed,
        "accuracy": round(accuracy(model, data, device), 4),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(f"{'with' if attention else 'without'} attention, seed {seed}: {100 * figures['accuracy']:.2f} % in "
          f"{seconds:.0f} s, {figures['parameters'] / 1e6:.2f} M parameters", flush=True)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", help="Parquet files on disk, in the Hub's layout (default: the Hub)")
    parser.add_argument("--images", type=positive, default=5000, help="train on so many images")
    parser.add_argument("--epochs", type=positive, default=5, help="passes over them")
    parser.add_argument("--batch-size", type=positive, default=128, help="images of a step")
    parser.add_argument("--lr", type=positive_number, default=0.1, help="highest learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a pair of trainings for each")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/resnet18_attention.json"), help="the figures")
    args = parser.parse_args(argv)
    with one_line_errors():
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Train both networks with each seed, and write what the modules change and cost.

    Raises:
        RunError: There are no such data or device, the batches are too small, or the report cannot be written.
    """
    device = pick_device(args.device)
    check_out(args.out)
    data = load_dataset("cifar10", args.data_dir)
    args.images = min(args.images, len(data.train_labels))
    if min(args.images, args.batch_size) < 2:
        raise RunError("--images and --batch-size must be at least 2: the last maps have one pixel, of which batch "
                       "normalisation needs more")
    args.seeds = list(dict.fromkeys(args.seeds))
    runs = [run(attention, seed, data, args) for seed in args.seeds for attention in (False, True)]
    pairs = list(zip(runs[::2], runs[1::2]))  # without attention and with it, of one seed
    gains = [100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs]
    gain, spread = statistics.mean(gains), statistics.stdev(gains) if len(gains) > 1 else None
    cost = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    print(f"attention changes the accuracy by {gain:+.2f} points (mean of {len(args.seeds)} seeds, "
          f"{'spread unknown' if spread is None else f'deviation {spread:.2f}'}) at {cost:.2f} times the training time")
    write_report(
        args.out, device, images=args.images, epochs=args.epochs, batch_size=args.batch_size,
        lr=args.lr, gain_in_points=round(gain, 2), deviation_of_gain=spread and round(spread, 2),
        time_ratio=round(cost, 2),
        runs=[{**figures, "seconds": round(figures["seconds"], 1)} for figures in runs])


if __name__ == "__main__":
    main()
