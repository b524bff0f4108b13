"""Train, evaluate and save a network on CIFAR-10, CIFAR-100 or digits.

    python benchmarks/cifar.py --dataset digits            # about a minute on two CPU cores, no download
    python benchmarks/cifar.py                             # ran_att56_cifar on CIFAR-10 from the Hub
    python benchmarks/cifar.py --data-dir DIR              # ... from Parquet files on disk
    torchrun --nproc-per-node 2 benchmarks/cifar.py  # ... data-parallel
    python benchmarks/cifar.py --resume --out DIR          # go on after an interruption
    python benchmarks/cifar.py --eval-only --out DIR       # the accuracy of a finished run
"""
import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from augment import augment_batch
from checkpoint import (
    FILE_NAME,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    prefixed,
    save_checkpoint,
    without_prefix,
    write_atomic,
)
from data import DATASETS, Dataset, corrupt_labels, load_dataset
from display import Display, draw_curves, draw_masks_of, duration, show_plan
from distributed import data_parallel, join_world, leave_world, sync_batch_norm
from environment import (
    bf16_is_fast,
    compile_model,
    hardware,
    pick_device,
    price_of_determinism,
    use_deterministic_kernels,
    versions,
    warm_up,
)
from errors import RunError
from evaluate import count_macs, evaluate, export_model, load_exported
from recipes import CHOICES, RECIPES, Recipe, lr_scale, make_optimizer, make_recipe, resolutions
from timm import create_model, is_model
from timm.utils import ModelEmaV3

import ran_layers  # noqa: F401  (registers the networks with timm)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="ran_att56_cifar", help="any timm model name")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE",
                        help="arguments of the model, values as JSON, e.g. attention_args='{\"learning\": \"naive\"}'")
    parser.add_argument("--dataset", default="cifar10", choices=DATASETS)
    parser.add_argument("--data-dir", help="Parquet files on disk, in the Hub's layout (default: the Hub)")
    parser.add_argument("--recipe", choices=RECIPES, help="default: best on a GPU, quick on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where the processor has it")
    parser.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=True,
                        help="under torchrun, batch normalisation over the global batch, not each process's slice")
    parser.add_argument("--holdout", type=int, default=0, metavar="ROWS",
                        help="keep so many training images out and evaluate each epoch on them")
    parser.add_argument("--eval-every", type=int, default=0, metavar="EPOCHS",
                        help="evaluate on the test set as training goes on, for curves; nothing is picked by it")
    parser.add_argument("--limit", type=int, default=0, metavar="ROWS", help="train on the first ROWS images only")
    parser.add_argument("--label-noise", type=float, default=0.0, metavar="SHARE",
                        help="give this share of the training images a wrong label (the paper's section 4.1)")
    parser.add_argument("--deterministic", action="store_true",
                        help="same weights from the same seed on a GPU too, and what that costs; a CPU always does so")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/MODEL-DATASET-RECIPE-SEED)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the finished run in --out")
    group = parser.add_argument_group("hyper-parameters", "override the recipe's")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        default: Any = field.default
        assert default is not MISSING
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif isinstance(default, tuple):
            group.add_argument(flag, type=float, nargs="*", default=None)
        else:
            group.add_argument(flag, type=type(default), choices=CHOICES.get(field.name), default=None)
    args = parser.parse_args(argv)
    args.overrides = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(Recipe) if (value := getattr(args, field.name)) is not None
    }
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def command(argv: list[str], processes: int, *, places: bool = True) -> str:
    """Return the command line; without ``places``, only what decides the result, not where files lie."""
    launcher = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"]
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif not places and word.partition("=")[0] in ("--out", "--data-dir", "--resume"):
            skip = "=" not in word and word != "--resume"
        else:
            kept.append(word)
    return shlex.join([*launcher, "benchmarks/cifar.py", *kept])


def build_model(args: argparse.Namespace, recipe: Recipe, data: Dataset) -> torch.nn.Module:
    """Create the network for the data set, with the configuration that is saved beside its weights."""
    if not is_model(args.model):
        raise RunError(f"--model {args.model} is no timm model; see timm.list_models('ran_*') and timm.list_models()")
    kwargs = {}
    for item in args.model_kwargs:
        key, _, value = item.partition("=")
        try:
            kwargs[key] = json.loads(value)
        except ValueError:
            raise RunError(f"--model-kwargs must be KEY=VALUE with VALUE as JSON, got {item}") from None
    if recipe.drop_path:
        kwargs["drop_path_rate"] = recipe.drop_path
    mean, std = (data.mean, data.std) if recipe.standardize else ((0.0,) * 3, (1.0,) * 3)
    overlay = dict(
        tag=data.name, num_classes=len(data.class_names), input_size=(3, *data.train_images.shape[1:3]), mean=mean,
        std=std, crop_pct=1.0, label_names=data.class_names)
    try:
        model = create_model(
            args.model, num_classes=len(data.class_names), pretrained_cfg_overlay=overlay, **kwargs)
    except (TypeError, ValueError) as error:
        raise RunError(f"--model {args.model} with {kwargs}: {error}") from error
    model.model_kwargs = kwargs
    return model


