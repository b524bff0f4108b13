"""The network that the tests of the scripts train: as small as can be, for it is the scripts that are tested."""

CHANNELS = [8, 8, 16, 32]
NETWORK = ["--model", "plain_cnn8_cifar", "--model-kwargs", f"channels={CHANNELS}"]


def small(*args: object) -> list[str]:
    """Return the arguments as text, after those of the small network unless they name a network of their own."""
    given = [*map(str, args)]
    if "--model" in given:
        return given
    return [*(NETWORK[:2] if "--model-kwargs" in given else NETWORK), *given]
