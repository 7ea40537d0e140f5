"""Which cuts are trained and validated on: found, checked, limited; bad ones are listed."""

import logging
from collections.abc import Callable
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.cut_faults import Fault, check_fraction, first_reasons, list_faults
from speechllm.cut_files import CutStatistics, check_cuts, cuts_file, cuts_within, frames_needed
from speechllm.errors import InputError
from speechllm.flags import comma_list
from speechllm.sampling import TooManyPositions
from speechllm.shards import Shards, check_shards, read_shards
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.distributed import Ranks, is_first_process
from speechllm.training.training_flags import check_max_tokens


def train_paths(args) -> list[Path | str]:
    """The training's cut files; of shards, those of them that hold the texts."""
    if args.shar_dir:
        return shards_of(args).fields["cuts"]
    return _paths(args.manifest_dir, "--train-cuts", args.train_cuts)


def valid_paths(args) -> list[Path]:
    return _paths(args.manifest_dir, "--valid-cuts", args.valid_cuts)


def _paths(manifest_dir: Path, flag: str, names: str) -> list[Path]:
    if not comma_list(names):
        raise InputError(f"{flag} {names!r} names no cut file")
    return [cuts_file(manifest_dir, name) for name in comma_list(names)]


def shards_of(args) -> Shards:
    if not comma_list(args.shar_dir):
        raise InputError(f"--shar-dir {args.shar_dir!r} names no directory")
    return read_shards(comma_list(args.shar_dir))


def limits(args) -> dict:
    """Which utterances are trained on."""
    return {
        "min_seconds": args.min_utterance,
        "max_seconds": args.max_utterance,
        "min_frames": _min_frames(args),
    }


def _min_frames(args) -> int:
    """An encoder alone is trained for the published rate of speech embeddings."""
    return frames_needed(getattr(args, "encoder_projector_ds_rate", 4))


def train_cuts(args, statistics: CutStatistics) -> CutSet:
    """Of cut files, read lazily; `statistics` are of `check_data`."""
    return cuts_within(train_paths(args), **limits(args), bad=statistics.bad)


def valid_cuts(args, statistics: CutStatistics) -> CutSet:
    return cuts_within(valid_paths(args), min_frames=_min_frames(args), bad=statistics.bad)


def check_data(
    args,
    more_faults: Callable[[Cut], list[Fault]] | None = None,
    is_main: bool | None = None,
) -> tuple[CutStatistics, CutStatistics]:
    """One pass over all training and validation cuts, before anything expensive.

    Of training shards the index is read instead, and the first cuts of some. Bad cuts are listed
    in <exp-dir>/bad-cuts.jsonl, by the process that `is_main`, and left out.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file, the cut and the value: a file
        cannot be read, or more than --max-bad-fraction of its cuts are bad.
    """
    check_max_tokens(args)
    options = {"need_features": not args.on_the_fly_feats, "tolerate": args.max_bad_fraction > 0}
    if args.shar_dir:
        train = check_shards(shards_of(args), **limits(args), **options)
    else:
        train = check_cuts(train_paths(args), **limits(args), **options, more_faults=more_faults)
    valid = check_cuts(
        valid_paths(args), min_frames=_min_frames(args), **options, more_faults=more_faults
    )
    checked = [train, valid]
    if args.enable_musan:
        try:
            noise = cuts_file(args.manifest_dir, "musan_cuts")
        except FileNotFoundError as error:
            hint = "--enable-musan false trains without noise"
            raise FileNotFoundError(f"{error}: {hint}") from None
        checked.append(check_cuts([noise], min_frames=0, need_text=None, **options))
    _check_bad(checked, args, is_first_process() if is_main is None else is_main)
    return train, valid


def _check_bad(checked: list[CutStatistics], args, is_main: bool) -> None:
    listing = bad_listing(args)
    faults = [fault for one in checked for of_cut in one.bad_cuts for fault in of_cut]
    if is_main and not args.dry_run:
        if args.start_epoch == 1 and not getattr(args, "start", None):  # of an earlier training
            listing.unlink(missing_ok=True)
        list_faults(listing, faults)
    for one in checked:
        if one.bad_cuts:
            example = one.bad_cuts[0][0].sentence
            reasons = first_reasons(one.bad_cuts)
            check_fraction(reasons, one.total, args.max_bad_fraction, example, listing)


def check_positions(args, limit: int, is_main: bool) -> None:
    """Leave out, too, the utterances that need more than the `limit` positions of the LLM.

    The cuts are read again only if there can be such.

    Raises:
      ValueError: as `check_data`.
    """
    longest = max(args.train_statistics.longest, args.valid_statistics.longest)
    if args.count_positions.most(longest) > limit:
        args.more_faults = TooManyPositions(args.count_positions, limit)
        args.train_statistics, args.valid_statistics = check_data(args, args.more_faults, is_main)


def bad_listing(args) -> Path:
    """Where utterances that cannot be used are listed, with the reasons."""
    return Path(args.exp_dir) / "bad-cuts.jsonl"


def bad_utterances(args, ranks: Ranks) -> BadUtterances:
    """A counter of what loaders leave out, which knows what `check_data` left out."""
    train = args.train_statistics
    before = first_reasons(train.bad_cuts)
    return BadUtterances(bad_listing(args), train.total, args.max_bad_fraction, ranks, before)


def report_unread(unread: list[Fault], where: str, total: int, args) -> None:
    """Log and list what could not be read.

    Raises:
      ValueError: it is more than may be.
    """
    for fault in unread:
        logging.warning(f"{where} leaves out ({fault.reason}): {fault.sentence}")
    listing = bad_listing(args)
    list_faults(listing, unread)
    reasons = first_reasons([fault] for fault in unread)
    check_fraction(reasons, total, args.max_bad_fraction, unread[0].sentence, listing)
