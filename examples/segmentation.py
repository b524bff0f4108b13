"""A segmentation head on `features_only`: which pixels belong to which handwritten digit.

    python examples/segmentation.py            # a few minutes on two CPU cores, no download

The images are made of scikit-learn's digits, two of them at random places of a noisy 64x64 canvas; the labels are
0 for the background and 1 + digit where a digit is.
"""
import argparse
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from training import (
    Parser,
    RunError,
    check_model,
    check_out,
    first_line,
    load_dataset,
    names_weights,
    one_line_errors,
    pick_device,
    positive,
    positive_number,
    write_report,
)

import ran_layers  # noqa: F401  (registers the networks with timm)

CLASSES = 11
SIDE = 64


class Segmenter(nn.Module):
    """Feature maps of every level, brought to one width and the first level's resolution, summed and classified."""

    def __init__(self, backbone: str, width: int = 64) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, pretrained=names_weights(backbone), features_only=True)
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in self.backbone.feature_info.channels())
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, CLASSES, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [lateral(feature) for lateral, feature in zip(self.laterals, self.backbone(x))]
        size = features[0].shape[-2:]
        maps = sum(F.interpolate(f, size=size, mode="bilinear", align_corners=False) for f in features)
        return F.interpolate(self.head(maps), size=x.shape[-2:], mode="bilinear", align_corners=False)


def make_batch(
        digits: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(count, 3, 64, 64)`` and pixel labels ``(count, 64, 64)``."""
    images = torch.rand(count, SIDE, SIDE, generator=generator) * 0.5
    targets = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    side = digits.shape[-1]
    for image, target in zip(images, targets):
        for half in range(2):  # one digit in the left half, one in the right, so that none hides the other
            row = int(torch.randint(len(digits), (), generator=generator))
            top = int(torch.randint(SIDE - side + 1, (), generator=generator))
            place = slice(top, top + side), slice(half * side, (half + 1) * side)
            ink = digits[row] > 0.4
            image[place] = torch.where(ink, digits[row], image[place])
            target[place] = torch.where(ink, labels[row] + 1, target[place])
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), targets


@torch.no_grad()
def mean_iou(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Return the intersection over union, averaged over the classes that occur."""
    model.eval()
    confusion = torch.zeros(CLASSES, CLASSES)
    for images, targets in batches:
        predicted = model(images.to(device)).argmax(1).cpu()
        confusion += torch.bincount((CLASSES * targets + predicted).flatten(), minlength=CLASSES ** 2).view(
            CLASSES, CLASSES)
    hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return float((hits / union)[union > 0].mean())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default="ran_att56_cifar",
                        help="any timm model with features_only: with its trained weights if the name has a tag")
    parser.add_argument("--steps", type=positive, default=250, help="of the training")
    parser.add_argument("--batch-size", type=positive, default=32, help="images of a step")
    parser.add_argument("--lr", type=positive_number, default=2e-3, help="highest learning rate")
    parser.add_argument("--test-images", type=positive, default=128, help="test on so many images")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation.json"), help="the figures")
    args = parser.parse_args(argv)
    with one_line_errors():
        segment(args)


def segment(args: argparse.Namespace) -> None:
    """Train, and write the mean intersection over union.

    Raises:
        RunError: There is no such backbone or device, or the report cannot be written.
    """
    check_model(args.backbone, "--backbone")
    torch.manual_seed(0)
    device = pick_device(args.device)
    check_out(args.out)
    data = load_dataset("digits")
    train_digits, test_digits = data.train_images[..., 0].float() / 255, data.test_images[..., 0].float() / 255
    generator = torch.Generator().manual_seed(0)
    images, targets = make_batch(test_digits, data.test_labels, args.test_images, generator)
    test = list(zip(images.split(32), targets.split(32)))

    model = Segmenter(args.backbone).to(device)
    try:
        with torch.no_grad():
            model.eval()(images[:1].to(device))
    except (AssertionError, RuntimeError) as error:  # a network of one input size, or whose features are no maps
        raise RunError(f"--backbone {args.backbone} gives no feature maps of {SIDE}x{SIDE} images "
                       f"({first_line(error)})") from error
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1)
    for step in range(args.steps):
        images, targets = make_batch(train_digits, data.train_labels, args.batch_size, generator)
        loss = F.cross_entropy(model.train()(images.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    iou = mean_iou(model, test, device)
    print(f"mean intersection over union of {CLASSES} classes: {iou:.3f}")
    write_report(
        args.out, device, backbone=args.backbone, steps=args.steps, batch_size=args.batch_size, lr=args.lr,
        mean_iou=round(iou, 4))


if __name__ == "__main__":
    main()
