"""The error that programs show as a sentence; any other keeps its traceback."""

import re

SECRETS = (
    (r"(:/+)[^/\s'\",@]+@", r"\1***@"),  # https://token@host
    (r"(:/+)[^/\s'\",@:]*:[^\s'\",]*@", r"\1***@"),  # s3://key:secret/with/slashes@bucket
    (r"(:/+[^\s'\",?]+\?)[^\s'\",]+", r"\1***"),  # what signed addresses end with
    (r"\bhf_\w{8,}", "hf_***"),  # of the Hugging Face hub
)


class InputError(ValueError):
    """What the user gave is wrong; the message is one sentence with the value and whose it is."""


def without_secrets(text: object) -> str:
    """What may be shown or logged of a text: passwords and tokens in its addresses are `***`."""
    text = str(text)
    for secret, shown in SECRETS:
        text = re.sub(secret, shown, text)
    return text


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
