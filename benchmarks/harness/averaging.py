"""The moving average of a network's weights over its training, which is what is evaluated and kept."""
import torch
import torch.nn as nn
from timm.utils import ModelEmaV3


class MovingAverage(ModelEmaV3):
    """timm's moving average of a network's weights, in a few kernels; its decay lies where a CUDA graph reads it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        # The warm-up keeps the random initial weights out of the average.
        super().__init__(model, decay=decay, use_warmup=True)
        # Each once, also where layers share one.
        pairs = list({value.data_ptr(): (average, value) for average, value in zip(
            self.module.state_dict().values(), model.state_dict().values(), strict=True)}.values())
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._weight = torch.ones((), device=pairs[0][0].device)

    def set_step(self, step: int) -> None:
        """Set the decay of the next :meth:`average`, which belongs to the ``step``, counted from 1."""
        self._weight.fill_(1 - self.get_decay(step))

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages towards the network's weights."""
        averages, values = zip(*self._floats)
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, self._weight)
        torch._foreach_add_(averages, steps)
        if self._counts:
            averages, values = zip(*self._counts)
            torch._foreach_copy_(averages, values)
