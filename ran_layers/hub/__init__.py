"""Publish a training run to the Hugging Face Hub, and fetch one.

    $ python -m ran_layers.hub push RUN_DIR user/name
    $ python -m ran_layers.hub pull user/name FOLDER
"""
from .._download import HubError
from .pull import pull
from .push import Pushed, push_to_hub

__all__ = ["HubError", "Pushed", "pull", "push_to_hub"]
