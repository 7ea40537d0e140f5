"""The error that programs show as a sentence; any other keeps its traceback."""


class InputError(ValueError):
    """What the user gave is wrong; the message is one sentence with the value and whose it is."""
