"""The one error that the scripts show without a traceback."""


class RunError(Exception):
    """The command cannot be carried out; the message is one line that says what to do."""
