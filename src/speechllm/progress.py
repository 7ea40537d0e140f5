"""Output of long-running programs: log files, terminal and progress bar."""

import datetime
import logging
import sys
from collections.abc import Iterable, Iterator
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
    """Formatter that redacts secrets: logged flags may contain URLs with passwords."""

    def format(self, record):
        return redact_secrets(super().format(record))


class _TerminalHandler(logging.StreamHandler):
    """Handler that writes lines above a progress bar."""

    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def progress_bar(name: str, seconds: float, enabled: bool = True):
    """Return a tqdm bar over seconds of audio, shown only in a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=round(seconds),
        desc=name,
        unit="s",
        disable=not (enabled and sys.stderr.isatty()),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s of audio "
        "[{elapsed}<{remaining}, {rate_fmt} {postfix}]",
    )


def with_progress(batches: Iterable[dict], name: str, seconds: float, dist_env) -> Iterator[dict]:
    """Yield this rank's batches, with a progress bar for the audio of all ranks."""
    with progress_bar(name, seconds, dist_env.is_main) as bar:
        for batch in batches:
            yield batch
            bar.update(round(batch["seconds"] * dist_env.world_size))
