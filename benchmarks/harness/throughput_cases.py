"""The forms in which `throughput.py` times a network: as `cifar.py` trains it, and as others do."""
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm import create_model
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

import ran_layers  # noqa: F401  (registers the networks with timm)
from harness.compiling import compile_model
from harness.environment import default_compile_mode, synchronize
from harness.errors import RunError, first_line
from harness.evaluate import count_macs
from harness.gpu import HalfWeights, Replayed
from harness.kernels.cpu_choice import chooses_kernels
from harness.precision import pick_precision
from harness.recipes import Recipe, make_optimizer
from harness.trainer import Trainer

ROWS = 2048  # images in memory; their content does not matter to the speed


class Case:
    """One network in one form at one batch size."""

    form: str
    precision = "fp32"

    def __init__(self, name: str, batch_size: int, size: int, device: torch.device) -> None:
        self.name, self.batch_size, self.device = name, batch_size, device
        self.bytes_before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        torch.manual_seed(0)
        try:
            self.model: Any = create_model(name, num_classes=10)
        except Exception as error:  # a tag that is none, ...
            raise RunError(f"--models {name} cannot be made ({first_line(error)})") from error
        self.model.pretrained_cfg["input_size"] = (3, size, size)
        try:
            self.macs = count_macs(self.model)
        except Exception as error:  # a network of one size, a map that ends in nothing, ...
            raise RunError(f"--models {name} does not take images of 3 x {size} x {size} ({first_line(error)})"
                           ) from error
        self.speeds: dict[str, list[float]] = {"forward": [], "train": []}
        self.compile_seconds = 0.0
        self.peak_bytes = 0
        self.prepare()

    def prepare(self) -> None:
        """Build what the steps need."""
        raise NotImplementedError

    def train_step(self) -> None:
        """Train on the next batch."""
        raise NotImplementedError

    def forward_step(self) -> None:
        """Run the network on a batch in evaluation mode."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Run the first steps, which fill caches, and see what memory one needs."""
        started = time.perf_counter()
        self.model.train()
        for _ in range(3):
            self.train_step()
        self.model.eval()
        self.forward_step()
        synchronize(self.device)
        self.compile_seconds += time.perf_counter() - started
        self.model.train()
        self.peak_bytes = self.bytes_of_a_step()

    def bytes_of_a_step(self) -> int:
        """Return how far memory rises in a training step; on a GPU with what the case holds all the time."""
        if self.device.type == "cpu":
            return peak_rss(self.train_step)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.train_step()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.bytes_before

    def measure(self, seconds: float) -> None:
        """Add one measurement of each kind."""
        # The harness does not wait for a GPU within an epoch.
        at_once = 20 if self.device.type == "cuda" else 1
        for kind, step, training in (("train", self.train_step, True), ("forward", self.forward_step, False)):
            self.model.train(training)
            step()  # brings back what the case before this one has driven from the caches
            synchronize(self.device)
            started, steps = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                for _ in range(at_once):
                    step()
                steps += at_once
                synchronize(self.device)
            self.speeds[kind].append(steps * self.batch_size / (time.perf_counter() - started))

    def summary(self, matmul_ceiling: float) -> dict[str, Any]:
        row: dict[str, Any] = dict(
            form=self.form, precision=self.precision, model=self.name, batch_size=self.batch_size, macs=self.macs,
            first_steps_seconds=self.compile_seconds, peak_bytes=self.peak_bytes or None)
        for kind, speeds in self.speeds.items():
            median = statistics.median(speeds)
            # Multiply and add; the backward pass costs two forwards.
            flops = median * 2 * self.macs * (3 if kind == "train" else 1)
            row[kind] = dict(images_per_s=median, lowest=min(speeds), highest=max(speeds), flops_per_s=flops,
                             fraction_of_matmul=flops / matmul_ceiling)
        return row


