"""What a long-running program tells: a log file, the terminal, a progress bar."""

import datetime
import logging
import sys
from pathlib import Path

from speechllm.errors import without_secrets


def setup_logging(prefix: Path, ranks) -> None:
    """Log to `<prefix>-<date>[-<rank>]`, and to the terminal on rank 0."""
    date = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    suffix = f"-{ranks.rank}" if ranks.world_size > 1 else ""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    where = f"({ranks.rank}/{ranks.world_size}) " if ranks.world_size > 1 else ""
    handlers: list[logging.Handler] = [logging.FileHandler(f"{prefix}-{date}{suffix}")]
    if ranks.is_main:
        handlers.append(_TerminalHandler())
    form = f"%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] {where}%(message)s"
    for handler in handlers:
        handler.setFormatter(_WithoutSecrets(form))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


class _WithoutSecrets(logging.Formatter):
    """Flags are logged, and may be addresses with a password."""

    def format(self, record):
        return without_secrets(super().format(record))


class _TerminalHandler(logging.StreamHandler):
    """Writes lines above a progress bar instead of through it."""

    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class ProgressBar:
    """Audio seconds done of `name`, speed, time left and values; silent without a terminal."""

    def __init__(self, name: str, seconds: float, enabled: bool = True):
        from tqdm import tqdm

        self.bar = tqdm(
            total=round(seconds),
            desc=name,
            unit="s",
            disable=not (enabled and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s of audio "
            "[{elapsed}<{remaining}, {rate_fmt} {postfix}]",
        )

    def advance(self, seconds: float) -> None:
        self.bar.update(round(seconds))

    def show(self, **values: float) -> None:
        self.bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        self.bar.close()
