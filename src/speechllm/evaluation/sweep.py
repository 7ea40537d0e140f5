"""Decoding of test sets with many searches and one loaded model, with a table of WER and RTFx."""

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from speechllm.data.config import DataConfig
from speechllm.data.length_limits import frames_needed
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.evaluation.config import DecodeConfig
from speechllm.evaluation.decode_set import decode_set, prepare, result_suffix
from speechllm.evaluation.eval_sets import EvalSet, decode_shard
from speechllm.io import atomic_write

Variant = tuple[dict[str, str], DecodeConfig]  # swept flags and values; all options


@dataclass(frozen=True)
class SweepRow:
    values: tuple[str, ...]  # values of the flags
    wer: float  # %
    rtfx: float
    rate: str = "WER"  # or CER or MER


def sweep_sets(dist_env: DistEnv, variants: list[Variant]) -> None:
    """Decode all sets with all variants and write the tables; runs in every process."""
    values, configs = zip(*variants)
    first = configs[0]
    sets, model = prepare(first, "sweep", dist_env)
    # All recognizers are built first: an impossible variant ends the program before decoding.
    recognizers = [model.recognizer(one.search, one.checkpoint.use_encoders) for one in configs]
    warm_up(sets[0], recognizers[0], first.data)
    rows: dict[str, list[SweepRow]] = {one.name: [] for one in sets}
    for one, config, recognizer in zip(values, configs, recognizers):
        suffix = result_suffix(config, recognizer.search, model.parameters_name)
        for cuts in sets:
            errors = decode_set(cuts, recognizer, config, suffix, dist_env)
            row = SweepRow(tuple(one.values()), errors.wer, recognizer.rtfx, errors.rate)
            rows[cuts.name].append(row)
    if dist_env.is_main:
        for name, of_set in rows.items():
            write_sweep(first.out_dir, name, model.parameters_name, list(values[0]), of_set)


def warm_up(cuts: EvalSet, recognizer: Recognizer, data: DataConfig) -> None:
    """Decode one batch, as the first batch is slow."""

    def decode_one(batches):
        return recognizer(itertools.islice(batches, 1))

    min_frames = frames_needed(recognizer.model.ds_rate)
    decode_shard(cuts, decode_one, replace(data, num_workers=0), min_frames=min_frames)


def best_rows(rows: list[SweepRow]) -> list[SweepRow]:
    """Return the Pareto front: rows not beaten in WER or RTFx by a row at least as good in both."""

    def beats(a: SweepRow, b: SweepRow) -> bool:
        return a.wer <= b.wer and a.rtfx >= b.rtfx and (a.wer, a.rtfx) != (b.wer, b.rtfx)

    return [row for row in rows if not any(beats(other, row) for other in rows)]


def table(flags: list[str], rows: list[SweepRow]) -> list[list[str]]:
    """Return the table as a list of rows of cells, with the column names first."""
    best = best_rows(rows)
    return [
        [*flags, f"{rows[0].rate} %", "RTFx", "best"],
        *([*r.values, f"{r.wer:.2f}", f"{r.rtfx:.1f}", "*" if r in best else "-"] for r in rows),
    ]


def write_sweep(
    out_dir: Path, name: str, parameters_name: str, flags: list[str], rows: list[SweepRow]
) -> None:
    """Print a test set's table; save it in `out_dir`."""
    lines = table(flags, rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ("  ".join(map(str.rjust, line, widths)) for line in lines)
    print(name, *aligned, "", sep="\n")
    path = out_dir / f"sweep-{name}-{parameters_name}-{'+'.join(flags)}.tsv"
    with atomic_write(path) as partial:
        partial.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    logging.info(f"Wrote {path}")
