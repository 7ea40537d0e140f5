"""Output of long-running programs: log file, terminal and progress bar."""

import datetime
import logging
import sys
from pathlib import Path

from speechllm.errors import redact_secrets


def setup_logging(prefix: Path, dist_env) -> None:
    """Log to `<prefix>-<date>[-<rank>]`, and on rank 0 also to the terminal."""
    date = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    suffix, rank = "", ""
    if dist_env.world_size > 1:
        suffix, rank = f"-{dist_env.rank}", f"({dist_env.rank}/{dist_env.world_size}) "
    prefix.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(f"{prefix}-{date}{suffix}")]
    if dist_env.is_main:
        handlers.append(_TerminalHandler())
    line_format = f"%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] {rank}%(message)s"
    for handler in handlers:
        handler.setFormatter(_RedactingFormatter(line_format))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


class _RedactingFormatter(logging.Formatter):
    """Redact secrets: flags are logged and may contain URLs with passwords."""

    def format(self, record):
        return redact_secrets(super().format(record))


class _TerminalHandler(logging.StreamHandler):
    """Write lines above a progress bar instead of through it."""

    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class ProgressBar:
    """Progress bar over seconds of audio, with speed, time left and values; needs a terminal."""

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
