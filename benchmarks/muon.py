"""Muon: momentum SGD whose update of each convolution is replaced by the nearest orthogonal matrix.

Keller Jordan et al., `Muon: An optimizer for hidden layers in neural networks` - https://kellerjordan.github.io/posts/muon/

Residual Attention Networks have a hundred small convolutions of few different shapes, so all of one shape are
orthogonalised in one batched product; one product each would cost a tenth of the training time on a CPU.
"""
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``orthogonalize=True``, Nesterov SGD for the others.

    Args:
        groups: Parameter groups; each may set ``lr``, ``momentum``, ``weight_decay`` (decoupled) and ``orthogonalize``
            (for weights of two dimensions or more; all but the first are flattened).
        lr: Step size; with ``orthogonalize`` that of a matrix whose singular values are all about 1.
        momentum: Of the moving average of gradients.
        weight_decay: Each step shrinks the weights by ``lr * weight_decay``.
    """

    def __init__(
            self, groups: Iterable[dict[str, Any]], lr: float = 0.03, momentum: float = 0.95, weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, orthogonalize=False))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            momentum = group["momentum"]
            buffers = [self._momentum_buffer(p) for p in params]
            if group["orthogonalize"]:
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                updates = self._orthogonalize(torch._foreach_lerp(grads, buffers, momentum))
            else:
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, grads)
                updates = torch._foreach_add(grads, buffers, alpha=momentum)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _orthogonalize(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        """Orthogonalise ``updates``; processes that train together do a part each and exchange the results."""
        if not dist.is_initialized():
            return orthogonalize(updates)
        size, rank = dist.get_world_size(), dist.get_rank()
        # Largest first, dealt out in turn: about equal work, and the same deal everywhere.
        dealt = sorted(range(len(updates)), key=lambda i: (-updates[i].numel() * len(updates[i]), i))
        mine = dealt[rank::size]
        flat = updates[0].new_zeros(sum(update.numel() for update in updates))
        views = [part.view(update.shape) for part, update in zip(flat.split([u.numel() for u in updates]), updates)]
        for i, update in zip(mine, orthogonalize([updates[i] for i in mine])):
            views[i].copy_(update)
        dist.all_reduce(flat)
        return views

    def _momentum_buffer(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def orthogonalize(updates: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each tensor, seen as a matrix, about the orthogonal factor of its polar decomposition.

    Tall matrices come out larger by ``sqrt(rows / columns)``, so that a step changes each output equally.
    """
    updates = list(updates)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, update in enumerate(updates):
        rows, columns = len(update), update[0].numel()
        by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(i)
    result: list[torch.Tensor] = list(updates)
    for indices in by_shape.values():
        matrices = [updates[i].flatten(1) for i in indices]
        batch = torch.stack([m.mT if len(m) > m.shape[1] else m for m in matrices])
        for i, matrix, factor in zip(indices, matrices, _newton_schulz(batch)):
            tall = len(matrix) > matrix.shape[1]
            factor = factor.mT * (len(matrix) / matrix.shape[1]) ** 0.5 if tall else factor
            result[i] = factor.reshape(updates[i].shape)
    return result


def _newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Drive the singular values of the wide matrices ``(batch, rows, columns)`` to about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic of the reference implementation: steepest at 0
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # x -> p(x x^T) x keeps x's right singular vectors, so only the small matrices are iterated and x is met twice.
    gram = x @ x.mT
    scaled_identity = a * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    product = None
    for step in range(steps):
        factor = torch.baddbmm(b * gram + scaled_identity, gram, gram, alpha=c)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return x if product is None else product @ x
