"""Command-line values, in the forms users of icefall know: `--flag true|false`, `a,b,c`."""

import argparse
import difflib
import shutil
from pathlib import Path
from typing import NoReturn


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


EXIT_CODES = (
    "exit codes: 0 done; 1 something is wrong with files or values, said in one sentence; 2 wrong "
    "flags; 75 training was asked to stop and saved; 130 Ctrl-C"
)
WIDTH = 100  # columns, in a terminal that has them


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The program's docstring as it is, each flag in a line or two, and after it its default."""

    def __init__(self, prog: str):
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=36, width=min(WIDTH, columns))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        if isinstance(action.default, bool):  # as it is typed
            return f"{action.help} (default: {str(action.default).lower()})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {int: "N", float: "X", str2bool: "true|false", Path: "PATH"}
        return names.get(action.type, "TEXT")


class Parser(argparse.ArgumentParser):
    """Flags of a program, with a short usage; a wrong flag is told which one may be meant."""

    def __init__(self, description: str | None, **options):
        options = {"formatter_class": Help, "epilog": EXIT_CODES, **options}
        super().__init__(description=description, **options)

    def format_usage(self) -> str:
        positional = [action.metavar or action.dest for action in self._get_positional_actions()]
        return " ".join(["usage:", self.prog, *positional, "[--flag value ...]"]) + "\n"

    def format_help(self) -> str:
        """As argparse has it, but for the list of all flags in front."""
        self.usage = self.format_usage().removeprefix("usage: ").strip()
        return super().format_help()

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._about(unknown))
        return namespace

    def _about(self, unknown: list[str]) -> str:
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = wrong.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(name.replace("_", "-"), flags, n=1, cutoff=0.7)
        meant = f": is {close[0]} meant?" if close else f" (see {self.prog} --help)"
        return f"there is no {name}{meant}" if wrong[0] == "-" else f"what is {name}{meant}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")
