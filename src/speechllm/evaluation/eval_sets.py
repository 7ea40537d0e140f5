"""Test sets: reading and validating cut files, recognizing every cut once, scoring results."""

import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.cli import comma_list
from speechllm.data.config import DataConfig
from speechllm.data.dataloader import evaluation_loader
from speechllm.data.dataset import TextOptions, usable_batches
from speechllm.data.encoder_cache import EncoderCache
from speechllm.data.length_limits import frames_needed, long_enough
from speechllm.data.manifests import checked_cuts, cuts_file
from speechllm.data.validation import CutError, count_errors
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.progress import with_progress
from speechllm.scoring.normalize import NORMALIZERS
from speechllm.scoring.wer import ScoredUtterance, align_utterance, by_characters, rate_name, units


@dataclass(frozen=True)
class EvalSet:
    """A cut file, read and validated once."""

    path: Path
    cuts: list[Cut]  # in the order of the file
    errors: dict[str, CutError]  # first error of each invalid cut, by cut id

    @property
    def name(self) -> str:
        """Name for results: `librispeech_cuts_test-clean.jsonl.gz` -> `librispeech_test_clean`."""
        name = self.path.name.removesuffix(".jsonl.gz")
        return name.replace("_cuts", "").replace("-", "_")


def read_eval_sets(test_cuts: str, data: DataConfig) -> list[EvalSet]:
    """Read comma-separated cut files; raise FileNotFoundError or InputError on failure."""
    paths = [cuts_file(data.manifest_dir, name) for name in comma_list(test_cuts)]
    sets = [read_eval_set(path, not data.on_the_fly_feats) for path in paths]
    if len({one.name for one in sets}) < len(sets):
        raise InputError(f"--test-cuts {test_cuts}: two sets would write the same result files")
    return sets


def read_eval_set(path: Path, need_features: bool = True) -> EvalSet:
    """Read and validate a cut file and the data of its first valid cut; see `read_eval_sets`."""
    cuts, errors = [], {}
    for _, cut, found in checked_cuts(path, False, need_features):
        for error in found:
            if error.reason in ("duplicate-id", "invalid-id"):
                raise InputError(f"{path}: {error.message}")
        cuts.append(cut)
        errors |= {cut.id: error for error in found[:1]}
    if len(errors) == len(cuts):
        raise InputError(
            f"{path}: nothing to decode, {len(errors)} invalid cuts "
            f"({count_errors(errors.values())}), such as: {next(iter(errors.values())).message}"
        )
    return EvalSet(path, cuts, errors)


@dataclass(frozen=True)
class DecodedCut:
    """A cut with its result, which is None if the cut is invalid (`error`) or too short."""

    cut: Cut
    result: Any
    error: CutError | None = None

    @property
    def reference(self) -> str:
        """Text of all supervisions, with `?` for characters that cannot be encoded."""
        texts = (str(supervision.text or "") for supervision in self.cut.supervisions)
        return " ".join(texts).encode(errors="replace").decode()

    def by_characters(self, error_unit: str = "auto") -> bool:
        """Return true if the cut is scored by characters; the first language found decides."""
        languages = (one.language for one in self.cut.supervisions if one.language)
        return by_characters(next(languages, None), error_unit)


def decode_shard(
    cuts: EvalSet,
    recognize: Callable[[Iterable[dict]], Iterator[tuple[dict, list]]],
    data: DataConfig,
    *,
    min_frames: int = frames_needed(),  # shorter cuts are not decoded
    more_errors: Callable[[Cut], list[CutError]] = lambda cut: [],
    use_context: bool = False,
    dist_env: DistEnv = DistEnv(),
    encoder_cache: EncoderCache | None = None,
) -> dict[str, Any]:
    """Return this rank's results for a set by cut id; for invalid cuts, a CutError.

    The batches, described in speechllm.data.dataset, depend only on the cuts, not on their order or
    the number of ranks; `recognize` yields each batch with its results.
    """
    results: dict[str, Any] = dict(cuts.errors)
    long_cuts = [cut for cut in cuts.cuts if cut.id not in results and long_enough(cut, min_frames)]
    results |= {cut.id: error for cut in long_cuts for error in more_errors(cut)[:1]}
    usable = [cut for cut in long_cuts if cut.id not in results]
    if not usable:
        return results
    loader = evaluation_loader(
        CutSet.from_cuts(sorted(usable, key=lambda cut: cut.id)),
        data,
        num_cuts=len(usable),
        text=TextOptions(use_context),
        rank=dist_env.rank,
        world_size=dist_env.world_size,
        encoder_cache=encoder_cache,
    )
    seconds = sum(cut.duration for cut in usable)
    unreadable: list[CutError] = []
    batches = with_progress(usable_batches(loader, unreadable), cuts.name, seconds, dist_env)
    for batch, found in recognize(batches):
        results |= zip(batch["cut_ids"], found, strict=True)
    return results | {error.id: error for error in unreadable}


def merge_results(cuts: EvalSet, results: dict[str, Any]) -> list[DecodedCut]:
    """Return every cut with its result, in file order; log the cuts without a result."""
    decoded = []
    for cut in cuts.cuts:
        result, error = results.get(cut.id), None
        if isinstance(result, CutError):
            result, error = None, result
            logging.warning(f"{cuts.path}: empty hypothesis ({error.reason}): {error.message}")
        decoded.append(DecodedCut(cut, result, error))
    short = [one.cut.id for one in decoded if one.result is None and not one.error]
    if short:
        logging.warning(
            f"{cuts.path}: {len(short)} cuts are too short to decode and get empty hypotheses, "
            f"such as {short[0]}"
        )
    return decoded


def error_rate(decoded: Iterable[DecodedCut], error_unit: str = "auto") -> str:
    """Return the name of the error rate: WER, CER or MER."""
    return rate_name(one.by_characters(error_unit) for one in decoded)


def score_cuts(
    decoded: Sequence[DecodedCut],
    texts: Sequence[str],
    normalize: str = "none",
    error_unit: str = "auto",
) -> list[ScoredUtterance]:
    """Align one text per cut to its reference, after applying `normalize` and NFC to both."""
    function, converted = NORMALIZERS[normalize], 0

    def split(text: str, one: DecodedCut) -> list[str]:
        nonlocal converted
        composed = unicodedata.normalize("NFC", text := function(text))
        converted += composed != text
        return units(composed, one.by_characters(error_unit))

    scored = [
        align_utterance(one.cut.id, split(one.reference, one), split(text, one))
        for one, text in zip(decoded, texts, strict=True)
    ]
    if converted:
        logging.info(f"Scoring in Unicode NFC: {converted} texts were in another form")
    return scored
