"""Images per second of networks, beside this machine's own ceilings and beside the way others train them.

    python benchmarks/throughput.py --models ran_att56_cifar --batch-sizes 128 --out benchmarks/results

Cases, all in one process and in turn, so that a machine whose speed drifts is fair to each:

- ``harness``: the network as `cifar.py` trains it (channels last, bfloat16 where that is fast, compiled on a
  GPU, with our kernels on a CPU, data resident and augmented in batches);
- ``dataloader``: the same network in float32, NCHW, eager, fed by a DataLoader with per-image PIL transforms, as
  published re-implementations do;
- timm's ``resnet50`` and ``resnetv2_50`` in the harness's form, for the price of the attention.
"""
import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import augment
import torch
import torch.nn.functional as F
from arguments import check_models, positive, positive_seconds
from checkpoint import write_atomic, write_json
from cpu_kernels import kernels_pay, why_no_kernels
from cpu_modules import use_cpu_kernels
from environment import (
    bf16_is_fast,
    command_line,
    compile_model,
    hardware,
    keep_freed_memory,
    machine,
    pick_device,
    versions,
)
from errors import told_in_one_line
from evaluate import count_macs
from recipes import Recipe, make_optimizer
from timm import create_model
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

import ran_layers  # noqa: F401  (registers the networks with timm)

ROWS = 2048  # images in memory; their content does not matter to the speed
PRICE_OF_ATTENTION = ("resnet50", "resnetv2_50")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ran_att56_cifar", "ran_att92_cifar"])
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[128])
    parser.add_argument("--size", type=positive, default=32, help="side of the images, pixels")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--rounds", type=positive, default=7, help="measurements of each case")
    parser.add_argument("--seconds", type=positive_seconds, default=1.0, help="least duration of one measurement")
    parser.add_argument("--out", type=Path, help="folder for throughput.json and throughput.png")
    parser.add_argument("--plot", type=Path, help="where the plot goes instead")
    args = parser.parse_args(argv)
    with told_in_one_line():
        keep_freed_memory()
        device = pick_device(args.device)
        command = command_line("throughput.py", sys.argv[1:] if argv is None else argv)
        result = dict(command=command, **measure(args, device))
        print_table(result)
        if args.out:
            write_json(args.out / "throughput.json", result)
            write_atomic(args.plot or args.out / "throughput.png", draw(result))


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time every case ``args.rounds`` times in turn; return medians, extremes, and the machine's ceilings."""
    check_models(args.models)
    precision = "bf16" if bf16_is_fast(device) else "fp32"
    cases: list[Case] = []
    for batch_size in args.batch_sizes:
        for name in args.models:
            cases.append(Case("harness", name, batch_size, args.size, device, precision))
            cases.append(Case("dataloader", name, batch_size, args.size, device, "fp32"))
        for name in PRICE_OF_ATTENTION:
            cases.append(Case("harness", name, batch_size, args.size, device, precision))

    for case in cases:
        case.warm_up()
    ceilings: dict[str, list[float]] = {"matmul_flops": [], "copy_bytes": []}
    for _ in range(args.rounds):
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


