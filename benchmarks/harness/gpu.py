"""What a training step on a GPU is made of: weights in bfloat16 beside the float32 ones, and CUDA graphs.

These networks have a hundred small convolutions, so a step is thousands of kernels of a few microseconds, which Python
launches more slowly than a GPU runs them. A CUDA graph launches the whole step at once.
"""
import copy
import gc
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from harness.environment import synchronize
from harness.errors import RunError

WARM_UP_RUNS = 3  # a compiled function settles, cuDNN chooses its algorithms, the allocator finds its blocks


def why_no_gpu_kernels(
        device: torch.device, compile_mode: str, processes: int = 1, deterministic: bool = False,
        precision: str | None = None) -> str | None:
    """Return what keeps networks from training with the kernels of `gpu_kernels.py`, None if nothing does."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "they are for NVIDIA GPUs that compute in bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton (pip install triton)"
    if processes > 1:
        return "they are for one process"
    if deterministic:
        return "they add in no fixed order, which --deterministic rules out"
    if precision == "fp32":
        return "they compute in bfloat16, not in --precision fp32"
    return "--compile model leaves no units to them" if compile_mode == "model" else None


def check_gpu_kernels(device: torch.device, *conditions: Any) -> None:
    """Raise a :class:`RunError` where :func:`why_no_gpu_kernels`, which takes the same, says something."""
    if obstacle := why_no_gpu_kernels(device, *conditions):
        raise RunError(f"--gpu-kernels are not available here: {obstacle}")


class HalfWeights:
    """A network that computes with bfloat16 copies of the convolutions' and linear layers' weights of ``model``.

    Autocast casts each weight in each step, and each gradient back: hundreds of kernels. Here a few cast all. What
    else the network has, it shares with ``model``.

    Attributes:
        net: The network to call, in training mode; its other parameters and its statistics are those of ``model``
            themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.net = copy.deepcopy(model).train()
        self.counters: list[torch.Tensor] = []
        halves: dict[nn.Parameter, nn.Parameter] = {}  # so that weights which layers share stay shared
        for module, own in zip(self.net.modules(), model.modules(), strict=True):
            # Exactly these: a subclass may compute with its weights, as those that standardise them do.
            if type(own) in (nn.Conv2d, nn.Linear):
                for name, param in own.named_parameters(recurse=False):
                    if param not in halves:
                        halves[param] = nn.Parameter(param.detach().to(torch.bfloat16), param.requires_grad)
                    setattr(module, name, halves[param])
                continue
            module._parameters, module._buffers = own._parameters, own._buffers
            counter = own._buffers.get("num_batches_tracked")
            if isinstance(module, nn.BatchNorm2d) and module.momentum is not None and counter is not None:
                # Nothing depends on it, and it would take a kernel a layer.
                self.counters.append(counter)
                module._buffers = {**own._buffers, "num_batches_tracked": None}
        self.full: list[torch.Tensor] = list(halves)
        self.half: list[torch.Tensor] = list(halves.values())

    @torch.no_grad()
    def load(self) -> None:
        """Cast the weights, as they are now."""
        if self.half:
            torch._foreach_copy_(self.half, self.full)

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Hand the gradients of the copies to the weights, and count the batch."""
        used = [(full, half) for full, half in zip(self.full, self.half) if half.grad is not None]
        for full, _ in used:
            full.grad = torch.empty_like(full)
        if used:  # not where all are frozen
            torch._foreach_copy_([full.grad for full, _ in used], [half.grad for _, half in used])
        for _, half in used:
            half.grad = None
        if self.counters:
            torch._foreach_add_(self.counters, 1)


class Replayed:
    """A function of tensors without a result, replayed as a CUDA graph for each shape of its first argument.

    Whatever else it reads and writes must stay where it is: tensors that live on, written in place.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.pool: Any = None

    def warm_up(self, *inputs: torch.Tensor) -> None:
        """Run the function, aside as when it is recorded, so that all it needs once is there."""
        device = inputs[0].device
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                self.function(*inputs)
        current.wait_stream(aside)

    def capture(self, *inputs: torch.Tensor) -> None:
        """Record the function for inputs of these shapes and types, for which it has been warmed up."""
        inputs_of_graph = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        # A graph that the collector destroys while another is recorded makes that recording fail.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.function(*inputs_of_graph)
        finally:
            if collecting:
                gc.enable()
        self.pool = self.pool or graph.pool()
        self.graphs[inputs[0].shape] = graph, inputs_of_graph

    def __call__(self, *inputs: torch.Tensor) -> None:
        graph, inputs_of_graph = self.graphs[inputs[0].shape]
        for own, given in zip(inputs_of_graph, inputs):
            own.copy_(given)
        graph.replay()


@contextmanager
def unchanged(tensors: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> Iterator[None]:
    """Give ``tensors()`` their values back after the block, in place; those that came to be in it become zeros.

    Random numbers drawn in the block do not count either.
    """
    before = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for tensor in tensors():
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)][1])
            else:
                tensor.zero_()


def choose_kernels(deterministic: bool) -> None:
    """Have torch use the kernels it finds to be fastest, or those that always add in the same order.

    To be called before the GPU is used.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def price_of_determinism(model: nn.Module, batch: torch.Tensor, autocast: Any, steps: int = 20) -> float:
    """Return how much more time forward and backward pass take with deterministic kernels, as a fraction.

    The network is not compiled for it. Both are replayed as CUDA graphs in turn, so that it is the kernels that are
    compared.
    """
    model = copy.deepcopy(model).train()
    device = batch.device

    def step(x: torch.Tensor) -> None:
        with autocast:
            loss = model(x).float().mean()
        loss.backward()
        model.zero_grad()

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    replayed = {}
    seconds = {True: 0.0, False: 0.0}
    with torch.random.fork_rng([device]):  # a run draws the same numbers with this measurement and without
        try:
            for chosen in (True, False):
                torch.use_deterministic_algorithms(chosen)
                torch.backends.cudnn.benchmark = not chosen
                replayed[chosen] = Replayed(step)
                replayed[chosen].warm_up(batch)
                replayed[chosen].capture(batch)
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
        for _ in range(steps):
            for chosen, run in replayed.items():
                synchronize(device)
                started = time.perf_counter()
                run(batch)
                synchronize(device)
                seconds[chosen] += time.perf_counter() - started
    return seconds[True] / seconds[False] - 1
