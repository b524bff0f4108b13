"""The augmentation of batches, against what each method is defined as."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import augment
from harness.recipes import make_recipe


def test_augmentations_do_what_they_say():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (64, 32, 32, 3), generator=generator, dtype=torch.uint8)
    flip = torch.arange(64) % 2 == 0
    same = augment.crop_flip(images, flip, 0, "reflect", generator)
    assert torch.equal(same, torch.where(flip[:, None, None, None], images.flip(2), images))

    # Every crop is a window of the padded image.
    for mode, torch_mode in (("reflect", "reflect"), ("zeros", "constant")):
        crops = augment.crop_flip(images, torch.zeros(64, dtype=torch.bool), 4, mode, generator)
        padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (4,) * 4, mode=torch_mode)
        for crop, image in zip(crops.permute(0, 3, 1, 2).float(), padded, strict=True):
            windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # channels, 9, 9, 32, 32
            assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()

    x = augment.normalize(images, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x[:, 2], (images[..., 2].float() - 3) / 2)
    assert torch.allclose(augment.rotate_shift(x, 0, 0, generator), x, atol=1e-4)
    ramp = torch.arange(32.0).expand(256, 1, 32, 32)
    moved = augment.rotate_shift(ramp, 0, 0.1, generator)[:, 0, 16, 16] - 16
    assert 2.5 < moved.abs().max() <= 3.2 + 1e-3  # a tenth of 32 pixels
    turned = augment.rotate_shift(ramp, 15, 0, generator)[:, 0]
    angle = torch.atan2(turned[:, 17, 16] - turned[:, 16, 16], turned[:, 16, 17] - turned[:, 16, 16]).rad2deg()
    assert 12 < angle.abs().max() <= 15.1
    small = augment.resize(x, 24)
    assert small.shape == (64, 3, 24, 24)
    assert torch.allclose(small.mean((2, 3)), x.mean((2, 3)), atol=2)
    erased = (augment.cutout(torch.ones(64, 3, 32, 32), 8, generator) == 0).sum(dim=(1, 2, 3))
    assert erased.max() == 3 * 64
    assert erased.min() >= 3 * 16

    targets = torch.eye(10)[torch.arange(64) % 10]
    for mixup, cutmix in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        # Images that are constant and equal to the class: the mixed target must be the mixed image's mean.
        flat = (torch.arange(64) % 10).float()[:, None, None, None].expand(64, 3, 32, 32)
        mixed, mixed_targets = augment.mix(flat, targets, mixup, cutmix, generator)
        assert torch.allclose(mixed_targets.sum(1), torch.ones(64))
        assert torch.allclose(mixed.mean((1, 2, 3)), mixed_targets @ torch.arange(10.0), atol=1e-4)
        assert not torch.equal(mixed, flat)


def test_cutout_erases_the_same_part_of_smaller_images():
    recipe = make_recipe("best", "cifar10", {"cutout": 12, "pad": 0})
    flip, targets = torch.zeros(64, dtype=torch.bool), torch.eye(10)[torch.zeros(64, dtype=torch.long)]
    for progress, side, hole in ((0.0, 24, 9), (0.9, 32, 12)):
        x, _ = augment.augment_batch(
            torch.full((64, 32, 32, 3), 200, dtype=torch.uint8), flip, targets, recipe, progress,
            torch.zeros(3), torch.ones(3), torch.Generator().manual_seed(0))
        assert x.shape[-2:] == (side, side)
        assert (x == 0).sum(dim=(1, 2, 3)).max() == 3 * hole ** 2


def test_cutmix_is_as_likely_on_the_left_as_on_the_right():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(2.0)[:, None, None, None].expand(2, 1, 8, 8)
    changed = torch.zeros(8, 8)
    for _ in range(4000):
        changed += (augment.mix(ramp, torch.eye(2), 0.0, 1.0, generator)[0][0, 0] != 0).float()
    left, right = changed[:, 0].mean(), changed[:, -1].mean()
    assert (left - right).abs() < 0.06 * right
