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
import os
from pathlib import Path

import kaldialign
import sentencepiece
import torch
from torch import Tensor, nn

from speechllm.data import add_data_arguments, add_training_data_arguments, read_cuts
from speechllm.training.checkpoint import (
    TrainState,
    average_epochs,
    epoch_path,
    load_checkpoint,
    restore_state,
)
from speechllm.training.distributed import Ranks, launch
from speechllm.training.loop import seed_everything, train
from speechllm.training.progress import Metrics, setup_logging
from speechllm.training.setup import (
    add_training_arguments,
    autocast_dtype,
    check_data,
    check_outputs_finite,
    make_optimizer,
    make_schedule,
    make_train_loader,
    make_valid_loader,
    train_paths,
    wrap_ddp,
)
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder
from speechllm.zipformer.ctc import ctc_frames_needed, ctc_greedy, ctc_loss


class CtcModel(nn.Module):
    """Features (B, T, 80) -> CTC log-probabilities (B, T / 4, V) and their lengths."""

    def __init__(self, encoder: ZipformerEncoder, feature_mask: bool = True):
        super().__init__()
        self.encoder = encoder
        self.feature_mask = feature_mask

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.feature_mask and self.training
        encoder_out, lens = self.encoder(features, feature_lens, feature_mask=mask)
        return self.encoder.ctc_output(encoder_out), lens


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_arguments(parser)
    add_data_arguments(parser)
    add_training_data_arguments(parser)
    group = parser.add_argument_group("encoder")
    add = group.add_argument
    add("--train-cuts", default="librispeech_cuts_train-all-shuf", help="comma-separated")
    add("--valid-cuts", default="librispeech_cuts_dev-clean,librispeech_cuts_dev-other",
        help="comma-separated")  # fmt: skip
    add("--encoder-size", choices=list(SIZES), default="medium", help="see zipformer/sizes.py")
    add("--vocab-size", type=int, default=500, help="BPE pieces at most; small corpora give fewer")
    add("--dropout", type=float, default=0.1, help="in the encoder and before the CTC head")
    add("--avg", type=int, default=5, help="epochs averaged into pretrained.pt")
    parser.set_defaults(
        exp_dir=Path("exp/encoder"), base_lr=0.045, lr_schedule="eden", num_epochs=30
    )
    return parser


def train_bpe(texts: list[str], vocab_size: int, path: Path) -> None:
    """A sentencepiece model of upper-case `texts` with icefall's ids: 0 blank, 2 unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=["<blk>", "<sos/eos>"],
        unk_id=2,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)


def make_batch_loss(bpe: sentencepiece.SentencePieceProcessor, device: torch.device):
    """CTC loss of a batch in nats, per encoder frame; word errors of greedy CTC in validation."""

    def batch_loss(model: nn.Module, batch: dict) -> dict[str, Tensor]:
        texts = [text.upper() for text in batch["texts"]]
        log_probs, lens = model(
            batch["features"].to(device), batch["feature_lens"].to(device)
        )
        targets = bpe.encode(texts)
        sums = {
            "loss": ctc_loss(log_probs, lens, targets),
            "tokens": lens.sum(),
            "frames": lens.sum(),
        }
        if not model.training:
            hypotheses = bpe.decode(ctc_greedy(log_probs, lens))
            errors = sum(
                kaldialign.edit_distance(text.split(), hyp.split())["total"]
                for text, hyp in zip(texts, hypotheses)
            )
            sums["errors"] = torch.tensor(errors)
            sums["words"] = torch.tensor(sum(len(text.split()) for text in texts))
        return sums

    return batch_loss


def prepare_bpe(args) -> None:
    """Train the BPE model, once; say how many utterances CTC cannot align to their text."""
    path = args.exp_dir / "bpe.model"
    cuts = [(c.duration, c.supervisions[0].text.upper())
            for p in train_paths(args) for c in read_cuts(p)]  # fmt: skip
    if not path.is_file():
        args.exp_dir.mkdir(parents=True, exist_ok=True)
        train_bpe([text for _, text in cuts], args.vocab_size, path)
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(path))
    too_dense = sum(
        ctc_frames_needed(bpe.encode(text)) > int(seconds * 25) - 1 for seconds, text in cuts
    )
    if too_dense:
        print(f"{too_dense} of {len(cuts)} utterances have more text than CTC can align: "
              "they add nothing to the loss")  # fmt: skip


def run(ranks: Ranks, args) -> None:
    """What each process of the training does."""
    setup_logging(args.exp_dir / "log" / "log-train", ranks)
    logging.info(f"Training started: {vars(args)}")
    seed_everything(args.seed)
    bpe = sentencepiece.SentencePieceProcessor(model_file=str(args.exp_dir / "bpe.model"))
    encoder = ZipformerEncoder(SIZES[args.encoder_size], bpe.vocab_size(), args.dropout)
    state, checkpoint = TrainState(), {}
    if args.start_epoch > 1:
        checkpoint = load_checkpoint(epoch_path(args.exp_dir, args.start_epoch - 1))
        encoder.load_state_dict(checkpoint["model"])
        state = restore_state(checkpoint)
    logging.info(f"Number of model parameters: {sum(p.numel() for p in encoder.parameters())}")
    model = CtcModel(encoder).to(ranks.device)
    if args.inf_check:
        check_outputs_finite(model)
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.base_lr)
    schedule = make_schedule(args, optimizer)
    dtype = autocast_dtype(args.use_fp16, args.use_bf16)
    scaler = torch.amp.GradScaler(
        ranks.device.type, init_scale=1.0, enabled=dtype == torch.float16
    )
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["grad_scaler"])

    batch_loss = make_batch_loss(bpe, ranks.device)
    valid_loader = make_valid_loader(args, args.valid_statistics, ranks)
    train(
        model=wrap_ddp(model, ranks),
        batch_loss=batch_loss,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        train_loader=make_train_loader(args, args.train_statistics, ranks),
        valid_loader=valid_loader,
        model_state=encoder.state_dict,
        state=state,
        exp_dir=args.exp_dir,
        start_epoch=args.start_epoch,
        num_epochs=args.num_epochs,
        epoch_seconds=args.train_statistics.seconds,
        dtype=dtype,
        seed=args.seed,
        log_interval=args.log_interval,
        valid_interval=args.valid_interval,
        tensorboard=args.tensorboard,
        ranks=ranks,
    )
    if ranks.is_main:
        finish(encoder, model, batch_loss, valid_loader, args)


@torch.no_grad()
def finish(encoder, model, batch_loss, valid_loader, args) -> None:
    """Average the last epochs, measure the average, write it as pretrained.pt."""
    average, _ = average_epochs(args.exp_dir, args.num_epochs, min(args.avg, args.num_epochs))
    encoder.load_state_dict(average)
    model.eval()
    totals = Metrics({"loss": torch.zeros(()), "tokens": torch.zeros(()), "frames": torch.zeros(())})
    for batch in valid_loader():
        totals = totals + Metrics(batch_loss(model, batch))
    logging.info(f"Average of the last {args.avg} epochs, validation: {totals}")
    path = args.exp_dir / "pretrained.pt"
    save_encoder(encoder, path)
    logging.info(f"Wrote {path} and {args.exp_dir / 'bpe.model'}")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    try:
        args.train_statistics, args.valid_statistics = check_data(args)
        print(f"Training cuts: {args.train_statistics}\nValidation cuts: {args.valid_statistics}")
        prepare_bpe(args)
        launch(run, args, args.world_size, args.master_port)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
