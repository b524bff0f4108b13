"""Fine-tune a network that was trained on CIFAR-10 to another data set, with timm's layer decay, and from scratch.

    python examples/finetune.py                                              # to handwritten digits, few of them
    python examples/finetune.py --dataset cifar100 --images 10000 --epochs 5 --data-dir DIR
    python examples/finetune.py --weights runs/RUN/model.safetensors         # from weights of your own
    python examples/finetune.py --model local-dir:runs/RUN                   # from a network of your own

With a layer decay of 0.7 each layer learns 0.7 times as fast as the next: the early, general ones are nearly kept.
"""
import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from training import (
    Dataset,
    Parser,
    RunError,
    accuracy,
    check_model,
    check_out,
    first_line,
    load_dataset,
    one_line_errors,
    pick_device,
    positive,
    positive_number,
    steps_of,
    train,
    write_report,
)

import ran_layers  # noqa: F401  (registers the networks with timm)


def run(pretrained: bool, data: Dataset, args: argparse.Namespace) -> float:
    """Train on the data set, from the weights or from scratch; return the accuracy."""
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    overlay: dict[str, Any] = {"file": str(args.weights)} if args.weights else {}
    try:
        model = timm.create_model(args.model, pretrained=pretrained, pretrained_cfg_overlay=overlay)
    except (RuntimeError, SafetensorError) as error:
        raise RunError(f"--weights {args.weights} are not those of {args.model} ({first_line(error)})") from error
    model.reset_classifier(len(data.class_names))
    model.to(device)
    # The groups carry an lr_scale, which timm's schedulers apply; torch's would not.
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=args.lr, weight_decay=0.05, layer_decay=args.layer_decay if pretrained else None)
    steps = steps_of(data, args.images, args.batch_size, args.epochs)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 5, t_in_epochs=False)
    seconds = train(
        model, optimizer, scheduler, data, epochs=args.epochs, batch_size=args.batch_size, images=args.images,
        device=device, seed=args.seed)
    top1 = accuracy(model, data, device)
    print(f"{'fine-tuned' if pretrained else 'from scratch'}: {100 * top1:.2f} % in {seconds:.0f} s", flush=True)
    return top1


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ran_att56_cifar.cifar10", help="a timm model with trained weights")
    parser.add_argument("--weights", type=Path, help="safetensors file of the model (default: those of the package)")
    parser.add_argument("--dataset", choices=("digits", "cifar100"), default="digits", help="what to learn")
    parser.add_argument("--data-dir", help="Parquet files on disk, in the Hub's layout (default: the Hub)")
    parser.add_argument("--images", type=positive, default=200, help="train on so many images")
    parser.add_argument("--epochs", type=positive, default=20, help="passes over them")
    parser.add_argument("--batch-size", type=positive, default=32, help="images of a step")
    parser.add_argument("--lr", type=positive_number, default=2e-3, help="highest learning rate")
    parser.add_argument("--layer-decay", type=positive_number, default=0.7,
                        help="learning rate of a layer, as a factor on that of the next")
    parser.add_argument("--seed", type=int, default=0, help="of order and augmentation")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune.json"), help="the figures")
    args = parser.parse_args(argv)
    with one_line_errors():
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Fine-tune, train from scratch, and write both accuracies.

    Raises:
        RunError: There are no such weights, data or device, or the report cannot be written.
    """
    check_model(args.model, "--model", args.weights)
    if not args.weights and ":" not in args.model:  # of a folder or the Hub, timm says what is missing
        cfg = timm.models.get_pretrained_cfg(args.model)
        if not (cfg and cfg.has_weights):
            raise RunError(f"the package has no weights for {args.model}; name a safetensors file with --weights")
    device = pick_device(args.device)
    check_out(args.out)
    data = load_dataset(args.dataset, args.data_dir)
    args.images = min(args.images, len(data.train_labels))
    accuracies = {name: round(run(name == "finetuned", data, args), 4) for name in ("finetuned", "scratch")}
    write_report(
        args.out, device, model=args.model, weights=args.weights and str(args.weights), dataset=args.dataset,
        images=args.images, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, layer_decay=args.layer_decay,
        seed=args.seed, accuracy=accuracies)


if __name__ == "__main__":
    main()