class Case:
    """One network in one form at one batch size."""

    def __init__(self, form: str, name: str, batch_size: int, size: int, device: torch.device, precision: str) -> None:
        self.form, self.name, self.batch_size, self.device = form, name, batch_size, device
        torch.manual_seed(0)
        model = create_model(name, num_classes=10)
        model.pretrained_cfg["input_size"] = (3, size, size)
        self.macs = count_macs(model)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self.images = torch.randint(256, (ROWS, size, size, 3), dtype=torch.uint8)
        self.labels = torch.randint(10, (ROWS,))
        if form == "harness":
            model = model.to(device, memory_format=torch.channels_last)
            self.batches = self._resident_batches()
            compile_mode = "default" if device.type == "cuda" else "off"
            if why_no_kernels(device, compile_mode) is None and kernels_pay():
                use_cpu_kernels(model)
            self.forward: Callable[..., torch.Tensor] = compile_model(model, compile_mode)
        else:
            model = model.to(device)
            self.batches = self._loaded_batches()
            self.forward = model
        self.model = model
        self.optimizer = make_optimizer(Recipe(), model)
        self.speeds: dict[str, list[float]] = {"forward": [], "train": []}
        self.compile_seconds = 0.0
        self.peak_bytes = 0

    def _resident_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels = self.images.to(self.device), self.labels.to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        mean = torch.full((3,), 120.0, device=self.device)
        while True:
            rows = torch.randint(ROWS, (self.batch_size,), generator=generator, device=self.device)
            flip = torch.rand(self.batch_size, generator=generator, device=self.device) < 0.5
            x = augment.crop_flip(images[rows], flip, 4, "reflect", generator)
            yield augment.normalize(x, mean, mean / 2), labels[rows]

    def _loaded_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Not forked: while a forked worker lives, this process, with all cases in it, writes to its memory in copies.
        loader = DataLoader(
            _Images(self.images.numpy(), self.labels), self.batch_size, shuffle=True, num_workers=2, drop_last=True,
            multiprocessing_context="spawn")
        while True:
            for x, y in loader:
                yield x.to(self.device), y.to(self.device)

    def train_step(self) -> None:
        x, y = next(self.batches)
        with self.autocast:
            loss = F.cross_entropy(self.forward(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def forward_step(self) -> None:
        x, _ = next(self.batches)
        with self.autocast:
            self.forward(x)

    def warm_up(self) -> None:
        """Compile and fill caches; the first step's time is reported as compilation."""
        started = time.perf_counter()
        self.model.train()
        for _ in range(3):
            self.train_step()
        self.model.eval()
        self.forward_step()
        synchronize(self.device)
        self.compile_seconds = time.perf_counter() - started
        if self.device.type == "cpu":
            self.model.train()
            self.peak_bytes = peak_rss(self.train_step)

    def measure(self, seconds: float) -> None:
        """Add one measurement of each kind."""
        for kind, step, training in (("train", self.train_step, True), ("forward", self.forward_step, False)):
            self.model.train(training)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            step()  # brings back what the case before this one has driven from the caches
            synchronize(self.device)
            started, steps = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                step()
                steps += 1
                synchronize(self.device)
            self.speeds[kind].append(steps * self.batch_size / (time.perf_counter() - started))
            if self.device.type == "cuda":
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        if self.form == "dataloader":
            time.sleep(0.5)  # its workers fill their queues, which must not slow down the next case

    def summary(self, matmul_ceiling: float) -> dict[str, Any]:
        row: dict[str, Any] = dict(
            form=self.form, model=self.name, batch_size=self.batch_size, macs=self.macs,
            first_steps_seconds=self.compile_seconds, peak_bytes=self.peak_bytes or None)
        for kind, speeds in self.speeds.items():
            median = statistics.median(speeds)
            # Multiply and add; the backward pass costs two forwards.
            flops = median * 2 * self.macs * (3 if kind == "train" else 1)
            row[kind] = dict(images_per_s=median, lowest=min(speeds), highest=max(speeds), flops_per_s=flops,
                             fraction_of_matmul=flops / matmul_ceiling)
        return row


class _Images(TorchDataset):
    """Images that are cropped, mirrored and normalised one by one, over and over."""

    def __init__(self, arrays: Any, labels: torch.Tensor) -> None:
        from torchvision import transforms

        self.arrays, self.labels = arrays, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(arrays.shape[1], padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])

    def __len__(self) -> int:
        return 1024 * ROWS

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[i % ROWS])), self.labels[i % ROWS]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_rss(function: Callable[[], Any]) -> int:
    """Return how far the memory of this process rises while ``function`` runs; 0 where Linux does not say."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return 0

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024

    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # give back what is free, or the rise would be too small
    reset.write_text("5")  # the peak starts anew
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


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
    print(f"{machine(result['hardware'])}, {result['precision']}: matrix product "
          f"{ceilings['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    print(f"{'case':<36}{'batch':>6}{'forward, images/s':>24}{'train, images/s':>24}"
          f"{'of ceiling':>12}{'peak memory':>14}")
    for row in result["cases"]:
        speeds = [f"{row[k]['images_per_s']:.0f} ({row[k]['lowest']:.0f}-{row[k]['highest']:.0f})"
                  for k in ("forward", "train")]
        print(f"{row['model'] + ', ' + row['form']:<36}{row['batch_size']:>6}{speeds[0]:>24}{speeds[1]:>24}"
              f"{100 * row['train']['fraction_of_matmul']:>10.1f} %{(row['peak_bytes'] or 0) / 2 ** 20:>10.0f} MiB")


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
    axes.barh([f"{row['model']}, {row['form']}, batch {row['batch_size']}" for row in rows], medians, xerr=spread,
              color=colors, capsize=3)
    axes.set(xlabel="training, images/s", title=f"{machine(result['hardware'])}, {result['precision']}")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
