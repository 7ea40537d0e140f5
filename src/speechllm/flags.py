"""Command-line values, in the forms users of icefall know: `--flag true|false`, `a,b,c`."""

import argparse


def str2bool(value: str) -> bool:
    """`true`/`false` (also yes/no, t/f, y/n, 1/0, in any case) as a bool.

    Raises:
      argparse.ArgumentTypeError: for any other word, naming it.
    """
    word = value.lower()
    if word in ("true", "yes", "t", "y", "1"):
        return True
    if word in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {value!r}")


def comma_list(value: str) -> list[str]:
    """`"a,b"` as `["a", "b"]`; spaces around the commas are ignored."""
    return [item.strip() for item in value.split(",") if item.strip()]


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The program's docstring as it is, and after each flag its default."""
