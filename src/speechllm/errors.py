"""Errors that programs report as one sentence; all other errors keep their traceback."""

import re
from collections.abc import Callable
from functools import wraps

INTERRUPTED = 130  # exit status of a program ended by Ctrl-C, as in a shell
SECRETS = (
    (r"(:/+)[^/\s'\",@]+@", r"\1***@"),  # https://token@host
    (r"(:/+)[^/\s'\",@:]*:[^\s'\",]*@", r"\1***@"),  # s3://key:secret/with/slashes@bucket
    (r"(:/+[^\s'\",?]+\?)[^\s'\",]+", r"\1***"),  # query of a signed URL
    (r"\bhf_\w{8,}", "hf_***"),  # Hugging Face token
)


class InputError(ValueError):
    """Invalid user input; the message is one sentence that gives the value and its source."""


def redact_secrets(text: object) -> str:
    """Return the text with passwords and tokens replaced with `***`."""
    text = str(text)
    for secret, replacement in SECRETS:
        text = re.sub(secret, replacement, text)
    return text


def exit_on_user_error(main: Callable) -> Callable:
    """Make a program exit with one sentence and code 1 on invalid input, or 130 on Ctrl-C.

    OS errors for files, such as on a read-only disk, count as invalid input.
    """

    @wraps(main)
    def program(*args, **options):
        try:
            return main(*args, **options)
        except OSError as error:
            if error.filename is None and not isinstance(error, FileNotFoundError):
                raise
            named = f"{error.filename}: {error.strerror}" if error.filename else error
            raise SystemExit(redact_secrets(named)) from None
        except InputError as error:
            raise SystemExit(redact_secrets(error)) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    return program


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
