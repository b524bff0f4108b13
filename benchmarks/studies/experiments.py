"""The experiments of `study.py`, as data: the report's tables, the paper's ablations, and what we ask ourselves.

An experiment is one command of `cifar.py`, but for its seed. A table compares experiments that share every setting
but the one it is about; the same experiment may stand in several.
"""
import json
from dataclasses import dataclass
from typing import Any

from ran_layers.published import LABEL_NOISE, PUBLISHED, Published


@dataclass(frozen=True)
class Experiment:
    """Arguments of `cifar.py`."""

    model: str = "ran_att56_cifar"
    dataset: str = "cifar10"
    recipe: str = "best"
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    args: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)

    def arguments(self) -> list[str]:
        """Return the command line after `cifar.py`, without the seed."""
        words = ["--model", self.model, "--dataset", self.dataset, "--recipe", self.recipe]
        if self.model_kwargs:
            words += ["--model-kwargs", *(f"{key}={json.dumps(value)}" for key, value in self.model_kwargs)]
        return [*words, *self.args]


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called, whose result it shows, the published figure beside it, and the
    experiment that it is compared with."""

    label: str
    experiment: str
    published: Published | None = None
    against: str = ""


@dataclass(frozen=True)
class Table:
    """A comparison, with what it is about and the images whose errors it shows: ``test`` or ``held-out`` ones."""

    title: str
    text: str
    rows: tuple[Row, ...]
    images: str = "test"


# Of the trainings for accuracy: batches that fill a GPU better and all images at their full size; and augmentation.
_LARGE_BATCHES = ("--batch-size", "512", "--lr", "0.05", "--resolutions")
_AUGMENTATION = {"cifar10": ("--cutout", "12"), "cifar100": ("--cutmix", "0.4")}
# What was tried for a recipe that gets furthest in some seven minutes on two processors.
_MUON_128 = ("--batch-size", "128", "--muon-sgd-lr", "0.07", "--ema-decay", "0.998", "--epochs", "10")
_QUICK_TRIED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "quick": ("Recipe `quick`: images of 16, 24 and 32 px, padded by 2", "quick", ()),
    "quick-smaller": ("... more of them small", "quick",
                      ("--resolutions", "0", "16", "0.4", "24", "0.75", "32", "--epochs", "17")),
    "quick-batch64": ("... all of 32 px, batches of 64", "quick",
                      ("--resolutions", "--batch-size", "64", "--lr", "0.1", "--epochs", "10")),
    "quick-pad4": ("... all of 32 px, padded by 4 (`quick` before)", "quick",
                   ("--resolutions", "--pad", "4", "--epochs", "10")),
    "best10": ("Recipe `best`", "best", ("--epochs", "10")),
    "muon128": ("... batches of 128", "best", (*_MUON_128, "--lr", "0.03")),
    "muon128-pad2": ("... batches of 128, padded by 2", "best", (*_MUON_128, "--lr", "0.03", "--pad", "2")),
    "muon128-pad2-lr6": ("... the same, learning rate 0.06", "best", (*_MUON_128, "--lr", "0.06", "--pad", "2")),
}


def longer(model: str, dataset: str, epochs: int) -> Experiment:
    """A training for accuracy."""
    return Experiment(
        model, dataset, args=("--epochs", str(epochs), *_LARGE_BATCHES, *_AUGMENTATION[dataset]), seeds=(0,))


def held_out(dataset: str, *args: str, recipe: str = "best") -> Experiment:
    """A training whose error is that on a fifth of the training images, held out: what may choose a setting."""
    return Experiment(dataset=dataset, recipe=recipe, args=("--holdout", "10000", *args), seeds=(0,))


def attention(**kwargs: Any) -> tuple[tuple[str, Any], ...]:
    """Arguments of every Attention Module of a network."""
    return (("attention_args", kwargs),)


def trunk(*units: int) -> tuple[tuple[str, Any], ...]:
    """A network without Attention Modules, with so many units in each stage after the opening one."""
    return (("modules", [0] * len(units)), ("closing_units", list(units)))


def cite(source: str, network: str, dataset: str = "cifar10", variant: str = "") -> Published:
    """Return the one published figure that fits."""
    (found,) = (row for row in PUBLISHED if row[:3] == (source, network, dataset) and row.variant == variant)
    return found


def noisy(name: str, share: float, recipe: str) -> str:
    """Name the experiment with a share of wrong labels."""
    return f"{name}-noise{round(100 * share)}-{recipe}"


def noise(network: str, share: float) -> Published:
    """Return the paper's figure under label noise."""
    return Published("paper", network, "cifar10", LABEL_NOISE[network][share], f"{share:.0%} noise")


DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
# Depths of which the paper states an error.
_PAPER = {"cifar10": (56, 92, 128, 164, 236, 452), "cifar100": (92, 236, 452)}
_NAIVE = "naive attention learning"
_NOISE = (0.1, 0.3, 0.5, 0.7)

EXPERIMENTS: dict[str, Experiment] = {
    # The report's networks, its recipe and ours.
    **{
        f"att{depth}-{dataset}-{recipe}": Experiment(f"ran_att{depth}_cifar", dataset, recipe)
        for recipe in ("report", "best") for dataset in ("cifar10", "cifar100") for depth in (56, 92)
    },
    # ... in the way that the training script takes by itself on a CPU,
    "att56-cifar10-quick": Experiment(recipe="quick"),
    # ... and how the shipped weights were trained, some of them for longer.
    **{
        f"att{depth}-{dataset}-long": longer(f"ran_att{depth}_cifar", dataset, 110)
        for dataset in DATASETS for depth in (56, 92)
    },
    # ... and the settings that those have, one left out after the other.
    **{
        f"att56-{dataset}-held-{name}": held_out(dataset, *args)
        for dataset in DATASETS for name, args in (
            ("long", (*_LARGE_BATCHES, *_AUGMENTATION[dataset])), ("plain", _LARGE_BATCHES), ("best", ()))
    },
    # ... and what the recipe `quick` was chosen from.
    **{f"att56-cifar10-held-{name}": held_out("cifar10", *args, recipe=recipe)
       for name, (_, recipe, args) in _QUICK_TRIED.items()},
    # The paper's networks, its recipe and ours.
    **{
        f"orig{depth}-{dataset}-{recipe}": Experiment(f"ran_att{depth}_cifar_orig", dataset, recipe)
        for recipe in ("paper", "best") for dataset, depths in _PAPER.items() for depth in depths
    },
    # The widths that the report began with, the paper's for ImageNet: four times those of its networks.
    **{
        f"att56-widths-{dataset}-report": Experiment(
            dataset=dataset, recipe="report", model_kwargs=(("channels", [256, 512, 1024, 2048]),))
        for dataset in DATASETS
    },
    # Naive attention learning: M * T instead of (1 + M) * T.
    "att56-naive-report": Experiment(recipe="report", model_kwargs=attention(learning="naive")),
    "att56-naive-best": Experiment(model_kwargs=attention(learning="naive")),
    **{
        f"orig{depth}-naive-paper": Experiment(
            f"ran_att{depth}_cifar_orig", recipe="paper", model_kwargs=attention(learning="naive"))
        for depth in (56, 92, 128, 164)
    },
    # Masks without the way down and up.
    "att56-local-report": Experiment(recipe="report", model_kwargs=attention(mask="local")),
    "att56-local-best": Experiment(model_kwargs=attention(mask="local")),
    "orig56-local-paper": Experiment("ran_att56_cifar_orig", recipe="paper", model_kwargs=attention(mask="local")),
    # Baselines. The trunks alone: as deep as Attention-56's, of equal MACs, of equal parameters.
    "plain8-report": Experiment("plain_cnn8_cifar", recipe="report"),
    "plain8-best": Experiment("plain_cnn8_cifar"),
    "resnet18-best": Experiment("resnet18_cifar"),
    "trunk56-best": Experiment(model_kwargs=trunk(4, 4, 4, 2)),
    "trunk56-macs-best": Experiment(model_kwargs=trunk(8, 6, 6, 2)),
    "trunk56-params-best": Experiment(model_kwargs=trunk(8, 8, 9, 2)),
    "trunk92-params-best": Experiment("ran_att92_cifar", model_kwargs=trunk(16, 16, 18, 2)),
    # Optimiser and batch size, the report's section 4.
    **{
        f"att56-sgd{batch}-report": Experiment(recipe="report", args=("--batch-size", str(batch)))
        for batch in (32, 256)
    },
    **{
        f"att56-adam{batch}-report": Experiment(
            recipe="report", args=("--optimizer", "adam", "--lr", "0.001", "--batch-size", str(batch)))
        for batch in (32, 64, 256)
    },
    "att56-sgd-best": Experiment(
        args=("--optimizer", "sgd", "--lr", "0.3", "--weight-decay", "5e-4")),
    # The mask's activation.
    **{
        f"{network}-{kind}-{recipe}": Experiment(model, recipe=recipe, model_kwargs=attention(mask_act=kind))
        for network, model, recipe in (
            ("orig56", "ran_att56_cifar_orig", "paper"), ("att56", "ran_att56_cifar", "best"))
        for kind in ("channel", "spatial")
    },
    # Label noise; the plain networks are the trunks with units added until they have as many parameters.
    **{
        noisy(name, share, recipe): Experiment(model, recipe=recipe, model_kwargs=kwargs,
                                               args=("--label-noise", str(share)))
        for share in _NOISE for name, model, recipe, kwargs in (
            ("orig92", "ran_att92_cifar_orig", "paper", ()),
            ("trunk92", "ran_att92_cifar_orig", "paper", trunk(20, 20, 18)),
            ("att92", "ran_att92_cifar", "best", ()),
            ("trunk92", "ran_att92_cifar", "best", trunk(16, 16, 18, 2)))
    },
    # Past the paper.
    **{
        f"{name}92-{dataset}-full": longer(f"ran_att92_cifar_{name}", dataset, epochs)
        for dataset in DATASETS for name, epochs in (("orig", 150), ("wide", 100))
    },
}


