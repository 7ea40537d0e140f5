"""Decode test sets with many searches and one loaded model; a table and a plot of WER and RTFx."""

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from speechllm.data.config import DataConfig
from speechllm.data.manifests import frames_needed
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.evaluation.config import DecodeConfig
from speechllm.evaluation.decode_set import decode_set, prepare, result_suffix
from speechllm.evaluation.eval_sets import EvalSet, decode_shard
from speechllm.io import atomic_write

Variant = tuple[dict[str, str], DecodeConfig]  # swept flags with their values; all options


@dataclass(frozen=True)
class SweepRow:
    """A set decoded with one variant."""

    values: tuple[str, ...]  # values of the flags
    wer: float  # %
    rtfx: float
    others: dict[str, str]  # further columns of the table
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
            measured = errors.wer, recognizer.rtfx, _measures(recognizer), errors.rate
            rows[cuts.name].append(SweepRow(tuple(one.values()), *measured))
    if dist_env.is_main:
        for name, of_set in rows.items():
            write_sweep(first.out_dir, name, model.parameters_name, list(values[0]), of_set)


def warm_up(cuts: EvalSet, recognizer: Recognizer, data: DataConfig) -> None:
    """Decode one batch: the first one is slow."""

    def decode_one(batches):
        return recognizer(itertools.islice(batches, 1))

    min_frames = frames_needed(recognizer.model.ds_rate)
    decode_shard(cuts, decode_one, replace(data, num_workers=0), min_frames=min_frames)


def _measures(recognizer: Recognizer) -> dict[str, str]:
    n, utterances = recognizer.counter, max(1, recognizer.counter["utterances"])
    return {
        "forward passes per utterance": f"{n['passes'] / utterances:.2f}",
        "accepted %": f"{100 * n['accepted'] / n['drafted']:.1f}" if n["drafted"] else "-",
        "from CTC %": f"{100 * n['from CTC'] / utterances:.1f}",
        "flagged %": f"{100 * n['flagged'] / utterances:.1f}",
    }


def best_rows(rows: list[SweepRow]) -> list[SweepRow]:
    """Return the Pareto front: no other row is as good in WER and RTFx, and better in one."""

    def beats(a: SweepRow, b: SweepRow) -> bool:
        return a.wer <= b.wer and a.rtfx >= b.rtfx and (a.wer, a.rtfx) != (b.wer, b.rtfx)

    return [row for row in rows if not any(beats(other, row) for other in rows)]


def table(flags: list[str], rows: list[SweepRow]) -> list[list[str]]:
    """Return the column names, and the cells of each row."""
    best = best_rows(rows)
    return [
        [*flags, f"{rows[0].rate} %", "RTFx", *rows[0].others, "best"],
        *(
            [*row.values, f"{row.wer:.2f}", f"{row.rtfx:.1f}", *row.others.values(),
             "*" if row in best else "-"]
            for row in rows
        ),
    ]  # fmt: skip


def align_columns(lines: list[list[str]]) -> str:
    """Right-align the columns with spaces."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def plot(title: str, rows: list[SweepRow]) -> Figure:
    """Plot WER against RTFx with a line through the best rows, and a label for each row."""
    figure = Figure(figsize=(9, max(5, 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots()
    best = best_rows(rows)
    axes.plot(*zip(*sorted((row.rtfx, row.wer) for row in best)), color="tab:red")
    for i, row in enumerate(sorted(rows, key=lambda row: (row.wer, row.rtfx))):
        point, label = (row.rtfx, row.wer), (1.05, (i + 0.5) / len(rows))  # label: axes fraction
        color = "tab:red" if row in best else "0.4"
        axes.plot(*point, "o", color=color)
        arrow = {"arrowstyle": "-", "color": color, "alpha": 0.3, "relpos": (0, 0.5)}
        style = {"textcoords": "axes fraction", "va": "center", "color": color, "arrowprops": arrow}
        axes.annotate(", ".join(row.values), point, label, **style)
    axes.set(title=title, xlabel="RTFx (audio seconds per second)", ylabel=f"{rows[0].rate} %")
    axes.grid(color="0.9")
    return figure


def write_sweep(
    out_dir: Path, name: str, parameters_name: str, flags: list[str], rows: list[SweepRow]
) -> None:
    """Print a set's table and write it, with the plot, to `out_dir`."""
    lines = table(flags, rows)
    print(f"{name}\n{align_columns(lines)}\n")
    path = out_dir / f"sweep-{name}-{parameters_name}-{'+'.join(flags)}.tsv"
    with atomic_write(path) as partial:
        partial.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    with atomic_write(path.with_suffix(".png")) as partial:
        plot(f"{name}, {parameters_name}: {', '.join(flags)}", rows).savefig(partial, dpi=150)
    logging.info(f"Wrote {path} and .png")
