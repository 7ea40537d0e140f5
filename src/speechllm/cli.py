"""Command-line flags: a parser with icefall's conventions, and dataclasses whose fields are flags.

    @dataclass(frozen=True)
    class TrainConfig:
        num_epochs: int = option(10, "train up to this epoch", group="training")

    add_options(parser, TrainConfig)                         # --num-epochs N
    config = from_args(TrainConfig, parser.parse_args(argv))

This module imports no heavy libraries, so `--help` is fast.
"""

import argparse
import dataclasses
import difflib
import gc
import shutil
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from speechllm.errors import InputError

Config = TypeVar("Config")
EXIT_CODES = (
    "exit codes: 0 success; 1 invalid input, with one sentence; 2 invalid flags; "
    "130 interrupted by Ctrl-C"
)
TRAINING_EXIT_CODES = f"{EXIT_CODES}; 75 stopped by SIGTERM or SIGUSR1 after saving"
WIDTH = 100  # columns of --help, or fewer in a narrow terminal


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Exempt imported objects from garbage collection, during the imports and at exit.

    Collections take a third of the CPU time of importing torch and transformers.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def str2bool(value: str) -> bool:
    """Parse `true` or `false` (also yes/no, t/f, y/n, 1/0, in any case)."""
    word = value.lower()
    if word in ("true", "yes", "t", "y", "1"):
        return True
    if word in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {value!r}")


def comma_list(value: str) -> list[str]:
    """Split a comma-separated list: `"a, b"` -> `["a", "b"]`."""
    return [item.strip() for item in value.split(",") if item.strip()]


# ---- dataclasses whose fields are flags


def option(
    default: Any, help: str, *, group: str = "", choices: Collection | None = None, unset: str = ""
) -> Any:
    """Declare a dataclass field that is also a flag; the type comes from the annotation.

    In --help, `group` is the heading, and `unset` is shown in place of a default of None.
    """
    metadata = {"help": help, "group": group, "choices": choices, "unset": unset}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the flag of a field: `max_duration` -> `--max-duration`."""
    return "--" + field_name.replace("_", "-")


def add_options(
    parser: argparse.ArgumentParser,
    config: type | Any,
    *,
    skip: Collection[str] = (),
    required: Collection[str] = (),
) -> None:
    """Add a flag for each option of a config class, except those in `skip`.

    Args:
      config: the class, or an instance whose values are the defaults shown by --help.
    """
    kinds = get_type_hints(config if isinstance(config, type) else type(config))
    for field in dataclasses.fields(config):
        if "help" not in field.metadata or field.name in skip:
            continue
        default = getattr(config, field.name, field.default)
        shown = field.metadata["unset"] if default in (None, ()) else spelled(default)
        text = field.metadata["help"] + (f" (default: {shown})" if shown else "")
        _group(parser, field.metadata["group"]).add_argument(
            flag_name(field.name),
            action="append" if get_origin(kinds[field.name]) is tuple else "store",
            type=_parser_of(kinds[field.name]),
            choices=field.metadata["choices"],
            required=field.name in required,
            default=None,  # from_args fills in the defaults
            help=text.replace("%", "%%"),
        )


def from_args(config: type[Config] | Config, args: argparse.Namespace, **values: Any) -> Config:
    """Build a config from parsed flags, and from `values` for fields without a flag.

    Args:
      config: the class, or an instance whose values are the defaults for missing flags.
    """
    given = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(config)
        if "help" in field.metadata and (value := getattr(args, field.name, None)) is not None
    }
    if isinstance(config, type):
        return config(**given | values)
    return dataclasses.replace(config, **given | values)


def check_range(
    name: str, value: float | None, low: float, high: float | None = None, *, above: bool = False
) -> None:
    """Raise InputError unless a value is in a range (without `low` if `above`); None passes."""
    if value is None:
        return
    if (value > low if above else value >= low) and (high is None or value <= high):
        return
    lowest = f"above {low:g}" if above else f"at least {low:g}"
    allowed = lowest if high is None else f"from {low:g} to {high:g}"
    shown = value if isinstance(value, int) else f"{value:g}"
    raise InputError(f"{flag_name(name)} {shown} must be {allowed}")


def spelled(value: Any) -> str:
    """Format a value as on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parser_of(kind: Any) -> Callable[[str], Any]:
    """Return the parser for a flag's type; `X | None` and `tuple[X, ...]` are parsed as X."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return str2bool if kind is bool else kind


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ActionsContainer:
    if not title:
        return parser
    existing = [group for group in parser._action_groups if group.title == title]
    return existing[0] if existing else parser.add_argument_group(title)


# ---- the parser


class Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter that keeps the docstring's format and shows each flag's default."""

    def __init__(self, prog: str):
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=36, width=min(WIDTH, columns))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is argparse.SUPPRESS:
            return action.help
        shown = spelled(action.default).replace("%", "%%")
        return f"{action.help} (default: {shown})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {int: "N", float: "X", str2bool: "true|false", Path: "PATH"}
        return names.get(action.type, "TEXT")


class Parser(argparse.ArgumentParser):
    """Argument parser with a short usage line and suggestions for misspelled flags."""

    def __init__(self, description: str | None, **options):
        options = {"formatter_class": Help, "epilog": EXIT_CODES, **options}
        super().__init__(description=description, **options)

    def format_usage(self) -> str:
        positional = [action.metavar or action.dest for action in self._get_positional_actions()]
        return " ".join(["usage:", self.prog, *positional, "[--flag value ...]"]) + "\n"

    def format_help(self) -> str:
        self.usage = self.format_usage().removeprefix("usage: ").strip()
        return super().format_help()

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Parse flags; exit with status 2 and a suggestion at the first unrecognized flag."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unrecognized(unknown))
        return namespace

    def _unrecognized(self, unknown: list[str]) -> str:
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = wrong.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(name.replace("_", "-"), flags, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        return f"unrecognized argument {name} ({hint})"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")
