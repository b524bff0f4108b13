"""Muon: momentum SGD whose update of each convolution is replaced by the nearest orthogonal matrix.

Keller Jordan et al., `Muon: An optimizer for hidden layers in neural networks` - https://kellerjordan.github.io/posts/muon/

Residual Attention Networks have a hundred small convolutions, so all whose shorter side is equal are orthogonalised in
one batched product; one product each would cost a tenth of the training time on a CPU.
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
            if not params:
                continue
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
            # The learning rate is a tensor where a CUDA graph reads it.
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_mul_(updates, -group["lr"])
            torch._foreach_add_(params, updates)

    def _orthogonalize(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        """Orthogonalise ``updates``; processes that train together do a part each and exchange the results."""
        if not dist.is_initialized():
            return orthogonalize(updates)
        size, rank = dist.get_world_size(), dist.get_rank()
        # Largest first, dealt out in turn: about equal work, and the same deal everywhere.
        dealt = sorted(range(len(updates)), key=lambda i: (-updates[i].numel() * len(updates[i]), i))
        mine = dealt[rank::size]
        flat = updates[0].new_zeros(sum(update.numel() for update in updates))
        # In the memory order of the weights, or torch would add them one by one.
        views = [part.as_strided(update.shape, update.stride())
                 for part, update in zip(flat.split([u.numel() for u in updates]), updates)]
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

    Tall matrices come out larger by ``sqrt(rows / columns)``, so that a step changes each output equally. The results
    are new tensors.
    """
    updates = list(updates)
    result = list(updates)
    # All matrices whose shorter side is equal are iterated in one batch, whatever the longer one is.
    by_side: dict[int, dict[tuple[int, int], list[int]]] = {}
    for i, update in enumerate(updates):
        rows, columns = len(update), update[0].numel()
        by_side.setdefault(min(rows, columns), {}).setdefault((rows, columns), []).append(i)
    for by_shape in by_side.values():
        batches = [torch.stack([_matrix(updates[i]) for i in indices]) for indices in by_shape.values()]
        grams = torch.cat([x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT for x in batches])
        norms = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + 1e-7
        products = _newton_schulz(grams / norms.square()) / norms
        for indices, x, product in zip(
                by_shape.values(), batches, products.split([len(x) for x in batches]), strict=True):
            rows, columns = x.shape[1:]
            factors = x @ (product * (rows / columns) ** 0.5) if rows > columns else product @ x
            for i, factor in zip(indices, factors):
                result[i] = _tensor(factor, updates[i].shape)
    return result


# Columns in the order in which weights that are channels last lie in memory; it does not matter to the factor.
def _matrix(x: torch.Tensor) -> torch.Tensor:
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(1)


def _tensor(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if len(shape) != 4:
        return matrix.view(shape)
    return matrix.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def _newton_schulz(gram: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return for each of the matrices ``gram = x x^T`` the factor that drives the singular values of ``x`` to about 1.

    Args:
        gram: ``(batch, side, side)``, of trace 1. The iteration ``x -> p(x x^T) x`` keeps the singular vectors of
            ``x``, so only these small matrices are iterated.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic of the reference implementation: steepest at 0
    # In float32: what bfloat16 rounds off a Gram matrix makes its smallest eigenvalues negative, and those the
    # iteration blows up, to singular values of 70 where they spread over three orders of magnitude.
    scaled_identity = a * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product: Any = None
    for step in range(steps):
        factor = torch.baddbmm(b * gram + scaled_identity, gram, gram, alpha=c)
        product = factor if step == 0 else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product
