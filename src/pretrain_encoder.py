#!/usr/bin/env python3
"""Train a Zipformer with a CTC head from scratch, on any prepared corpus.

    python src/pretrain_encoder.py --manifest-dir data/fbank \\
      --train-cuts an4_cuts_train --valid-cuts an4_cuts_dev \\
      --encoder-size tiny --num-epochs 40 --avg 10 --exp-dir exp/an4/encoder

Writes `bpe.model` (before the first step) and, at the end, `pretrained.pt`: the average of the
last `--avg` epochs under icefall's names, which `train.py --speech-encoder-path` takes.
"""

import argparse
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import kaldialign
import sentencepiece
import torch
from torch import Tensor, nn

from speechllm.cut_faults import text_faults
from speechllm.cut_files import read_cuts
from speechllm.data import add_data_arguments, add_training_data_arguments, loader_options
from speechllm.decoding.test_set import decode_cuts, files_to_decode, rate, results, set_name
from speechllm.errors import InputError, in_sentences
from speechllm.flags import Parser, str2bool
from speechllm.progress import setup_logging
from speechllm.scoring import log_line, score
from speechllm.seeds import seed_everything
from speechllm.training import dry_run
from speechllm.training.checkpoint import (
    TrainState,
    average_epochs,
    epoch_path,
    load_checkpoint,
    restore_state,
)
from speechllm.training.distributed import Ranks, is_first_process, launch
from speechllm.training.engine import Engine
from speechllm.training.loaders import make_valid_loader
from speechllm.training.setup import fit
from speechllm.training.training_cuts import check_data, train_paths
from speechllm.training.training_flags import add_training_arguments, check_training
from speechllm.training.validation import validate
from speechllm.whole_file import whole_file
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder
from speechllm.zipformer.checkpoint import encoder_from_state
from speechllm.zipformer.ctc import ctc_frames_needed, ctc_greedy, ctc_loss
from speechllm.zipformer.encoder import encoder_out_lens
from speechllm.zipformer.flat_start import flat_start_loss

BPE_TEXTS = 1_000_000  # sentencepiece holds them all


