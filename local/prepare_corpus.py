"""Prepare any corpus: cut files with fbank features, and a report.

  python local/prepare_corpus.py --table corpora/an4/transcripts.tsv --corpus an4 \\
    --manifest-dir data/fbank --num-jobs 4

  --table PATH        TSV or CSV with a header, or JSON lines, or a folder with one table per split;
                      audio paths are relative to the table
  --folder DIR        a corpus whose --layout is recognized: LibriSpeech, Common Voice, AISHELL,
                      MLS, LJSpeech, VCTK, TED-LIUM, VoxPopuli, or one of those below; otherwise a
                      text file per audio file: [train/][anna/]1.wav, [train/][anna/]1.txt
  --kaldi DIR         wav.scp, text, [segments, utt2spk, utt2lang, reco2file_and_channel]
  --huggingface DIR   a dataset written by save_to_disk, or its parquet files (needs pyarrow)
  --lhotse PATH       a cut file, or a folder of cut files or of recordings and supervisions

Kaldi and lhotse folders may have a subfolder or file per split. Columns are found by name: text and
path, and optionally utt_id, speaker, split, language, context, start, end, duration and channel;
local/README.md lists their other names and meanings.

Writes <manifest-dir>/<corpus>_cuts_<split>.jsonl.gz, with features next to it, and statistics and
skipped utterances to <corpus>_report.json. Audio in formats that lhotse cannot read is
copied to FLAC in <corpus>_audio-…. Copies at speed 0.9 and 1.1 are added to the training split. All
utterances are checked before features are computed; invalid utterances are an error unless
--skip-invalid is true. Texts without words (<NOISE>, [music], "...") are always skipped. A split
made from the same files with the same flags is kept; other sources add splits to the corpus.
"""

import logging
from pathlib import Path

import _path  # noqa: F401

from speechllm.cli import Parser, add_options, from_args
from speechllm.data.corpora.config import SOURCES, PrepareConfig
from speechllm.errors import exit_on_user_error


def get_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("source (one of)")
    sources = group.add_mutually_exclusive_group(required=True)
    for name in SOURCES:
        sources.add_argument(f"--{name}", type=Path, help="see above")
    add_options(parser, PrepareConfig, required=["corpus"])
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    source = next(name for name in SOURCES if getattr(args, name) is not None)
    config = from_args(PrepareConfig, args, source=source, path=getattr(args, source))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # heavy imports only after parsing the flags
    import torch

    from speechllm.data.corpora.prepare import is_training, prepare

    torch.set_num_threads(1)
    report, splits = prepare(config)
    print(report, end="")
    train = [split for split in splits if is_training(split)]
    logging.info(usage_hint(config, train, [split for split in splits if split not in train]))


def usage_hint(config: PrepareConfig, train: list[str], others: list[str]) -> str:
    """Return the flags for using the written cut files in training and decoding."""
    valid = [split for split in others if split.startswith(("dev", "val"))] or others[:1]
    test = [split for split in others if split not in valid] or valid
    flags = [("train-cuts", train), ("valid-cuts", valid[:1]), ("test-cuts", test)]
    words = [
        f"--{flag} {','.join(f'{config.corpus}_cuts_{split}' for split in splits)}"
        for flag, splits in flags
        if splits
    ]
    return f"Use --manifest-dir {config.manifest_dir} {' '.join(words)}"


if __name__ == "__main__":
    main()
