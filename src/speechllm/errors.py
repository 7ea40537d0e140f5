"""The error that programs show as a sentence; any other keeps its traceback."""

import re
from collections.abc import Callable
from functools import wraps

INTERRUPTED = 130  # as of programs that the shell ends by Ctrl-C
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


def in_sentences(main: Callable) -> Callable:
    """A program that ends with one sentence on what is wrong (exit code 1), or by Ctrl-C (130)."""

    @wraps(main)
    def program(*args, **options):
        try:
            return main(*args, **options)
        except (FileNotFoundError, InputError) as error:
            raise SystemExit(without_secrets(error)) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    return program


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
