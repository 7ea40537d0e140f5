"""--valid-decode: word errors on validation utterances during LLM training."""

from collections import ChainMap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from speechllm.decoding.config import SearchConfig
from speechllm.decoding.ctc_decoder import find_ctc_decoder
from speechllm.decoding.recognizer import Recognizer
from speechllm.distributed import DistEnv
from speechllm.evaluation.eval_sets import EvalSet, decode_shard, merge_results, score_cuts
from speechllm.models.speech_llm import SpeechLLM
from speechllm.scoring.wer import word_error_counts
from speechllm.training.data import TrainingData
from speechllm.training.fit import Training


def valid_decoder(
    model: SpeechLLM, training: Training, dist_env: DistEnv
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that decodes like decode.py's default, with the model's current weights.

    The function needs the model in evaluation mode, runs on all ranks, and returns `errors` and
    `words` over all ranks. A mismatched BPE model raises InputError.
    """
    config, data = training.model, training.data
    cuts = evenly_spaced(data, training.config.valid_decode)
    ctc = find_ctc_decoder(model, config.bpe_paths)
    search = SearchConfig(word_timestamps=False).resolve(ctc is not None)
    tokenizer = data.text.tokenizer.tokenizer
    recognizer = Recognizer(model, tokenizer, ctc, search, dist_env.device, training.dtype)

    def decode() -> dict[str, Tensor]:
        shard = decode_shard(
            cuts, recognizer, data.config, min_frames=recognizer.min_frames,
            more_errors=recognizer.too_many_positions, use_context=config.use_context,
            dist_env=dist_env, encoder_cache=data.encoder_cache,
        )  # fmt: skip
        decoded = merge_results(cuts, ChainMap(*dist_env.gather_objects(shard)))
        texts = [one.result.text if one.result else "" for one in decoded]
        normalize = "none" if config.lowercase else "cased"
        counts = word_error_counts(score_cuts(decoded, texts, normalize))
        return {"errors": torch.tensor(counts.errors), "words": torch.tensor(counts.ref_words)}

    return decode


def evenly_spaced(data: TrainingData, number: int) -> EvalSet:
    """Return up to `number` validation cuts, evenly spaced over the files."""
    total = data.valid.kept
    chosen = {k * total // number for k in range(number)} if number < total else range(total)
    cuts = [cut for k, cut in enumerate(data.valid_cuts()) if k in chosen]
    return EvalSet(Path("validation"), cuts, {})