def train(args: argparse.Namespace) -> None:
    world, device = join_world(args.device)
    recipe_name = args.recipe or ("best" if device.type == "cuda" else "quick")
    recipe = make_recipe(recipe_name, args.dataset, args.overrides)
    out: Path = args.out or Path("runs") / f"{args.model}-{args.dataset}-{recipe_name}-{args.seed}"
    if args.deterministic:
        use_deterministic_kernels()
    if args.precision is None:
        args.precision = "bf16" if bf16_is_fast(device) else "fp32"

    if recipe.batch_size % world.size:
        raise RunError(f"--batch-size {recipe.batch_size} must be a multiple of the {world.size} processes")
    sync_bn = world.size > 1 and args.sync_bn

    # Everything that decides the result; a checkpoint made under other settings is refused.
    settings = dict(
        model=args.model, model_kwargs=args.model_kwargs, dataset=args.dataset, recipe=recipe_name, **asdict(recipe),
        seed=args.seed, precision=args.precision, holdout=args.holdout, limit=args.limit, label_noise=args.label_noise,
        bn_batch=recipe.batch_size if sync_bn else recipe.batch_size // world.size)
    settings = json.loads(json.dumps(settings))
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {"step": 0, "epochs": [], "seconds": 0.0}
    if args.resume:
        tensors, state = load_checkpoint(out)
        changed = [key for key, value in state["settings"].items() if settings.get(key) != value]
        if changed:
            raise RunError(
                f"--resume: the checkpoint in {out} has {changed[0]} = {state['settings'][changed[0]]}, this command "
                f"{settings.get(changed[0])}; give the same settings or another --out")
    elif out.is_dir() and any((out / name).exists() for name in (FILE_NAME, "result.json", "model.safetensors")):
        raise RunError(f"--out {out} already has a run; add --resume to go on with it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)

    # Data: one uint8 tensor on the training device.
    with world.main_first() if args.data_dir is None else contextlib.nullcontext():
        data = load_dataset(args.dataset, args.data_dir)
    images, labels = data.train_images, data.train_labels
    if args.limit:
        images, labels = images[:args.limit], labels[:args.limit]
    eval_split = "test"
    eval_images, eval_labels = data.test_images, data.test_labels
    if args.holdout:
        if args.holdout >= len(images):
            raise RunError(f"--holdout must be below the {len(images)} training images, got {args.holdout}")
        eval_split, eval_images, eval_labels = "held-out", images[-args.holdout:], labels[-args.holdout:]
        images, labels = images[:-args.holdout], labels[:-args.holdout]
    if not 0 <= args.label_noise <= 1:
        raise RunError(f"--label-noise must be from 0 to 1, got {args.label_noise:g}")
    if args.label_noise:
        labels = corrupt_labels(labels, len(data.class_names), args.label_noise, args.seed)
    images, labels = images.to(device), labels.to(device)
    if len(images) < recipe.batch_size:
        raise RunError(f"--batch-size {recipe.batch_size} is above the {len(images)} training images")

    # Model, optimiser, average.
    torch.manual_seed(args.seed)
    model = build_model(args, recipe, data)
    params, macs = sum(p.numel() for p in model.parameters()), count_macs(model)
    model = model.to(device, memory_format=torch.channels_last)
    mean = torch.tensor(model.pretrained_cfg["mean"], device=device) * 255
    std = torch.tensor(model.pretrained_cfg["std"], device=device) * 255
    optimizer = make_optimizer(recipe, model)
    # The warm-up keeps the random initial weights out of the average.
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    if args.resume:
        model.load_state_dict(without_prefix("model", tensors))
        load_optimizer_tensors(optimizer, without_prefix("optimizer", tensors))
        if ema is not None:
            ema.load_state_dict(without_prefix("ema", tensors))
    if world.rank:
        torch.manual_seed(args.seed + world.rank)  # dropout and stochastic depth differ between the slices
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    forward = compile_model(data_parallel(sync_batch_norm(model, device) if sync_bn else model, world, device), device)
    shapes = [(recipe.batch_size // world.size, images.shape[-1], side, side)
              for side in resolutions(recipe, images.shape[1])]

    steps_per_epoch = len(images) // recipe.batch_size
    total_steps = recipe.epochs * steps_per_epoch
    plan = {
        "model": f"{args.model}, {params / 1e6:.2f} M parameters, {macs / 1e6:.1f} MMACs an image",
        "data set": f"{args.dataset}, {len(images)} training and {len(data.test_images)} test images"
                    + (f", {args.holdout} held out" if args.holdout else ""),
        "device": f"{hardware(device)['name']} ({device}), {args.precision}"
                  + (f", {world.size} processes" if world.size > 1 else ""),
        "recipe": f"{recipe_name}, {recipe.epochs} epochs of {steps_per_epoch} steps of {recipe.batch_size} images, "
                  f"{recipe.optimizer}, lr {recipe.lr:g}",
        "out": f"{out}" + (f", resumed at step {state['step']} of {total_steps}" if args.resume else ""),
    }
    if world.main:
        show_plan(plan)
    compile_seconds = 0.0
    if device.type == "cuda":
        compile_seconds = warm_up(forward, model, shapes, autocast)
        if world.main:
            print(f"compiled in {duration(compile_seconds)}", flush=True)
    price = None
    if args.deterministic and device.type == "cuda":
        price = price_of_determinism(model, shapes[-1], autocast)
        if world.main:
            print(f"--deterministic: {price:.1%} more time a step", flush=True)

    stop = {"signal": 0}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.update(signal=received))

    def checkpoint(step: int, epochs: list[dict[str, Any]], seconds: float, extra: dict[str, torch.Tensor]) -> None:
        world.average_buffers(model, ema)
        if not world.main:
            return
        named = dict(prefixed("model", model.state_dict()))
        named.update(prefixed("optimizer", optimizer_tensors(optimizer)))
        if ema is not None:
            named.update(prefixed("ema", ema.state_dict()))
        named.update(extra, torch_rng=torch.get_rng_state())
        save_checkpoint(out, named, {"step": step, "epochs": epochs, "seconds": seconds, "settings": settings})

    # Alternate flips: one half of the images is mirrored in even epochs, the other in odd ones.
    always_flip = torch.rand(
        len(images), generator=torch.Generator(device).manual_seed(args.seed), device=device) < 0.5
    step: int = state["step"]
    epochs: list[dict[str, Any]] = state["epochs"]
    seconds_before: float = state["seconds"]
    started = time.perf_counter()
    if "torch_rng" in tensors:
        torch.set_rng_state(tensors["torch_rng"])
    model.train()
    with Display(recipe.epochs, steps_per_epoch, recipe.batch_size, step, quiet=not world.main) as display:
        while step < total_steps:
            epoch, in_epoch = divmod(step, steps_per_epoch)
            # One generator an epoch, so that an epoch's order follows from seed and epoch alone.
            generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator, device=device)
            sums = torch.zeros(2, device=device)  # of loss and correct answers, read once an epoch
            if in_epoch:
                generator.set_state(tensors["generator"])
                sums = tensors["sums"].to(device)
            epoch_started, first = time.perf_counter(), in_epoch

            for in_epoch in range(first, steps_per_epoch):
                progress = step / total_steps
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * lr_scale(recipe, progress)
                rows = order[in_epoch * recipe.batch_size:(in_epoch + 1) * recipe.batch_size]
                y = labels[rows]
                if recipe.flip == "alternate":
                    flip = always_flip[rows] ^ bool(epoch % 2)
                elif recipe.flip == "random":
                    flip = torch.rand(len(rows), generator=generator, device=device) < 0.5
                else:
                    flip = torch.zeros(len(rows), dtype=torch.bool, device=device)
                targets = F.one_hot(y, len(data.class_names)).to(mean.dtype)
                x, targets = augment_batch(images[rows], flip, targets, recipe, progress, mean, std, generator)
                x, y, targets = world.share(x), world.share(y), world.share(targets)

                with autocast:
                    logits = forward(x)
                    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if ema is not None:
                    ema.update(model, step=step)
                sums += torch.stack([loss.detach().float(), (logits.detach().argmax(1) == y).float().mean()])
                # Reading a figure waits for a GPU, so there the bar goes without figures inside the epoch.
                if device.type == "cpu":
                    done = in_epoch + 1
                    display.step(step, sums[0].item() / done, 100 * sums[1].item() / done)
                else:
                    display.step(step)
                stopped = world.any(stop["signal"])
                if stopped:
                    break

            sums = world.mean(sums)
            seconds = seconds_before + time.perf_counter() - started
            if stopped and in_epoch + 1 < steps_per_epoch:
                checkpoint(step, epochs, seconds, {"generator": generator.get_state(), "sums": sums.cpu()})
                break
            loss_mean, top1_mean = (sums / steps_per_epoch).tolist()
            if loss_mean != loss_mean:
                raise RunError(
                    f"the loss is not a number in epoch {epoch + 1}; the last good checkpoint is kept in {out}; "
                    f"try a lower --lr")
            elapsed = time.perf_counter() - epoch_started
            row = dict(epoch=epoch + 1, train_loss=loss_mean, train_top1=100 * top1_mean,
                       lr=optimizer.param_groups[0]["lr"], seconds=elapsed,
                       images_per_s=(in_epoch + 1 - first) * recipe.batch_size / elapsed)
            if args.holdout or (args.eval_every and (epoch + 1) % args.eval_every == 0):
                world.average_buffers(model, ema)
                scores = evaluate(
                    model if ema is None else ema.module, eval_images, eval_labels, device, autocast, world=world)
                row.update(eval_split=eval_split, eval_top1=scores["top1"])
            epochs.append(row)
            display.epoch(row)
            checkpoint(step, epochs, seconds_before + time.perf_counter() - started, {})
            if stopped:
                break

    if step < total_steps:
        if not world.main:
            sys.exit(128 + stopped)
        again = command(args.argv, world.size)
        for flag, addition in (("--resume", " --resume"), ("--out", f" --out {shlex.quote(str(out))}")):
            again += addition if flag not in again else ""
        print(f"stopped at step {step} of {total_steps}, saved; go on with: {again}", flush=True)
        sys.exit(128 + stopped)

    seconds = seconds_before + time.perf_counter() - started
    if not world.main:
        return
    final = model if ema is None else ema.module
    final.pretrained_cfg = model.pretrained_cfg
    export_model(final, out, model.model_kwargs)
    write_result(args, out, data, dict(
        model=args.model, dataset=args.dataset, recipe=recipe_name, settings=settings, params=params, macs=macs,
        seed=args.seed, epochs=epochs, seconds=seconds, compile_seconds=compile_seconds, deterministic_price=price,
        images_per_s=recipe.epochs * steps_per_epoch * recipe.batch_size / sum(row["seconds"] for row in epochs),
        hardware=hardware(device), versions=versions(),
        processes=world.size, command=command(args.argv, world.size, places=False),
        selection="none: the weights are those of the last step"
                  + (" (their moving average)" if ema is not None else "")
                  + (f"; {args.holdout} training images were held out and watched" if args.holdout else "")
                  + ("; the test set was watched, nothing was picked by it" if args.eval_every else ""),
    ), device, autocast)


def write_result(args: argparse.Namespace, out: Path, data: Dataset, result: dict[str, Any], device: torch.device,
                 autocast: Any) -> None:
    """Evaluate the exported model on the test set, write result.json and the pictures, and print the figure."""
    model = load_exported(out).to(device, memory_format=torch.channels_last)
    scorer = compile_model(model, device)
    scores = evaluate(scorer, data.test_images, data.test_labels, device, autocast)
    flipped = evaluate(scorer, data.test_images, data.test_labels, device, autocast, flip=True)
    result["final"] = dict(scores, error=100 - scores["top1"], top1_flip=flipped["top1"])
    write_atomic(out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    title = f"{args.model} on {args.dataset}: {result['final']['error']:.2f} % test error"
    write_atomic(out / "curves.png", draw_curves(result["epochs"], title))
    picture = draw_masks_of(
        model.cpu(), data.test_images[:6], [data.class_names[label] for label in data.test_labels[:6]])
    if picture is not None:
        write_atomic(out / "masks.png", picture)
    print_final(result, out)


def print_final(result: dict[str, Any], out: Path) -> None:
    final = result["final"]
    print(f"{result['model']} on {result['dataset']}: test top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} %, "
          f"error {100 - final['top1']:.2f} %, trained in {duration(result['seconds'])}; saved in {out}", flush=True)


def eval_only(args: argparse.Namespace) -> None:
    if args.out is None:
        raise RunError("--eval-only needs --out, the folder of a finished run")
    try:
        result = json.loads((args.out / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"--eval-only: no finished run in {args.out} ({error})") from error
    device = pick_device(args.device)
    data = load_dataset(result["dataset"], args.data_dir)
    model = load_exported(args.out).to(device, memory_format=torch.channels_last)
    precision = args.precision or result["settings"]["precision"]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    result["final"].update(evaluate(model, data.test_images, data.test_labels, device, autocast))
    print_final(result, args.out)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        eval_only(args) if args.eval_only else train(args)
    except (RunError, OSError) as error:
        sys.exit(_fail(str(error)))
    finally:
        leave_world()


def _fail(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
