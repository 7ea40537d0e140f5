"""Errors that programs report as one sentence; any other error keeps its traceback."""

import re
from collections.abc import Callable
from functools import wraps

INTERRUPTED = 130  # exit status of a program that Ctrl-C ended, as in a shell
SECRETS = (
    (r"(:/+)[^/\s'\",@]+@", r"\1***@"),  # https://token@host
    (r"(:/+)[^/\s'\",@:]*:[^\s'\",]*@", r"\1***@"),  # s3://key:secret/with/slashes@bucket
    (r"(:/+[^\s'\",?]+\?)[^\s'\",]+", r"\1***"),  # query of a signed URL
    (r"\bhf_\w{8,}", "hf_***"),  # Hugging Face token
)


class InputError(ValueError):
    """Invalid input from the user; the message is one sentence with the value and its source."""


def redact_secrets(text: object) -> str:
    """Return the text with passwords and tokens in its URLs replaced by `***`."""
    text = str(text)
    for secret, replacement in SECRETS:
        text = re.sub(secret, replacement, text)
    return text


def exit_on_user_error(main: Callable) -> Callable:
    """Wrap a program: it ends with one sentence on invalid input (status 1), or by Ctrl-C (130).

    So it does if the system refuses a file, as without permission or on a read-only disk.
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
    """Return the first line of an error's message, or the name of its class without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
