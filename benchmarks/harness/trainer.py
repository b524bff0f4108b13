"""The training of one network: its steps, its epochs, and the state a checkpoint holds."""
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from harness.augment import augment_batch
from harness.averaging import MovingAverage
from harness.checkpoint import load_optimizer_tensors, optimizer_tensors, prefixed, without_prefix
from harness.compiling import compile_model
from harness.display import Display
from harness.distributed import World, data_parallel, sync_batch_norm
from harness.environment import synchronize
from harness.errors import RunError
from harness.gpu import HalfWeights, Replayed, unchanged
from harness.kernels.cpu_modules import use_cpu_kernels
from harness.recipes import Recipe, lr_scale, make_optimizer, resolutions, sides_seen

ALONE = World()


class Trainer:
    """A network in training, and how far it is.

    Args:
        model: The network, on the device that trains; its ``pretrained_cfg`` says how pixels are normalised.
        recipe: The hyper-parameters.
        images: uint8 ``(rows, height, width, channels)``, on the same device.
        labels: Classes ``(rows,)``, on the same device.
        autocast: Context of the forward pass.
        seed: Of order and augmentation.
        world: The processes that share each batch.
        sync_bn: Whether batch normalisation spans them.
        compile_mode: What ``torch.compile`` gets: ``"units"``, the ``"model"``, or nothing (``"off"``).
        cpu_kernels: Whether the model trains with the fused kernels for CPUs.
        gpu_kernels: Whether it trains with those for GPUs, where :func:`gpu.why_no_gpu_kernels` says nothing and the
            precision is bfloat16.
    """

    def __init__(
            self, model: Any, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, *, autocast: Any,
            seed: int = 0, world: World = ALONE, sync_bn: bool = False, compile_mode: str = "off",
            cpu_kernels: bool = False, gpu_kernels: bool = False) -> None:
        self.model, self.recipe, self.images, self.labels = model, recipe, images, labels
        self.autocast, self.seed, self.world, self.device = autocast, seed, world, images.device
        self.mean = torch.tensor(model.pretrained_cfg["mean"], device=self.device) * 255
        self.std = torch.tensor(model.pretrained_cfg["std"], device=self.device) * 255
        self.optimizer = make_optimizer(recipe, model)
        self.ema = MovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
        if cpu_kernels:
            use_cpu_kernels(model, sync_bn)
        # One process on a GPU replays its steps. Several go without graphs, which would have to hold their collectives.
        self.replayed = Replayed(self._learn) if self.device.type == "cuda" and world.size == 1 else None
        with autocast:
            half = torch.is_autocast_enabled(self.device.type)
        self.half = HalfWeights(model) if self.replayed and half else None
        self.zeros: Any = None  # what these kernels add sums to
        if self.half and gpu_kernels:
            from harness.kernels.gpu_modules import use_gpu_kernels  # needs Triton

            self.zeros = use_gpu_kernels(self.half.net, dict(zip(self.half.half, self.half.full)))
        if self.replayed:
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=self.device)  # where a graph reads it
        synced = sync_batch_norm(model, self.device) if sync_bn else model
        self.forward = compile_model(
            self.half.net if self.half else data_parallel(synced, world, self.device), compile_mode)
        self.compile_mode = compile_mode
        # Alternate flips: one half of the images is mirrored in even epochs, the other in odd ones.
        self.always_flip = torch.rand(
            len(images), generator=torch.Generator(self.device).manual_seed(seed), device=self.device) < 0.5

        self.steps_per_epoch = len(images) // recipe.batch_size
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.epochs: list[dict[str, Any]] = []  # the figures of each finished one
        self.seconds = 0.0  # of training, without compilation and evaluation
        self.sums = torch.zeros(2, device=self.device)  # of loss and correct answers, read once an epoch
        self.start_epoch(0)

    @property
    def averaged(self) -> Any:
        """The network to evaluate and to keep: the moving average where the recipe has one."""
        return self.model if self.ema is None else self.ema.module

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of the images; it follows from seed and epoch alone."""
        self.generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + epoch)
        self.order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        self.sums.zero_()
        self.epoch_seconds = 0.0

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all that :meth:`restore` needs to go on to the bit: tensors, and what JSON holds."""
        self.world.average_buffers(self.model, self.ema)
        tensors = dict(prefixed("model", self.model.state_dict()))
        tensors.update(prefixed("optimizer", optimizer_tensors(self.optimizer)))
        if self.ema is not None:
            tensors.update(prefixed("ema", self.ema.state_dict()))
        tensors.update(generator=self.generator.get_state(), sums=self.sums)
        # Dropout and stochastic depth draw from torch's own generators, each process from its.
        tensors.update(torch_rng=self.world.gather(torch.get_rng_state()))
        if self.device.type == "cuda":
            tensors.update(cuda_rng=self.world.gather(torch.cuda.get_rng_state(self.device)))
        return tensors, dict(
            device=self.device.type, step=self.step, epochs=self.epochs, seconds=self.seconds,
            epoch_seconds=self.epoch_seconds)

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Put back what :meth:`state` returned; to be called before :meth:`compile`, which records where all lies."""
        assert not (self.replayed and self.replayed.graphs), "restore() must come before compile()"
        self.model.load_state_dict(without_prefix("model", tensors))
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer", tensors))
        if self.ema is not None:
            self.ema.load_state_dict(without_prefix("ema", tensors))
        self.step, self.epochs, self.seconds = state["step"], state["epochs"], state["seconds"]
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        self.start_epoch(epoch)
        if in_epoch:
            device = state.get("device", self.device.type)
            if device != self.device.type:  # whose generators draw other numbers
                raise RunError(f"--resume: the checkpoint is from the middle of an epoch on {device} and goes on there "
                               f"(--device {device}); from the end of an epoch it would on {self.device.type} too")
            self.generator.set_state(tensors["generator"])
            self.sums.copy_(tensors["sums"])
            self.epoch_seconds = state["epoch_seconds"]
        states = tensors["torch_rng"].view(-1, len(torch.get_rng_state()))
        if self.world.rank < len(states):  # a process that was not there goes on with the seed that it was given
            torch.set_rng_state(states[self.world.rank].clone())  # with a part of a tensor torch crashes
            if self.device.type == "cuda" and "cuda_rng" in tensors:
                torch.cuda.set_rng_state(tensors["cuda_rng"][self.world.rank].clone(), self.device)

    def compile(self) -> float:
        """Compile and record the step for every resolution of the recipe; return the seconds that took.

        Nothing that decides the result is changed by it. There is nothing to do on a CPU without ``torch.compile``.
        """
        if self.compile_mode == "off" and not self.replayed:
            return 0.0
        started = time.perf_counter()
        self.model.train()
        batches = self.empty_batches()
        run_first = self.replayed.warm_up if self.replayed else self._learn
        with unchanged(self._all_tensors, self.device):
            for batch in batches:
                run_first(*batch)
        if self.replayed:
            torch.cuda.reset_peak_memory_stats(self.device)  # what was tried out before is not what a step needs
            for batch in batches:
                self.replayed.capture(*batch)
        synchronize(self.device)
        return time.perf_counter() - started

    def empty_batches(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return a batch of nothing for every resolution of the recipe: images, labels and targets."""
        rows, channels = self.recipe.batch_size // self.world.size, self.images.shape[-1]
        labels = torch.zeros(rows, dtype=self.labels.dtype, device=self.device)
        targets = torch.zeros(rows, self.model.num_classes, device=self.device)
        return [(
            torch.zeros(rows, channels, side, side, device=self.device).contiguous(memory_format=torch.channels_last),
            labels, targets) for side in resolutions(self.recipe, self.images.shape[1])]

    def _all_tensors(self) -> Iterator[torch.Tensor]:
        for module in (self.model, self.ema):
            if module is not None:
                yield from (*module.parameters(), *module.buffers())
        yield from (tensor for entries in self.optimizer.state.values() for tensor in entries.values()
                    if isinstance(tensor, torch.Tensor))
        yield self.sums

    def _is_finite(self) -> bool:
        """Whether all that a checkpoint would hold are numbers."""
        tensors = [tensor.detach() for tensor in self._all_tensors() if tensor.is_floating_point()]
        norms = [norm.to(self.device) for norm in torch._foreach_norm(tensors)]  # some optimisers count on the CPU
        return bool(torch.stack(norms).isfinite().all())

    def work(self, progress: float) -> float:
        """Return what of the computing is done at ``progress`` of the training, in no unit of its own."""
        return sides_seen(self.recipe, progress, self.images.shape[1])

    def train_step(self) -> None:
        """Train on the next batch."""
        recipe, world = self.recipe, self.world
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        progress = self.step / self.total_steps
        scale = lr_scale(recipe, progress)
        for group in self.optimizer.param_groups:
            if self.replayed:
                group["lr"].fill_(group["base_lr"] * scale)
            else:
                group["lr"] = group["base_lr"] * scale
        rows = self.order[in_epoch * recipe.batch_size:(in_epoch + 1) * recipe.batch_size]
        y = self.labels[rows]
        targets = F.one_hot(y, self.model.num_classes).to(self.mean.dtype)
        x, targets = augment_batch(
            self.images[rows], self._flips(rows, epoch), targets, recipe, progress, self.mean, self.std,
            self.generator)
        x = x.contiguous(memory_format=torch.channels_last)  # rotation and shift leave it otherwise
        x, y, targets = world.share(x), world.share(y), world.share(targets)

        self.step += 1
        if self.ema is not None:
            self.ema.set_step(self.step)
        (self.replayed or self._learn)(x, y, targets)

    def _learn(self, x: torch.Tensor, y: torch.Tensor, targets: torch.Tensor) -> None:
        """Take the optimiser's step for a batch; on a GPU this is what a CUDA graph holds."""
        if self.half:
            self.half.load()
        if self.zeros:
            self.zeros.clear()
        with self.autocast:
            logits = self.forward(x)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        if self.half:
            self.half.give_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.average()
        self.sums += torch.stack([loss.detach().float(), (logits.detach().argmax(1) == y).float().mean()])

    def _flips(self, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        if self.recipe.flip == "alternate":
            return self.always_flip[rows] ^ bool(epoch % 2)
        if self.recipe.flip == "random":
            return torch.rand(len(rows), generator=self.generator, device=self.device) < 0.5
        return torch.zeros(len(rows), dtype=torch.bool, device=self.device)

    def train_epoch(self, display: Display, stop: Callable[[], int]) -> int:
        """Train to the end of the epoch, or until ``stop()`` says a signal; return that signal or 0.

        A finished epoch has its figures in ``epochs``.

        Raises:
            RunError: The loss is not a number.
        """
        epoch, first = divmod(self.step, self.steps_per_epoch)
        seconds_before, started, stopped = self.epoch_seconds, time.perf_counter(), 0
        for done in range(first + 1, self.steps_per_epoch + 1):
            self.train_step()
            # Reading a figure waits for a GPU, so there the bar goes without figures inside the epoch.
            loss, top1 = (self.sums / done).tolist() if self.device.type == "cpu" else (None, None)
            display.step(self.step, loss, None if top1 is None else 100 * top1)
            stopped = self.world.max_flag(stop())
            if stopped:
                break
        self.sums.copy_(self.world.mean(self.sums))
        loss, top1 = (self.sums / self.steps_per_epoch).tolist()  # waits for a GPU: the clock is read after it
        elapsed = time.perf_counter() - started
        self.epoch_seconds = seconds_before + elapsed
        self.seconds += elapsed
        # Of an epoch that a signal ends, too: its checkpoint would be worth nothing.
        if not math.isfinite(loss):
            raise RunError(f"the loss is not a number in epoch {epoch + 1}")
        if not self._is_finite():
            raise RunError(f"the weights are not numbers any more after epoch {epoch + 1}")
        if self.step % self.steps_per_epoch:
            return stopped
        self.epochs.append(dict(
            epoch=epoch + 1, train_loss=loss, train_top1=100 * top1, lr=float(self.optimizer.param_groups[0]["lr"]),
            seconds=self.epoch_seconds,
            images_per_s=self.steps_per_epoch * self.recipe.batch_size / self.epoch_seconds))
        self.start_epoch(epoch + 1)
        return stopped
