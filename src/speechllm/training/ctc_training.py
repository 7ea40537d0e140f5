"""CTC training of a Zipformer, new or fine-tuned: data, BPE model and loss."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import sentencepiece
import torch
from torch import Tensor, nn

from speechllm.checkpoints import average_epochs, load_checkpoint, numbered_files
from speechllm.cli import spelled
from speechllm.data.config import TrainDataConfig
from speechllm.data.dataset import TextOptions
from speechllm.data.manifests import read_cuts
from speechllm.data.validation import text_errors
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.io import atomic_write
from speechllm.models.zipformer.bpe import case_of, read_bpe
from speechllm.models.zipformer.checkpoint import encoder_from_state, read_state, save_encoder
from speechllm.models.zipformer.ctc_head import ctc_greedy, ctc_loss
from speechllm.models.zipformer.encoder import ZipformerEncoder, encoder_out_lens
from speechllm.models.zipformer.flat_start import flat_start_loss
from speechllm.scoring.wer import align_utterance, word_error_counts
from speechllm.training.config import EncoderConfig, TrainConfig
from speechllm.training.data import scan_training_data
from speechllm.training.dry_run import count, describe_training
from speechllm.training.engine import Engine
from speechllm.training.fit import Training, begin, fit, launch_training
from speechllm.training.resume import Start, TrainState, find_start
from speechllm.training.validate import validate

BPE_TEXTS = 1_000_000  # sample size for larger corpora: sentencepiece keeps texts in memory
BPE_FILE = "bpe.model"


@dataclass(frozen=True)
class CtcTokenizer:
    """Converts texts to BPE ids, in the case of the pieces; picklable, for dataloader workers."""

    bpe: sentencepiece.SentencePieceProcessor

    @cached_property
    def case(self) -> Callable[[str], str]:
        return case_of(self.bpe)

    def training_batch(self, texts: list[str], contexts=None, sample: bool = False) -> dict:
        """Return `targets`, one list of ids per utterance."""
        spaced = [_spaced(self.case(text)) for text in texts]
        return {"targets": self.bpe.encode(spaced, num_threads=1)}  # starting threads takes longer


class CtcModel(nn.Module):
    """Maps features (B, T, 80) to CTC log-probabilities (B, T / 4, V) and their lengths."""

    def __init__(self, encoder: ZipformerEncoder, feature_mask: bool = True):
        super().__init__()
        self.encoder = encoder
        self.feature_mask = feature_mask

    def checkpoint_activations(self) -> None:
        """Store only the input of each layer; the backward pass recomputes the rest."""
        self.encoder.checkpoint_activations()

    def compile_layers(self) -> None:
        """Compile each layer with torch.compile, with dynamic lengths."""
        self.encoder.compile_layers()

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.feature_mask and self.training
        chunking = self.encoder.sample_chunking() if self.training else None
        encoder_out, lens = self.encoder(features, feature_lens, mask, chunking)
        return self.encoder.ctc_output(encoder_out), lens


class CtcLoss:
    """CTC loss in nats, counted per encoder frame; in validation, also greedy CTC word errors.

    The first `flat_start_batches` training steps use the loss of flat_start.py instead.
    """

    def __init__(
        self,
        bpe: sentencepiece.SentencePieceProcessor,
        device: torch.device,
        flat_start_batches: int = 0,
        state: TrainState = TrainState(),
    ):
        self.bpe, self.device, self.case = bpe, device, case_of(bpe)
        self.flat_start_batches, self.state = flat_start_batches, state
        pieces = [bpe.id_to_piece(i).replace("\u2581", "") for i in range(bpe.vocab_size())]
        self.num_letters = torch.tensor([max(1, len(piece)) for piece in pieces])

    def num_tokens(self, batch: dict) -> int:
        """Return the number of encoder frames in a batch."""
        return int(encoder_out_lens(batch["feature_lens"]).sum())

    def __call__(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        features = batch["features"].to(self.device, non_blocking=True)
        feature_lens, targets = batch["feature_lens"], batch["targets"]
        log_probs, lens = model(features, feature_lens)
        if model.training and self.state.batch_idx_train < self.flat_start_batches:
            loss = flat_start_loss(
                log_probs, lens, features, feature_lens, targets, self.num_letters
            )
        else:
            loss = ctc_loss(log_probs, lens, targets)
        sums = {"loss": loss, "frames": lens.sum()}
        if not model.training:
            hypotheses = self.bpe.decode(ctc_greedy(log_probs, lens))
            sums |= _word_errors(list(map(self.case, batch["texts"])), hypotheses)
        return sums


def _word_errors(references: list[str], hypotheses: list[str]) -> dict[str, Tensor]:
    pairs = zip(references, hypotheses, strict=True)
    counts = word_error_counts(align_utterance("", *map(str.split, pair)) for pair in pairs)
    return {"errors": torch.tensor(counts.errors), "words": torch.tensor(counts.ref_words)}


def train_encoder(encoder: EncoderConfig, data: TrainDataConfig, config: TrainConfig) -> bool:
    """Train an encoder and return True or, with --dry-run, describe the run and return False."""
    scanned = scan_training_data(data, seed=config.seed)
    return launch_training(run_ctc_training, Training(encoder, scanned, config), _describe)


def run_ctc_training(dist_env: DistEnv, training: Training) -> None:
    """Train in one process started by `launch`."""
    config, options, start = training.config, training.model, begin(training, dist_env)
    check_epochs(config, options.avg, start.state)
    bpe = prepare_bpe(training, start, dist_env)
    encoder = make_encoder(options, bpe.vocab_size(), start)
    logging.info(f"Number of model parameters: {count(encoder.parameters())}")
    model = CtcModel(encoder, config.encoder_feature_mask).to(dist_env.device)
    flat_start_batches = 0 if options.speech_encoder_path else options.flat_start_batches
    loss = CtcLoss(bpe, dist_env.device, flat_start_batches, start.state)
    text = TextOptions(tokenizer=CtcTokenizer(bpe))
    training = replace(training, data=replace(training.data, text=text))

    def model_state(full_param) -> dict[str, Tensor]:
        return {name: full_param(tensor) for name, tensor in encoder.state_dict().items()}

    engine = fit(training, model, loss, model_state, start, dist_env)
    write_average(engine, loss, training)


def check_epochs(config: TrainConfig, avg: int, state: TrainState) -> None:
    """Raise FileNotFoundError if a completed epoch that the final average needs is missing."""
    first, found = config.num_epochs - avg + 1, numbered_files(config.exp_dir, "epoch")
    for number in range(max(1, first), state.next_epoch):
        if number not in found:
            raise FileNotFoundError(
                f"epoch-{number}.pt is missing in {config.exp_dir}: --num-epochs "
                f"{config.num_epochs} --avg {avg} averages epochs {max(1, first)} to "
                f"{config.num_epochs}"
            )


def write_average(engine: Engine, loss: CtcLoss, training: Training) -> None:
    """Write the average of the last epochs to pretrained.pt, and log its validation loss."""
    encoder, dist_env, config = engine.module.encoder, engine.dist_env, training.config
    path, avg = config.exp_dir / "pretrained.pt", min(training.model.avg, config.num_epochs)
    if dist_env.is_main:
        encoder.load_state_dict(average_epochs(config.exp_dir, config.num_epochs, avg)[0])
        save_encoder(encoder, path)
        logging.info(f"Wrote {path} and {config.exp_dir / BPE_FILE}")
    dist_env.barrier()
    if not dist_env.is_main:
        encoder.load_state_dict(load_checkpoint(path)["model"])
    totals = validate(engine, loss, training.data.valid_loader(dist_env, config.exp_dir)())
    logging.info(f"Average of the last {avg} epochs, validation: {totals}")


def make_encoder(config: EncoderConfig, vocab_size: int, start: Start) -> ZipformerEncoder:
    """Return the encoder of the checkpoint to resume or to fine-tune, or a new one.

    Raises:
      InputError: the checkpoint does not match the flags or the size of the BPE model.
    """
    path, bpe_path, state = config.speech_encoder_path, config.speech_encoder_bpe_path, None
    if start.path:
        path, bpe_path = start.path, start.path.with_name(BPE_FILE)
        state = start.checkpoint["model"]
    elif path:
        state = read_state(path)
    if state is None:
        encoder = ZipformerEncoder(config.size, vocab_size, config.dropout)
    else:
        try:
            encoder = encoder_from_state(state, config.size, config.dropout)
        except InputError as error:
            flags = f"--encoder-size {config.encoder_size} --causal {spelled(config.causal)}"
            raise InputError(f"{path} does not match {flags}: {error}") from None
    encoder.set_chunkings(config.chunkings)
    if encoder.ctc_output is None or encoder.ctc_output.vocab_size != vocab_size:
        raise InputError(f"{path} has no CTC head for the {vocab_size} pieces of {bpe_path}")
    return encoder


# ---- BPE model


def prepare_bpe(
    training: Training, start: Start, dist_env: DistEnv = DistEnv()
) -> sentencepiece.SentencePieceProcessor:
    """Read bpe.model when training resumes, or write it on rank 0."""
    path = training.config.exp_dir / BPE_FILE
    if start.path and not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {start.path} needs it")
    model = None
    if dist_env.is_main:
        model = path.read_bytes() if start.path else _new_bpe(training)
        if not (start.path or training.config.dry_run):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_bytes(model)
    model, *_ = dist_env.gather_objects(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _new_bpe(training: Training) -> bytes:
    """Train a BPE model, or read the encoder's and warn about characters that it lacks."""
    texts, path = _training_texts(training), training.model.speech_encoder_bpe_path
    if path is None:
        return train_bpe(texts, training.model.vocab_size)
    bpe = read_bpe(path)
    case, unknown = case_of(bpe), bpe.unk_id()
    if count := sum(unknown in bpe.encode(case(text)) for text in texts):
        logging.warning(f"{count} training texts have characters that {path} lacks")
    return bpe.serialized_model_proto()


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model with icefall's ids: 0 blank, 2 unknown.

    Texts are not normalized: decoding the ids of a training text restores the text.

    Raises:
      InputError: `vocab_size` is below the number of characters.
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
            normalization_rule_name="identity",  # NFKC would change ½, ² and others
            user_defined_symbols=["<blk>", "<sos/eos>"],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"--vocab-size {vocab_size} is too small: {reason}") from None
    return model.getvalue()


def _training_texts(training: Training) -> Iterator[str]:
    """Yield the text of each training cut with a valid text, in the case selected by flags."""
    options = training.model
    case = str.upper if options.uppercase else str.lower if options.lowercase else str
    for path in training.data.train_paths:
        for cut in read_cuts(path):
            if not any(text_errors(cut)):
                yield _spaced(case(" ".join(s.text for s in cut.supervisions)))


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _describe(training: Training) -> Iterator[str]:
    start = find_start(training.config)
    bpe = prepare_bpe(training, start)
    size, pieces = training.model.encoder_size, bpe.vocab_size()
    encoder = make_encoder(training.model, pieces, start).to("meta")
    if training.config.activation_checkpointing:
        encoder.checkpoint_activations()

    def loss(model: CtcModel, batch: dict) -> Tensor:
        log_probs, _ = model(batch["features"].to("meta"), batch["feature_lens"])
        return log_probs.sum()  # torch has no CTC loss on "meta"

    origin = training.model.speech_encoder_path or "random parameters"
    yield f"Encoder: {size}, trainable, with a CTC head of {pieces} BPE pieces, from {origin}"
    yield from describe_training(training, CtcModel(encoder), loss, start)