def report_rows(**remarks: str) -> tuple[Row, ...]:
    """The report's networks on both data sets, trained in the ways that name a ``remark`` for the label."""
    return tuple(
        Row(f"Attention-{depth}, {DATASETS[dataset]}{remark}", f"att{depth}-{dataset}-{way}",
            cite("report", f"Attention-{depth}", dataset), f"att56-{dataset}-{way}" if depth > 56 else "")
        for dataset in DATASETS for way, remark in remarks.items() for depth in (56, 92))


TABLES: dict[str, Table] = {
    "long": Table(
        "The report's networks, trained for longer",
        "Large batches, with cutout on CIFAR-10 and CutMix on CIFAR-100. The weights in the package are those of 160 "
        "epochs of Attention-56 on CIFAR-10, and of 110 otherwise.",
        report_rows(long=""),
    ),
    "settings": Table(
        "The settings of the weights, on held-out images",
        "Attention-56 trained on 40,000 of the training images and tested on the other 10,000 of them. Large batches "
        "are those of the weights in the package, with all images at full size; `best` unchanged has batches of 256, "
        "and shrinks images at first.",
        tuple(row for dataset, extra in (("cifar10", "cutout"), ("cifar100", "CutMix")) for row in (
            Row(f"Large batches, {extra}, {DATASETS[dataset]}", f"att56-{dataset}-held-long"),
            Row(f"Large batches, {DATASETS[dataset]}", f"att56-{dataset}-held-plain",
                against=f"att56-{dataset}-held-long"),
            Row(f"Recipe `best` unchanged, {DATASETS[dataset]}", f"att56-{dataset}-held-best",
                against=f"att56-{dataset}-held-long"))),
        images="held-out",
    ),
    "quick": Table(
        "What recipe `quick` was chosen from, on held-out images",
        "Attention-56 trained on 40,000 of the training images and tested on the other 10,000 of them, for five and a "
        "half to eight minutes on two processors. All of these were tried with seed 0; a second seed, of `quick` as it "
        "is and as it was, came after the choice.",
        tuple(Row(label, f"att56-cifar10-held-{name}") for name, (label, _, _) in _QUICK_TRIED.items()),
        images="held-out",
    ),
    "report": Table(
        "The report's networks",
        "The report's Attention-92 came out worse than its Attention-56 on CIFAR-10. Its recipe, and ours.",
        report_rows(report=", recipe `report`", best=", recipe `best`"),
    ),
    "recipes": Table(
        "The recipes",
        "Attention-56 as the training script trains it by itself, with `quick` on a CPU and `best` on a GPU, and as "
        "the report does. In full each recipe has its own length.",
        tuple(Row(f"Recipe `{recipe}`, CIFAR-10", f"att56-cifar10-{recipe}")
              for recipe in ("quick", "best", "report")),
    ),
    "widths": Table(
        "The widths for ImageNet on CIFAR",
        "The report began with the paper's widths for ImageNet and saw overfitting: near 0 % error on training images, "
        "43 % on others with CIFAR-10 and 65 % with CIFAR-100 (section 3.1). Its networks have a quarter of them.",
        tuple(row for dataset, name in DATASETS.items() for row in (
            Row(f"Attention-56, {name}", f"att56-{dataset}-report", cite("report", "Attention-56", dataset)),
            Row(f"Attention-56, {name}, four times the widths", f"att56-widths-{dataset}-report",
                against=f"att56-{dataset}-report"))),
    ),
    "paper": Table(
        "The paper's networks", "Section 4.1 and Table 6 of the paper, single model.",
        tuple(
            Row(f"Attention-{depth}, {DATASETS[dataset]}, recipe `{recipe}`", f"orig{depth}-{dataset}-{recipe}",
                cite("paper", f"Attention-{depth}", dataset), f"orig92-{dataset}-{recipe}" if depth != 92 else "")
            for dataset, depths in _PAPER.items() for recipe in ("paper", "best") for depth in depths),
    ),
    "learning": Table(
        "Attention residual learning against naive attention learning",
        "`(1 + M) * T` against `M * T`: the report's comparison, and the paper's Table 3.",
        (
            Row("Attention-56 (report), residual, recipe `best`", "att56-cifar10-best"),
            Row("Attention-56 (report), naive, recipe `best`", "att56-naive-best", against="att56-cifar10-best"),
            Row("Attention-56 (report), residual, recipe `report`", "att56-cifar10-report",
                cite("report", "Attention-56")),
            Row("Attention-56 (report), naive, recipe `report`", "att56-naive-report",
                cite("report", "Attention-56", variant=_NAIVE), "att56-cifar10-report"),
            *(Row(f"Attention-{depth} (paper), {form}", f"orig{depth}-{name}-paper",
                  cite("paper", f"Attention-{depth}", variant=_NAIVE if form == "naive" else ""),
                  f"orig{depth}-cifar10-paper" if form == "naive" else "")
              for depth in (56, 92, 128, 164) for form, name in (("residual", "cifar10"), ("naive", "naive"))),
        ),
    ),
    "mask": Table(
        "Soft mask branch against local mask branch", "Bottom-up top-down masks against masks of local convolutions "
        "(the paper's Table 4). The report found the soft mask better too, and gives no figure.",
        (
            Row("Attention-56 (report), soft, recipe `best`", "att56-cifar10-best"),
            Row("Attention-56 (report), local, recipe `best`", "att56-local-best", against="att56-cifar10-best"),
            Row("Attention-56 (report), soft, recipe `report`", "att56-cifar10-report",
                cite("report", "Attention-56")),
            Row("Attention-56 (report), local, recipe `report`", "att56-local-report",
                against="att56-cifar10-report"),
            Row("Attention-56 (paper), soft", "orig56-cifar10-paper", cite("paper", "Attention-56")),
            Row("Attention-56 (paper), local", "orig56-local-paper",
                cite("paper", "Attention-56", variant="local convolutions as mask"), "orig56-cifar10-paper"),
        ),
    ),
    "baselines": Table(
        "What the attention is worth", "Attention-56 of the report's widths against networks without masks, each "
        "under the recipe of what it is compared with. The report gives the depth of its plain network only: the "
        "widths are ours.",
        (
            Row("Attention-56", "att56-cifar10-best"),
            Row("its trunk alone", "trunk56-best", against="att56-cifar10-best"),
            Row("its trunk alone, units added up to equal MACs", "trunk56-macs-best", against="att56-cifar10-best"),
            Row("its trunk alone, units added up to equal parameters", "trunk56-params-best",
                against="att56-cifar10-best"),
            Row("Plain CNN-8", "plain8-best", cite("report", "Plain CNN-8"), "att56-cifar10-best"),
            Row("ResNet-18, CIFAR stem", "resnet18-best", against="att56-cifar10-best"),
            Row("Attention-56, recipe `report`", "att56-cifar10-report", cite("report", "Attention-56")),
            Row("Plain CNN-8, recipe `report`", "plain8-report", cite("report", "Plain CNN-8"),
                "att56-cifar10-report"),
        ),
    ),
    "optimizer": Table(
        "Optimiser and batch size",
        "The report's section 4: its Adam collapses at epoch 13 (Figure 3), so it trains with SGD; and it finds that "
        "batches of 256 fit the training images fast and generalise badly. Adam's learning rate of 0.001 is ours, and "
        "SGD has 0.1 for all batches. A short run divides the rates early, before a collapse could come, and with "
        "batches of 256 it has too few steps to fit even the training images (`train_top1` in the JSON).",
        (
            Row("Nesterov SGD, batch 64", "att56-cifar10-report", cite("report", "Attention-56")),
            Row("Nesterov SGD, batch 32", "att56-sgd32-report", against="att56-cifar10-report"),
            Row("Nesterov SGD, batch 256", "att56-sgd256-report", against="att56-cifar10-report"),
            *(Row(f"Adam, batch {batch}", f"att56-adam{batch}-report",
                  against="att56-cifar10-report" if batch == 64 else f"att56-sgd{batch}-report")
              for batch in (32, 64, 256)),
            Row("Muon, recipe `best`", "att56-cifar10-best"),
            Row("Nesterov SGD in Muon's place", "att56-sgd-best", against="att56-cifar10-best"),
        ),
    ),
    "activation": Table(
        "Mixed, channel and spatial attention", "The mask's activation (the paper's Table 1).",
        (
            Row("Attention-56 (report), mixed", "att56-cifar10-best"),
            Row("Attention-56 (report), channel", "att56-channel-best", against="att56-cifar10-best"),
            Row("Attention-56 (report), spatial", "att56-spatial-best", against="att56-cifar10-best"),
            Row("Attention-56 (paper), mixed", "orig56-cifar10-paper", cite("paper", "Attention-56")),
            Row("Attention-56 (paper), channel", "orig56-channel-paper",
                cite("paper", "Attention-56", variant="channel attention"), "orig56-cifar10-paper"),
            Row("Attention-56 (paper), spatial", "orig56-spatial-paper",
                cite("paper", "Attention-56", variant="spatial attention"), "orig56-cifar10-paper"),
        ),
    ),
    "noise": Table(
        "Label noise", "CIFAR-10 with a share of the training labels wrong (the paper's section 4.1; its plain network "
        "is ResNet-164). The paper's network under its recipe, and the report's under `best`, each against its trunk "
        "with units added.",
        (
            Row("no noise, Attention-92 (report)", "att92-cifar10-best"),
            Row("no noise, its trunk with as many parameters (report)", "trunk92-params-best",
                against="att92-cifar10-best"),
            *(row for share in _NOISE for row in (
                Row(f"{share:.0%} noise, Attention-92 (paper)", noisy("orig92", share, "paper"),
                    noise("Attention-92", share)),
                Row(f"{share:.0%} noise, its trunk with as many parameters (paper)", noisy("trunk92", share, "paper"),
                    noise("ResNet-164", share), noisy("orig92", share, "paper")),
                Row(f"{share:.0%} noise, Attention-92 (report)", noisy("att92", share, "best")),
                Row(f"{share:.0%} noise, its trunk with as many parameters (report)",
                    noisy("trunk92", share, "best"), against=noisy("att92", share, "best")))),
        ),
    ),
    "full": Table(
        "Past the paper", "The paper's Attention-92 and our wide one, trained for longer.",
        (
            Row("Attention-92 (paper), CIFAR-10", "orig92-cifar10-full", cite("paper", "Attention-92")),
            Row("Attention-92 wide, CIFAR-10", "wide92-cifar10-full", cite("paper", "Attention-452")),
            Row("Attention-92 (paper), CIFAR-100", "orig92-cifar100-full", cite("paper", "Attention-92", "cifar100")),
            Row("Attention-92 wide, CIFAR-100", "wide92-cifar100-full", cite("paper", "Attention-452", "cifar100")),
        ),
    ),
}
