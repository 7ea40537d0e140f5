"""Greedy CTC decoding of test sets, at the end of pretrain_encoder.py.

A causal encoder is also scored with each chunk size used in training, as for streaming.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import sentencepiece
import torch

from speechllm.checkpoints import load_checkpoint
from speechllm.data.config import DataConfig
from speechllm.distributed import DistEnv
from speechllm.evaluation.eval_sets import (
    EvalSet,
    decode_shard,
    error_rate,
    merge_results,
    score_cuts,
)
from speechllm.models.zipformer.checkpoint import encoder_from_state
from speechllm.models.zipformer.config import OFFLINE
from speechllm.models.zipformer.ctc_head import ctc_greedy
from speechllm.progress import setup_logging
from speechllm.scoring.files import log_line, write_scores
from speechllm.training.config import EncoderConfig
from speechllm.training.ctc_training import BPE_FILE, CtcModel


def decode_with_ctc(
    test_sets: list[EvalSet], encoder: EncoderConfig, data: DataConfig, exp_dir: Path
) -> None:
    """Decode with pretrained.pt and bpe.model in `exp_dir`; write results to `exp_dir`/decode."""
    if not test_sets:
        return
    setup_logging(exp_dir / "decode" / "log-ctc-greedy", DistEnv())  # ranks log elsewhere
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(exp_dir / BPE_FILE))
    state = load_checkpoint(exp_dir / "pretrained.pt")["model"]
    model = CtcModel(encoder_from_state(state, encoder.size)).to(device).eval()

    @torch.no_grad()
    def recognize(batches: Iterable[dict]) -> Iterator[tuple[dict, list[str]]]:
        for batch in batches:
            log_probs, lens = model(batch["features"].to(device), batch["feature_lens"])
            yield batch, bpe.decode(ctc_greedy(log_probs, lens))

    # Each chunk size with its last limited left context.
    by_size = {one.chunk_size: one for one in encoder.chunkings if one.left_context > 0}
    for cuts, chunking in product(test_sets, [OFFLINE, *by_size.values()]):
        model.encoder.set_chunkings((chunking,))
        suffix = f"ctc-greedy-{chunking}".rstrip("-")
        decoded = merge_results(cuts, decode_shard(cuts, recognize, data))
        scored = score_cuts(decoded, [one.result or "" for one in decoded])
        rate = error_rate(decoded)
        counts = write_scores(scored, exp_dir / "decode", cuts.name, suffix, rate=rate)
        logging.info(log_line(f"{cuts.name} {chunking}".rstrip(), counts))
