"""A local page to drop an image on, choose a model, and see what it predicts and where its masks look.

    python -m ran_layers.demo

Needs Gradio: ``pip install "ran-layers[demo]"``.
"""
import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import timm
import torch.nn as nn
from PIL import Image

from .images import open_image
from .maps import at_least, fail, load_model
from .mask_figure import draw_predicted, predict, top_classes

TITLE = "What a Residual Attention Network attends to"
ABOUT = (
    "Drop an image. Below it: the prediction, and over the image the mask of each Attention Module: the mean of its "
    "channels, then the channels that vary most. ")
AT_HOME = "Nothing leaves this machine."
ELSEWHERE = (
    "Your images go to the machine that serves this page, which deletes them after an hour or two while it does.")
CHECKED_EVERY, KEPT_FOR = 600, 3600  # seconds, of the files that were uploaded and made
# Images of pixels alone: Pillow hands PostScript, which anyone may upload under any name, to an interpreter.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA")

# Gradio's buttons lie over the upper edge of an image, where the picture of the masks has its key to the colours.
CSS = "#masks img { padding-top: 2rem }"


def look(path: str | None, name: str, channels: int) -> tuple[dict[str, float] | None, Image.Image | None]:
    """Return the five most probable classes and the picture of the masks; nothing for no image.

    Raises:
        OSError: The file is not an image that can be read.
        ValueError: The model cannot be used.
    """
    if path is None:
        return None, None
    Image.init()  # which formats there are is known after that only
    model, image = trained_model(name), open_image(path, [name for name in FORMATS if name in Image.OPEN])
    masks, logits = predict(model, [image])
    classes: dict[str, float] = {}
    for label, probability in top_classes(model, logits, 5)[0]:  # ImageNet has two cranes
        classes[label if label not in classes else f"{label} (another class)"] = probability
    return classes, draw_predicted(model, [image], masks, logits, channels=channels)


@lru_cache(maxsize=4)
def trained_model(name: str) -> nn.Module:
    """Load a model once; the page does not show masks of random weights.

    Raises:
        ValueError: The model cannot be loaded or has no trained weights.
    """
    model, trained = load_model(name)
    if not trained:
        raise ValueError(f"{name} has no trained weights")
    return model


def build_page(names: Sequence[str], host: str = "127.0.0.1") -> Any:
    """Return the page, a ``gradio.Blocks``, that offers the models ``names`` and is served at ``host``."""
    import gradio as gr

    def answer(path: str | None, name: str, channels: float) -> tuple[Any, Any]:
        try:
            return look(path, name, int(channels))
        except (OSError, ValueError) as error:
            # The upload's place on this machine is nobody's business.
            raise gr.Error(str(error).replace(str(path), Path(str(path)).name), print_exception=False) from error

    where = AT_HOME if is_this_machine(host) else ELSEWHERE
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CHECKED_EVERY, KEPT_FOR)) as page:
        gr.Markdown(f"# {TITLE}\n{ABOUT}{where}")
        with gr.Row():
            image = gr.Image(
                label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320,
                elem_id="image")
            # Gradio would open the file first, and tell nobody what is wrong with it.
            vars(image)["preprocess"] = lambda payload: payload and payload.path
            with gr.Column():
                model = gr.Dropdown(list(names), value=names[0], label="Model", elem_id="model")
                channels = gr.Slider(0, 8, value=2, step=1, label="Channels beside the mean", elem_id="channels")
                classes = gr.Label(label="Prediction", num_top_classes=5, elem_id="prediction")
        masks = gr.Image(
            label="Masks", show_label=False, type="pil", format="png", interactive=False, elem_id="masks",
            buttons=["download", "fullscreen"])  # the third one, "share", sends the picture away
        # One event, not three: Gradio runs an event once at a time, and two forwards at once would mix their masks.
        gr.on(
            [image.change, model.change, channels.change], answer, [image, model, channels], [classes, masks],
            trigger_mode="always_last", api_visibility="private")
    return page


def is_this_machine(host: str) -> bool:
    """Whether only this machine reaches a server at ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; return 2 if it cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m ran_layers.demo", description="Serve a page that shows masks.")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME_OR_DIR", default=timm.list_pretrained("ran_*"),
        help="models to offer: timm names, hf-hub:USER/NAME or run folders (all trained ones of this package)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    parser.add_argument("--port", type=at_least(1, most=65535), help="port to listen at (the first free one from 7860)")
    args = parser.parse_args(argv)
    if find_spec("gradio") is None:
        return fail('the demo needs Gradio: pip install "ran-layers[demo]"')
    if not args.model:
        return fail("this package came without trained weights: name a model with --model NAME_OR_DIR")
    try:
        for name in args.model:
            trained_model(name)
        page = build_page(args.model, args.host)
    except ValueError as error:
        return fail(str(error))
    where = f"{args.host}, port {args.port}" if args.port else args.host
    os.environ.setdefault("GRADIO_RUN_HISTORY", "false")  # which keeps images in the browser, and offers to send them
    try:  # before Gradio does: its server thread would print a traceback
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port or 0), family=family).close()
    except OSError as error:
        return fail(f"cannot listen at {where}: {error.strerror or error}")
    try:
        _, url, _ = page.launch(
            server_name=f"[{args.host}]" if ":" in args.host else args.host, server_port=args.port, share=False,
            ssr_mode=False, quiet=True, footer_links=[], css=CSS, prevent_thread_lock=True, max_file_size="50mb")
    except Exception as error:  # it asks itself over HTTP, and has many names for no answer
        hint = "; set NO_PROXY to it" if getproxies().keys() - {"no"} else ""
        return fail(f"cannot serve at {where}: {' '.join(str(error).split()) or type(error).__name__}{hint}")
    print(f"Serving at {url} (Ctrl-C stops it)", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