class Harness(Case):
    """As `cifar.py` trains, with plain SGD as in the other form."""

    form = "harness"

    def __init__(
            self, name: str, batch_size: int, size: int, device: torch.device, gpu_kernels: bool = False) -> None:
        self.gpu_kernels = gpu_kernels
        super().__init__(name, batch_size, size, device)

    def prepare(self) -> None:
        device = self.device
        model = self.model.to(device, memory_format=torch.channels_last)
        rows, shape = max(ROWS, self.batch_size), self.model.pretrained_cfg["input_size"]
        images = torch.randint(256, (rows, *shape[1:], shape[0]), dtype=torch.uint8)
        labels = torch.randint(10, (rows,))
        compile_mode, kernels = default_compile_mode(device), chooses_kernels(device)
        self.precision = pick_precision(device, model, kernels)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        self.trainer = Trainer(
            model, Recipe(epochs=10 ** 6, batch_size=self.batch_size), images.to(device), labels.to(device),
            autocast=self.autocast, compile_mode=compile_mode, cpu_kernels=kernels, gpu_kernels=self.gpu_kernels)
        if device.type == "cuda":
            torch.compiler.reset()  # each case compiles for itself
        started = time.perf_counter()
        self.trainer.compile()
        if device.type == "cuda":
            self.recorded_bytes = torch.cuda.max_memory_allocated(device) - self.bytes_before
        self.batch = self.trainer.empty_batches()[-1][0].normal_()
        self.replayed, self.net = None, model
        if device.type == "cuda":
            half = self.trainer.half
            if half and self.gpu_kernels:  # which are for training
                half = HalfWeights(model)
                compile_model(half.net, compile_mode)
            if half:
                self.net = half.net  # whose weights need no casting
            self.net.eval()
            self.replayed = Replayed(self._forward)
            self.replayed.warm_up(self.batch)
            self.replayed.capture(self.batch)
            self.net.train()
        self.compile_seconds = time.perf_counter() - started

    def bytes_of_a_step(self) -> int:
        # What a recorded step needs is set apart for it when it is recorded.
        return super().bytes_of_a_step() if self.device.type == "cpu" else self.recorded_bytes

    def train_step(self) -> None:
        self.trainer.train_step()

    @torch.no_grad()
    def _forward(self, x: torch.Tensor) -> None:
        with self.autocast:
            self.net(x)

    def forward_step(self) -> None:
        (self.replayed or self._forward)(self.batch)


class Loaded(Case):
    """As published re-implementations do: float32, NCHW, eager, per-image transforms in the workers of a DataLoader."""

    form = "dataloader"

    def __init__(
            self, name: str, batch_size: int, size: int, device: torch.device,
            batches: Iterator[list[torch.Tensor]]) -> None:
        self.batches = batches
        super().__init__(name, batch_size, size, device)

    def prepare(self) -> None:
        self.model = self.model.to(self.device)
        self.optimizer = make_optimizer(Recipe(), self.model)
        self.batch = next(self.batches)[0].to(self.device)

    def train_step(self) -> None:
        x, y = (tensor.to(self.device) for tensor in next(self.batches))
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def forward_step(self) -> None:
        self.model(self.batch)

    def measure(self, seconds: float) -> None:
        if self.device.type == "cuda":  # many steps at once; the first ones are not to find their batches ready
            for _ in range(2 * loaders()):
                next(self.batches)
        super().measure(seconds)
        time.sleep(0.5)  # the workers fill their queues, which must not slow down the next case


def load(batch_size: int, size: int) -> Iterator[list[torch.Tensor]]:
    """Start the workers of a DataLoader; return its batches: images and labels."""
    # Workers that are not forked import all of this anew; elsewhere than on Linux, forking is not safe.
    context = "fork" if sys.platform == "linux" else None
    return iter(DataLoader(
        _Images(size), batch_size, num_workers=loaders(), drop_last=True, multiprocessing_context=context))


def loaders() -> int:
    """Return how many processes load images: one for each processor, up to 16, as is usual."""
    return max(2, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


class _Images(TorchDataset):
    """Images that are cropped, mirrored and normalised one by one, over and over."""

    def __init__(self, size: int) -> None:
        from torchvision import transforms

        self.arrays = np.random.default_rng(0).integers(256, size=(ROWS, size, size, 3), dtype=np.uint8)
        self.transform = transforms.Compose([
            transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])

    def __len__(self) -> int:
        return 10 ** 9  # more than are ever asked for

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[i % ROWS])), i % 10


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
