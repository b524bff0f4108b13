"""Data-parallel training: the processes that ``torchrun`` starts share each global batch.

Every process draws the same order and the same augmentation for the whole batch and keeps its own slice, so the images
of a step, the schedule and (with synchronised batch normalisation) the losses do not depend on the number of processes.
"""
import contextlib
import inspect
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import BatchNormAct2d, convert_sync_batchnorm

from harness.environment import pick_device
from harness.errors import RunError


@dataclass(frozen=True)
class World:
    """The processes of one training, and which of them this is."""

    rank: int = 0
    size: int = 1
    # Flags travel over gloo, also beside NCCL, so that asking for them never waits for the GPU.
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that shows and writes."""
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this process's slice of the global batch."""
        rows = len(batch) // self.size
        return batch[self.rank * rows:(self.rank + 1) * rows]

    def max_flag(self, flag: int) -> int:
        """Return the largest ``flag`` of all processes, so that all decide alike."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return int(flags.item())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` summed over the processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the processes' tensors, on the CPU, in a row."""
        return gather(tensor.cpu(), self.control) if self.size > 1 else tensor.cpu()[None]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor`` averaged over the processes."""
        return self.sum(tensor) / self.size

    def average_buffers(self, *models: nn.Module | None) -> None:
        """Make the running statistics of ``models`` the same everywhere: their average over the processes."""
        if self.size == 1:
            return
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                if buffer.is_floating_point():
                    buffer.copy_(self.mean(buffer))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go through the block before the others, which then find its downloads."""
        if self.size > 1 and not self.main:
            dist.barrier(group=self.control)
        yield
        if self.size > 1 and self.main:
            dist.barrier(group=self.control)


def gather(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return the tensors of all processes in a row, of a shape and a type that all must share."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor, group=group)
    return torch.stack(gathered)


def join_world(device_name: str | None) -> tuple[World, torch.device]:
    """Return this process's place among those of ``torchrun``, or a world of one, and the device it trains on.

    Raises:
        RunError: ``device_name`` is not available.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or (size != "1" and missing):
        raise RunError(f"WORLD_SIZE is {size} in the environment{', but not ' + missing[0] if missing else ''}; start "
                       "several processes with torchrun, or unset it")
    size = int(size)
    device = pick_device(device_name)
    if size == 1:
        return World(), device
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        # Every process of the machine says so, since only the first one's message is shown.
        if int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)) > torch.cuda.device_count():
            raise RunError(
                f"torchrun --nproc-per-node must be at most the number of GPUs, {torch.cuda.device_count()}, "
                f"or add --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size, dist.new_group(backend="gloo")), device


def leave_world(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Close the connections to the other processes, if there are any; called as the exit of a context.

    After an error of this process alone that would be to wait, over NCCL, for others that wait for it. So it ends at
    once, the error being told, and torchrun ends the others.
    """
    if dist.is_initialized():
        if isinstance(error, SystemExit) and error.code == 2 and dist.get_backend() == "nccl":
            sys.stdout.flush()
            os._exit(2)
        dist.destroy_process_group()
        # gloo's threads still hold the tensors of the last collectives and need the interpreter to let go of them. One
        # that is ending refuses, and the process aborts ("terminate called without an active exception"), upon which
        # torchrun kills the others. A sleep hands the interpreter over.
        time.sleep(0.2)


def data_parallel(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return ``model``, wrapped among several processes so that its gradients are those of the global batch."""
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True, **{_BUFFERS_FLAG: False})


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return ``model`` with batch normalisation over the global batch in place of each process's slice of it."""
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    # torch's own SyncBatchNorm is for GPUs only.
    for module in model.modules():
        if type(module) in _SYNCED:
            module.__class__ = _SYNCED[type(module)]
    return model


# The statistics of batch normalisation are averaged where they are used, not copied from the first process.
_BUFFERS_FLAG = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(
    nn.parallel.DistributedDataParallel).parameters else "broadcast_buffers"  # its older name


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation over the batches of all processes; returns the global mean and (biased) variance too.

    torch's kernels for a CPU go through the maps, and one collective each way carries the sums.
    """

    @staticmethod
    def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        unused = torch.zeros_like(weight)  # running statistics, whose type is that of the result
        local = torch.stack(torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0))
        means, variances = gather(local).unbind(1)
        mean = means.mean(0)
        # Not of the squares: their difference would lose digits.
        var = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums)
        # What the mean and the variance have to do with the input: a line in it, for each channel.
        count = x.numel() // x.shape[1] * dist.get_world_size()
        invstd = torch.rsqrt(var + ctx.eps)
        slope = -weight * invstd.square() * sums[0] / count
        offset = -weight * invstd * sums[1] / count - slope * mean
        grad_x = torch.addcmul(grad_x.add_(offset[:, None, None]), x, slope[:, None, None])
        return grad_x, grad_weight, grad_bias, None


def normalize_globally(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Return what ``norm`` makes of ``x`` on a CPU over the batches of all processes; they must be of one size."""
    y, mean, var = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps)
    count = x.numel() // x.shape[1] * dist.get_world_size()
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(var * count / max(1, count - 1), momentum)
    return y


class _SyncBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return normalize_globally(self, input) if self.training else super().forward(input)


class _SyncBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(normalize_globally(self, x))) if self.training else super().forward(x)


_SYNCED: dict[type, type] = {nn.BatchNorm2d: _SyncBatchNorm2d, BatchNormAct2d: _SyncBatchNormAct2d}
