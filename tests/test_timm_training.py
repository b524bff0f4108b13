"""What timm's `train.py --device-modules ran_layers` does with a network, on a tiny folder of images.

The script is not in timm's package; these are its steps, in its order, with timm's functions.
"""
import argparse
import importlib

import pytest
import torch
from PIL import Image
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model, load_checkpoint, model_parameters, resume_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

NARROW = dict(channels=(64, 128, 256, 512), stem_chs=16)  # every step is of timm's interface, whatever the widths


@pytest.fixture
def folder(tmp_path):
    """Two classes: dark and bright images, in training and validation."""
    for split in ("train", "validation"):
        for name, level in (("dark", 40), ("bright", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40 + i, 50), (level, level + i, level)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_steps_of_the_script(folder):
    name = "ran_att56"
    for module in ("ran_layers",):  # --device-modules
        importlib.import_module(module)
    args = argparse.Namespace(
        model=safe_model_name(name), img_size=64, input_size=None, mean=None, std=None,
        interpolation="", crop_pct=None, opt="sgd")
    utils.random_seed(0)
    model = create_model(
        name, num_classes=2, in_chans=3, global_pool=None, drop_rate=0.1, drop_path_rate=0.1, **NARROW)
    model.set_grad_checkpointing(True)
    data_config = resolve_data_config(vars(args), model=model, verbose=False)
    assert data_config["input_size"] == (3, args.img_size, args.img_size)
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=0.05, momentum=0.9, weight_decay=1e-4, layer_decay=0.9)
    ema = utils.ModelEmaV3(model, decay=0.5, use_warmup=True)
    loaders = {
        split: create_loader(
            create_dataset("", root=str(folder), split=split, is_training=split == "train", batch_size=4),
            input_size=data_config["input_size"], batch_size=4, is_training=split == "train", mean=data_config["mean"],
            std=data_config["std"], interpolation=data_config["interpolation"], crop_pct=data_config["crop_pct"],
            num_workers=0, use_prefetcher=False, device=torch.device("cpu"))
        for split in ("train", "validation")}
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=2, warmup_epochs=1, updates_per_epoch=len(loaders["train"]))
    saver = utils.CheckpointSaver(
        model=model, optimizer=optimizer, args=args, model_ema=ema, checkpoint_dir=str(folder),
        recovery_dir=str(folder), decreasing=False, max_history=2)

    before = [param.clone() for param in model.parameters()]
    updates = 0
    for epoch in range(epochs):
        model.train()
        for images, targets in loaders["train"]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = LabelSmoothingCrossEntropy(0.1)(logits, targets)
            loss.backward()
            utils.dispatch_clip_grad(model_parameters(model), value=1.0, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(num_updates=updates, metric=loss.item())
        model.eval()
        top1 = utils.AverageMeter()
        with torch.no_grad():
            for images, targets in loaders["validation"]:
                top1.update(utils.accuracy(model(images), targets, topk=(1,))[0].item(), len(targets))
        saver.save_checkpoint(epoch, metric=top1.avg)
        scheduler.step(epoch + 1, top1.avg)
    assert torch.isfinite(loss)
    assert all(not torch.equal(param, other) for param, other in zip(model.parameters(), before))

    again = create_model(name, num_classes=2, **NARROW)
    assert resume_checkpoint(again, str(folder / "last.pth.tar"), optimizer=None, log_info=False) == 2
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    load_checkpoint(again, str(folder / "last.pth.tar"), use_ema=True)
    torch.testing.assert_close(again.state_dict(), ema.module.state_dict())