class CtcModel(nn.Module):
    """Features (B, T, 80) -> CTC log-probabilities (B, T / 4, V) and their lengths."""

    def __init__(self, encoder: ZipformerEncoder, feature_mask: bool = True):
        super().__init__()
        self.encoder = encoder
        self.feature_mask = feature_mask

    def checkpoint_activations(self) -> None:
        self.encoder.checkpoint_activations()

    def compile_layers(self) -> None:
        self.encoder.compile_layers()

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.feature_mask and self.training
        encoder_out, lens = self.encoder(features, feature_lens, feature_mask=mask)
        return self.encoder.ctc_output(encoder_out), lens


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_training_arguments(parser)
    add_data_arguments(parser)
    add_training_data_arguments(parser)
    group = parser.add_argument_group("encoder")
    add = group.add_argument
    add("--train-cuts", default="librispeech_cuts_train-all-shuf", help="comma-separated")
    add("--valid-cuts", default="librispeech_cuts_dev-clean,librispeech_cuts_dev-other",
        help="comma-separated")  # fmt: skip
    add("--test-cuts", help="at the end, decode these by greedy CTC and score them")
    add("--encoder-size", choices=list(SIZES), default="medium", help="see zipformer/sizes.py")
    add("--vocab-size", type=int, default=500, help="BPE pieces at most; small corpora give fewer")
    add("--dropout", type=float, default=0.1, help="in the encoder and before the CTC head")
    add("--encoder-feature-mask", type=str2bool, default=True,
        help="mask encoder channels in training, as in the paper")  # fmt: skip
    add("--flat-start-batches", type=int, default=400,
        help="first batches that learn from evenly spread tokens instead of by CTC")  # fmt: skip
    add("--avg", type=int, default=5, help="last epochs averaged into pretrained.pt")
    parser.set_defaults(
        exp_dir=Path("exp/encoder"), base_lr=0.045, lr_schedule="eden", num_epochs=30
    )
    return parser


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path | None) -> bytes:
    """A sentencepiece model of upper-case `texts` with icefall's ids: 0 blank, 2 unknown.

    Of more than a million texts so many are drawn. It is written to `path` unless that is None.

    Raises:
      ValueError: `vocab_size` is below the number of characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            input_sentence_size=BPE_TEXTS,
            hard_vocab_limit=False,
            character_coverage=1.0,
            user_defined_symbols=["<blk>", "<sos/eos>"],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"no BPE model with --vocab-size {vocab_size}: {reason}") from None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:  # under torchrun each process writes
            partial.write_bytes(model.getvalue())
    return model.getvalue()


class CtcBatchLoss:
    """CTC loss of a batch in nats, per encoder frame; word errors of greedy CTC in validation.

    The first `flat_start_batches` steps, of which `state` tells how many there were, have the loss
    of flat_start.py instead.
    """

    def __init__(
        self,
        bpe: sentencepiece.SentencePieceProcessor,
        device: torch.device,
        flat_start_batches: int = 0,
        state: TrainState = TrainState(),
    ):
        self.bpe, self.device = bpe, device
        self.flat_start_batches, self.state = flat_start_batches, state
        pieces = [bpe.id_to_piece(i).replace("\u2581", "") for i in range(bpe.vocab_size())]
        self.num_letters = torch.tensor([max(1, len(piece)) for piece in pieces])

    def tokens(self, batch: dict) -> int:
        return int(encoder_out_lens(batch["feature_lens"]).sum())

    def __call__(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        texts = [text.upper() for text in batch["texts"]]
        features = batch["features"].to(self.device, non_blocking=True)
        feature_lens = batch["feature_lens"]
        log_probs, lens = model(features, feature_lens)
        targets = self.bpe.encode(texts)
        if model.training and self.state.batch_idx_train < self.flat_start_batches:
            loss = flat_start_loss(
                log_probs, lens, features, feature_lens, targets, self.num_letters
            )
        else:
            loss = ctc_loss(log_probs, lens, targets)
        sums = {"loss": loss, "frames": lens.sum()}
        if not model.training:
            hypotheses = self.bpe.decode(ctc_greedy(log_probs, lens))
            errors = sum(
                kaldialign.edit_distance(text.split(), hyp.split())["total"]
                for text, hyp in zip(texts, hypotheses)
            )
            sums["errors"] = torch.tensor(errors)
            sums["words"] = torch.tensor(sum(len(text.split()) for text in texts))
        return sums


def training_texts(args) -> Iterator[tuple[float, str]]:
    """Duration (s) and upper-case text of every training cut whose text has no fault."""
    for path in train_paths(args):
        for cut in read_cuts(path):
            if not any(text_faults(cut)):
                yield cut.duration, " ".join(s.text for s in cut.supervisions).upper()


def prepare_bpe(args) -> sentencepiece.SentencePieceProcessor:
    """Train the BPE model, once; say how many utterances CTC cannot align to their text."""
    path = args.exp_dir / "bpe.model"
    if not args.start:
        texts = (text for _, text in training_texts(args))
        model = train_bpe(texts, args.vocab_size, None if args.dry_run else path)
    elif path.is_file():
        model = path.read_bytes()
    else:
        raise FileNotFoundError(f"{path} is missing: {args.start} needs it")
    bpe = sentencepiece.SentencePieceProcessor(model_proto=model)
    used = too_dense = 0
    for seconds, text in training_texts(args):
        if args.min_utterance <= seconds <= args.max_utterance:
            used += 1
            too_dense += ctc_frames_needed(bpe.encode(text)) > encoder_frames(seconds)
    if too_dense and is_first_process():
        print(f"{too_dense} of {used} utterances have more text than CTC can align: "
              "they add nothing to the loss")  # fmt: skip
    return bpe


def encoder_frames(seconds: float) -> int:
    """Frames out of the encoder, 25 a second less its edges."""
    return ((round(seconds * 100) - 7) // 2 + 1) // 2


def check_average(args) -> None:
    """Whether the epochs that pretrained.pt is the average of are there or to come."""
    if args.avg < 1:
        raise InputError(f"--avg {args.avg} must be at least 1")
    for epoch in range(max(1, args.num_epochs - args.avg + 1), args.start_epoch):
        if not epoch_path(args.exp_dir, epoch).is_file():
            raise FileNotFoundError(
                f"epoch-{epoch}.pt is missing in {args.exp_dir}: "
                f"--num-epochs {args.num_epochs} --avg {args.avg} needs it"
            )


def make_encoder(args, vocab_size: int, checkpoint: dict) -> ZipformerEncoder:
    """A new encoder, or that of the checkpoint.

    Raises:
      ValueError: the checkpoint is of another size or vocabulary.
    """
    if not checkpoint:
        return ZipformerEncoder(SIZES[args.encoder_size], vocab_size, args.dropout)
    path = args.start
    try:
        encoder = encoder_from_state(checkpoint["model"], SIZES[args.encoder_size], args.dropout)
    except ValueError as error:
        raise InputError(f"{path} is not of --encoder-size {args.encoder_size}: {error}") from None
    if encoder.ctc_output is None or encoder.ctc_output.vocab_size != vocab_size:
        raise InputError(f"{path} is not of the {vocab_size} pieces of bpe.model beside it")
    return encoder


def run(ranks: Ranks, args) -> None:
    """What each process of the training does."""
    setup_logging(args.exp_dir / "log" / "log-train", ranks)
    logging.info(f"Training started: {vars(args)}")
    seed_everything(args.seed)
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(args.exp_dir / "bpe.model"))
    state, checkpoint = TrainState(), {}
    if args.start:
        checkpoint = load_checkpoint(args.start)
        state = restore_state(checkpoint)
    encoder = make_encoder(args, bpe.vocab_size(), checkpoint)
    logging.info(f"Number of model parameters: {sum(p.numel() for p in encoder.parameters())}")
    model = CtcModel(encoder, args.encoder_feature_mask).to(ranks.device)
    batch_loss = CtcBatchLoss(bpe, ranks.device, args.flat_start_batches, state)
    valid_loader = make_valid_loader(args, args.valid_statistics, ranks)
    engine = fit(
        model,
        batch_loss,
        valid_loader,
        lambda value: {name: value(tensor) for name, tensor in encoder.state_dict().items()},
        state,
        checkpoint,
        args,
        ranks,
    )
    finish(engine, batch_loss, valid_loader, args)
    if ranks.is_main:
        decode_tests(model, bpe, args, ranks.device)


def finish(engine: Engine, batch_loss, valid_loader, args) -> None:
    """Write the average of the last epochs as pretrained.pt, and measure it."""
    encoder, ranks = engine.module.encoder, engine.ranks
    path, avg = args.exp_dir / "pretrained.pt", min(args.avg, args.num_epochs)
    if ranks.is_main:
        encoder.load_state_dict(average_epochs(args.exp_dir, args.num_epochs, avg)[0])
        save_encoder(encoder, path)
        logging.info(f"Wrote {path} and {args.exp_dir / 'bpe.model'}")
    ranks.barrier()
    encoder.load_state_dict(load_checkpoint(path)["model"])
    totals = validate(engine, batch_loss, batch_loss.tokens, valid_loader())
    logging.info(f"Average of the last {avg} epochs, validation: {totals}")


@torch.no_grad()
def decode_tests(model: CtcModel, bpe, args, device: torch.device) -> None:
    """Decode the test sets by greedy CTC; results go to `decode/` of the exp dir."""

    def recognize(batches: Iterable[dict]) -> Iterator[tuple[dict, list[str]]]:
        for batch in batches:
            log_probs, lens = model(batch["features"].to(device), batch["feature_lens"])
            yield batch, bpe.decode(ctc_greedy(log_probs, lens))

    model.eval()
    for path in args.test_paths:
        decoded = decode_cuts(path, recognize, **loader_options(args))
        texts = [one.answer or "" for one in decoded]
        out_dir = args.exp_dir / "decode"
        scored = results(decoded, texts)
        counts = score(scored, out_dir, set_name(path), "ctc-greedy", rate=rate(decoded))
        logging.info(log_line(set_name(path), counts))


def say_dry_run(args) -> None:
    bpe = prepare_bpe(args)
    checkpoint = load_checkpoint(args.start) if args.start else {}
    encoder = make_encoder(args, bpe.vocab_size(), checkpoint).to("meta")
    if is_first_process():
        print(dry_run.of_encoder(encoder, bpe.vocab_size(), args))


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    args.start = check_training(args)
    check_average(args)
    args.train_statistics, args.valid_statistics = check_data(args)
    args.test_paths = files_to_decode(args)
    if args.dry_run:
        say_dry_run(args)
        return
    if is_first_process():
        print(f"Training cuts: {args.train_statistics}")
        print(f"Validation cuts: {args.valid_statistics}")
    prepare_bpe(args)
    launch(run, args, args.world_size, args.master_port)


if __name__ == "__main__":
    main()
