"""Published errors to compare with: the report's, the paper's and other implementations' tables, as data.

The report is a student's re-implementation for CIFAR; the paper is Wang et al. 2017 (arXiv:1704.06904). Networks of the
same name are not the same size in the two: see the README.
"""
from typing import NamedTuple


class Published(NamedTuple):
    """One published figure: the top-1 error in percent, single model, on the test set of ``dataset``.

    ``url`` says where, if not in the paper or the report.
    """

    source: str
    network: str
    dataset: str
    error: float
    variant: str = ""
    url: str = ""


_TENG = "https://github.com/tengshaofeng/ResidualAttentionNetwork-pytorch"
_PISTONY = "https://github.com/PistonY/ResidualAttentionNetwork"
_WEIAICUNZAI = "https://github.com/weiaicunzai/pytorch-cifar100"

PUBLISHED = (
    Published("report", "Attention-56", "cifar10", 14.43),
    Published("report", "Attention-56", "cifar100", 48.93),
    Published("report", "Attention-92", "cifar10", 22.93),
    Published("report", "Attention-92", "cifar100", 45.8),
    Published("report", "Attention-56", "cifar10", 15.02, "naive attention learning"),
    Published("report", "Plain CNN-8", "cifar10", 22.08),
    Published("paper", "Attention-56", "cifar10", 5.52),
    Published("paper", "Attention-56", "cifar10", 5.89, "naive attention learning"),
    Published("paper", "Attention-92", "cifar10", 4.99),
    Published("paper", "Attention-92", "cifar10", 5.35, "naive attention learning"),
    Published("paper", "Attention-92", "cifar100", 21.71),
    Published("paper", "Attention-128", "cifar10", 4.44),
    Published("paper", "Attention-128", "cifar10", 5.57, "naive attention learning"),
    Published("paper", "Attention-164", "cifar10", 4.31),
    Published("paper", "Attention-164", "cifar10", 7.18, "naive attention learning"),
    Published("paper", "Attention-236", "cifar10", 4.14),
    Published("paper", "Attention-236", "cifar100", 21.16),
    Published("paper", "Attention-452", "cifar10", 3.90),
    Published("paper", "Attention-452", "cifar100", 20.45),
    Published("paper", "Attention-56", "cifar10", 6.24, "channel attention"),
    Published("paper", "Attention-56", "cifar10", 6.33, "spatial attention"),
    Published("paper", "Attention-56", "cifar10", 6.48, "local convolutions as mask"),
    Published("paper", "Attention-56", "imagenet-1k", 21.76),
    Published("paper", "AttentionNeXt-56", "imagenet-1k", 21.2),
    Published("other implementations", "Attention-92", "cifar10", 3.16, "wide, mixup, 320 epochs, PyTorch", _TENG),
    Published("other implementations", "Attention-92", "cifar10", 2.86, "wide, mixup, cutout, cosine", _PISTONY),
    Published("other implementations", "Attention-452", "cifar10", 2.43, "mixup, cutout, cosine", _PISTONY),
    Published("other implementations", "Attention-56", "cifar100", 33.75, "PyTorch, 55.7 M parameters", _WEIAICUNZAI),
    Published("other implementations", "Attention-92", "cifar100", 36.52, "PyTorch, 102.5 M parameters", _WEIAICUNZAI),
)

# Label noise (paper, section 4.1): share of the CIFAR-10 training labels corrupted -> error in percent.
LABEL_NOISE = {
    "ResNet-164": {0.1: 5.93, 0.3: 6.61, 0.5: 8.35, 0.7: 17.21},
    "Attention-92": {0.1: 5.15, 0.3: 5.79, 0.5: 7.27, 0.7: 15.75},
}


def published_network(model: str) -> str | None:
    """Return the published name of one of the package's models, e.g. ``'Attention-56'``; None for other models.

    Example:
        >>> published_network("ran_att56_cifar.cifar10")
        'Attention-56'
    """
    name = model.partition(".")[0]
    if name.startswith("plain_cnn8"):
        return "Plain CNN-8"
    for prefix, network in (("ran_attnext", "AttentionNeXt"), ("ran_att", "Attention")):
        depth = name.removeprefix(prefix).partition("_")[0]
        if name.startswith(prefix) and depth.isdigit():
            return f"{network}-{depth}"
    return None
