"""The training of one network: its steps, its epochs, and the state a checkpoint holds."""
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from augment import augment_batch
from checkpoint import load_optimizer_tensors, optimizer_tensors, prefixed, without_prefix
from cpu_modules import use_cpu_kernels
from display import Display
from distributed import World, data_parallel, sync_batch_norm
from environment import compile_model, price_of_determinism, warm_up
from errors import RunError
from recipes import Recipe, lr_scale, make_optimizer, pixels_seen, resolutions
from timm.utils import ModelEmaV3


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
        compile_mode: A mode of ``torch.compile``, or ``"off"``.
        cpu_kernels: Whether the model trains with the fused kernels for CPUs.
    """

    def __init__(
            self, model: Any, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, autocast: Any, seed: int,
            world: World, sync_bn: bool, compile_mode: str, cpu_kernels: bool) -> None:
        self.model, self.recipe, self.images, self.labels = model, recipe, images, labels
        self.autocast, self.seed, self.world, self.device = autocast, seed, world, images.device
        self.mean = torch.tensor(model.pretrained_cfg["mean"], device=self.device) * 255
        self.std = torch.tensor(model.pretrained_cfg["std"], device=self.device) * 255
        self.optimizer = make_optimizer(recipe, model)
        # The warm-up keeps the random initial weights out of the average.
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        if cpu_kernels:
            use_cpu_kernels(model, sync_bn)
        synced = sync_batch_norm(model, self.device) if sync_bn else model
        self.forward = compile_model(data_parallel(synced, world, self.device), compile_mode)
        self.compile_mode = compile_mode
        # Alternate flips: one half of the images is mirrored in even epochs, the other in odd ones.
        self.always_flip = torch.rand(
            len(images), generator=torch.Generator(self.device).manual_seed(seed), device=self.device) < 0.5

        self.steps_per_epoch = len(images) // recipe.batch_size
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.epochs: list[dict[str, Any]] = []  # the figures of each finished one
        self.seconds = 0.0  # of training, without compilation and evaluation
        self.start_epoch(0)

    @property
    def averaged(self) -> Any:
        """The network to evaluate and to keep: the moving average where the recipe has one."""
        return self.model if self.ema is None else self.ema.module

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of the images; it follows from seed and epoch alone."""
        self.generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + epoch)
        self.order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        self.sums = torch.zeros(2, device=self.device)  # of loss and correct answers, read once an epoch
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
            step=self.step, epochs=self.epochs, seconds=self.seconds, epoch_seconds=self.epoch_seconds)

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Put back what :meth:`state` returned."""
        self.model.load_state_dict(without_prefix("model", tensors))
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer", tensors))
        if self.ema is not None:
            self.ema.load_state_dict(without_prefix("ema", tensors))
        self.step, self.epochs, self.seconds = state["step"], state["epochs"], state["seconds"]
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        self.start_epoch(epoch)
        if in_epoch:
            self.generator.set_state(tensors["generator"])
            self.sums = tensors["sums"].to(self.device)
            self.epoch_seconds = state["epoch_seconds"]
        states = tensors["torch_rng"].view(-1, len(torch.get_rng_state()))
        if self.world.rank < len(states):  # a process that was not there goes on with the seed that it was given
            torch.set_rng_state(states[self.world.rank].clone())  # with a part of a tensor torch crashes
            if self.device.type == "cuda" and "cuda_rng" in tensors:
                torch.cuda.set_rng_state(tensors["cuda_rng"][self.world.rank].clone(), self.device)

    def compile(self) -> float:
        """Compile the step for every resolution of the recipe, and return the seconds that took; 0 where it is off."""
        return 0.0 if self.compile_mode == "off" else warm_up(
            self.forward, self.model, self._input_shapes(), self.autocast)

    def price_of_determinism(self) -> float:
        """Return how much more time a step takes with deterministic kernels, as a fraction."""
        return price_of_determinism(self.model, self._input_shapes()[-1], self.autocast)

    def _input_shapes(self) -> list[tuple[int, int, int, int]]:
        rows, channels = self.recipe.batch_size // self.world.size, self.images.shape[-1]
        return [(rows, channels, side, side) for side in resolutions(self.recipe, self.images.shape[1])]

    def work(self, progress: float) -> float:
        """Return what of the computing is done at ``progress`` of the training, in no unit of its own."""
        return pixels_seen(self.recipe, progress, self.images.shape[1])

    def train_step(self) -> None:
        """Train on the next batch."""
        recipe, world = self.recipe, self.world
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        progress = self.step / self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale(recipe, progress)
        rows = self.order[in_epoch * recipe.batch_size:(in_epoch + 1) * recipe.batch_size]
        y = self.labels[rows]
        targets = F.one_hot(y, self.model.num_classes).to(self.mean.dtype)
        x, targets = augment_batch(
            self.images[rows], self._flips(rows, epoch), targets, recipe, progress, self.mean, self.std,
            self.generator)
        x = x.contiguous(memory_format=torch.channels_last)  # rotation and shift leave it otherwise
        x, y, targets = world.share(x), world.share(y), world.share(targets)

        with self.autocast:
            logits = self.forward(x)
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
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
            stopped = self.world.any(stop())
            if stopped:
                break
        self.sums = self.world.mean(self.sums)
        loss, top1 = (self.sums / self.steps_per_epoch).tolist()  # waits for a GPU: the clock is read after it
        elapsed = time.perf_counter() - started
        self.epoch_seconds = seconds_before + elapsed
        self.seconds += elapsed
        if loss != loss:  # in an epoch that a signal ends, too: its checkpoint would be worth nothing
            raise RunError(f"the loss is not a number in epoch {epoch + 1}")
        if self.step % self.steps_per_epoch:
            return stopped
        self.epochs.append(dict(
            epoch=epoch + 1, train_loss=loss, train_top1=100 * top1, lr=self.optimizer.param_groups[0]["lr"],
            seconds=self.epoch_seconds,
            images_per_s=self.steps_per_epoch * self.recipe.batch_size / self.epoch_seconds))
        self.start_epoch(epoch + 1)
        return stopped
