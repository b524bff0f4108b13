"""What the pretrained configurations of all CIFAR networks share."""
from collections.abc import Callable
from importlib.resources import files
from typing import Any

# Channel means and deviations of the training images, in [0, 1].
CIFAR_STATS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar10": ((0.4914, 0.482158, 0.446531), (0.247032, 0.243485, 0.261588)),
    "cifar100": ((0.507075, 0.486549, 0.440918), (0.267334, 0.256438, 0.27615)),
}
# In the order of the labels.
CIFAR_CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "cifar100": tuple("""
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
        lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
        shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()),
}


def cifar_cfgs(name: str, cfg: Callable[..., dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
    """Return the configurations ``NAME.cifar10`` and ``NAME.cifar100``, with the weights the package ships, if any.

    The first is the default of ``NAME``, whichever has weights.
    """
    cfgs = {}
    # timm's default is the first that has weights, but for one with a star that comes after it.
    for dataset, tag in (("cifar100", "cifar100"), ("cifar10", "cifar10*")):
        mean, std = CIFAR_STATS[dataset]
        weights = files("ran_layers") / "weights" / f"{name}.{dataset}.safetensors"
        cfgs[f"{name}.{tag}"] = cfg(
            num_classes=len(CIFAR_CLASSES[dataset]),
            label_names=CIFAR_CLASSES[dataset],
            input_size=(3, 32, 32),
            min_input_size=(3, 16, 16),
            crop_pct=1.0,
            mean=mean,
            std=std,
            file=str(weights) if weights.is_file() else None,
            **kwargs,
        )
    return cfgs
