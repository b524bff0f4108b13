"""Scoring a network on images in memory, and counting its operations."""
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import augment
from harness.distributed import World


@torch.inference_mode()
def evaluate(
        model: Any, images: torch.Tensor, labels: torch.Tensor, device: torch.device, autocast: Any,
        flip: bool = False, world: World | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent of ``model`` on uint8 ``images`` ``(rows, height, width, channels)``.

    Args:
        world: Each of its processes takes a part of the images; all get the figures of the whole.
        flip: Average the logits of each image and its mirror image (test-time augmentation).
    """
    was_training = model.training
    model.eval()
    # On a GPU so many at once that an evaluation takes less time than it would take to compile it.
    batch_size = 2500 if device.type == "cuda" else 500
    mean = torch.tensor(model.pretrained_cfg["mean"], device=device) * 255
    std = torch.tensor(model.pretrained_cfg["std"], device=device) * 255
    correct = torch.zeros(2, dtype=torch.long, device=device)
    world = world or World()
    parts = images[world.rank::world.size], labels[world.rank::world.size]
    for x, y in zip(parts[0].split(batch_size), parts[1].split(batch_size)):
        x, y = augment.normalize(x.to(device), mean, std), y.to(device)
        with autocast, torch.compiler.set_stance("force_eager"):
            logits = model(x).float()
            if flip:
                logits = logits + model(x.flip(3)).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        correct += torch.stack([ranked[:, 0].sum(), ranked.sum()])
    model.train(was_training)
    top1, top5 = (100 * world.sum(correct).double() / len(labels)).tolist()
    return {"top1": top1, "top5": top5}


def count_macs(model: torch.nn.Module, side: int | None = None) -> int:
    """Return the multiply-accumulate operations of convolutions and linear layers for one image.

    The image has the size the model is configured for, or ``side`` pixels each way.
    """
    device = next(model.parameters()).device
    was_training, trained = model.training, [param for param in model.parameters() if param.requires_grad]
    # The counter follows gradients, which takes as long again. With torch.no_grad alone it fails where a module is
    # given a parameter that has one, as a token of a transformer.
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        channels, *size = model.pretrained_cfg["input_size"]
        model(torch.zeros(1, channels, *([side] * 2 if side else size), device=device))
    model.train(was_training)
    for param in trained:
        param.requires_grad_()
    return counter.get_total_flops() // 2
