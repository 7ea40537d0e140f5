"""Decoding of test sets with one model and many searches, with a table of WER and RTFx."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path

from speechllm.distributed import DistEnv
from speechllm.evaluation.config import DecodeConfig
from speechllm.evaluation.decode_set import decode_set, prepare, result_suffix
from speechllm.evaluation.eval_sets import decode_shard
from speechllm.io import atomic_write

Variant = tuple[dict[str, str], DecodeConfig]  # swept flags and values; all options


def sweep_sets(dist_env: DistEnv, variants: list[Variant]) -> None:
    """Decode all sets with all variants, in every process, and write the tables."""
    values, configs = zip(*variants)
    first = configs[0]
    sets, model = prepare(first, "sweep", dist_env)
    # All recognizers are built first: an impossible variant ends the program before decoding.
    recognizers = [model.recognizer(one.search, one.checkpoint.use_encoders) for one in configs]
    decode_shard(  # one batch, as the first is slow
        sets[0],
        lambda batches: recognizers[0](itertools.islice(batches, 1)),
        replace(first.data, num_workers=0),
        min_frames=recognizers[0].min_frames,
    )
    tables: dict[str, list[list[str]]] = {one.name: [] for one in sets}
    for one, config, recognizer in zip(values, configs, recognizers):
        suffix = result_suffix(config, recognizer.search, model.parameters_name)
        for cuts in sets:
            errors = decode_set(cuts, recognizer, config, suffix, dist_env)
            if not tables[cuts.name]:
                tables[cuts.name].append([*one, f"{errors.rate} %", "RTFx"])
            tables[cuts.name].append([*one.values(), f"{errors.wer:.2f}", f"{recognizer.rtfx:.1f}"])
    if dist_env.is_main:
        for name, rows in tables.items():
            flags = "+".join(values[0])
            path = first.out_dir / f"sweep-{name}-{model.parameters_name}-{flags}.tsv"
            write_table(name, rows, path)


def write_table(name: str, rows: list[list[str]], path: Path) -> None:
    """Print a test set's table, and save it."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = ("  ".join(map(str.rjust, row, widths)) for row in rows)
    print(name, *aligned, "", sep="\n")
    with atomic_write(path) as partial:
        partial.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    logging.info(f"Wrote {path}")
