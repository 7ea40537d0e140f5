"""TrainConfig and EncoderConfig: options of the training programs, except data and model."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from speechllm.cli import check_range, comma_list, flag_name, option, spelled
from speechllm.errors import InputError
from speechllm.models.zipformer.config import (
    OFFLINE,
    SIZES,
    Chunking,
    ZipformerConfig,
    parse_chunkings,
)

_training = partial(option, group="training")
_trainable = partial(option, group="trainable parameters")
_optimizer = partial(option, group="optimizer")
_memory = partial(option, group="precision and memory")
_checkpoints = partial(option, group="checkpoints")
_logging = partial(option, group="logging and diagnostics")
_encoder = partial(option, group="encoder")
LR_FACTORS = ("projector_lr", "lora_lr", "encoder_lr")  # relative to base_lr
# fmt: off


@dataclass(frozen=True)
class TrainConfig:
    """Options of train.py and pretrain_encoder.py.

    Raises:
      InputError: a value is out of range, or options contradict each other.
    """

    exp_dir: Path = _training(
        Path("exp/asr_librispeech_zipformer_qwen2_1.5B"),
        "directory for checkpoints, logs and tensorboard files")
    num_epochs: int = _training(10, "train up to this epoch")
    world_size: int | None = _training(
        None, "number of processes; ignored under torchrun", unset="one per GPU, at most 4")
    master_port: int = _training(12354, "port for DDP on one machine")
    grad_accum: int = _training(
        1, "batches per process and optimizer step, equivalent to one large batch")
    dry_run: bool = _training(
        False, "check everything and print trainable parameters, data and a memory estimate; write "
        "nothing")
    seed: int = _training(42, "seed for data order, augmentation and dropout")

    pretrained_model_path: str | None = _trainable(
        None, "initialize the trainable parameters from this checkpoint")
    freeze_projector: bool = _trainable(
        False, "train only LoRA, the LLM or the encoders; use the projectors of "
        "--pretrained-model-path")
    encoder_feature_mask: bool = _trainable(
        True, "mask encoder channels in training, as in the published models")
    deepspeed: Path | None = _trainable(
        None, "ZeRO configuration, such as local/deepspeed_zero2.json")

    optimizer: str = _optimizer("scaled_adam", "optimizer", choices=("scaled_adam", "adamw"))
    base_lr: float = _optimizer(
        0.01, "learning rate; the default is for scaled_adam, adamw needs a lower value")
    projector_lr: float = _optimizer(1.0, "learning rate of the projectors, times --base-lr")
    lora_lr: float = _optimizer(1.0, "learning rate of the LoRA matrices, times --base-lr")
    encoder_lr: float = _optimizer(1.0, "learning rate of the encoders, times --base-lr")
    betas: str | None = _optimizer(
        None, "decay rates of the optimizer's two moving averages",
        unset="0.9,0.98 for scaled_adam, 0.9,0.999 for adamw")
    weight_decay: float | None = _optimizer(None, "weight decay of adamw", unset="0.01")
    max_grad_norm: float = _optimizer(
        0.0, "with adamw: clip the gradient norm to this value; 0: no clipping")
    projector_dropout: float = _optimizer(
        0.1, "dropout before the projectors; with little training data, 0.5 helps")
    label_smoothing: float = _optimizer(
        0.0, "fraction of each label's probability to spread over all tokens, in training only")
    token_ctc_weight: float = _optimizer(
        0.0, "weight of a CTC loss over the LLM's tokens, which aligns speech and text embeddings; "
        "useful with little training data, such as 1")
    lr_schedule: str = _optimizer(
        "fixed", "learning rate schedule; linear and cosine reach 0 at the end of training",
        choices=("fixed", "eden", "linear", "cosine"))
    lr_batches: float = _optimizer(7500.0, "Eden: batches before the decay")
    lr_epochs: float = _optimizer(3.5, "Eden: epochs before the decay")
    warmup_batches: float = _optimizer(500.0, "warm-up batches of eden, linear and cosine")

    use_fp16: bool | None = _memory(
        None, "autocast to float16 with a gradient scaler", unset="true on a GPU")
    use_bf16: bool | None = _memory(
        None, "autocast to bfloat16; takes precedence over --use-fp16",
        unset="true for large LLMs on a CPU with instructions for it, without --use-fp16")
    use_flash_attn: bool = _memory(False, "use flash-attn instead of torch's SDPA")
    activation_checkpointing: bool = _memory(
        False, "recompute trainable layers in the backward pass: less memory, a third more time")
    compile: bool = _memory(False, "compile the layers with torch.compile")
    scan_oom: bool | None = _memory(
        None, "before training, check that the largest batches fit into memory",
        unset="true on a GPU")

    resume: str = _checkpoints(
        "auto", "auto: resume from the newest loadable checkpoint in --exp-dir; must: fail if "
        "there is none; never: archive the checkpoints after the starting point",
        choices=("auto", "never", "must"))
    start_epoch: int = _checkpoints(1, "above 1: resume from epoch-(N-1).pt or a newer checkpoint")
    save_every_n: int = _checkpoints(
        0, "write checkpoint-<step>.pt every N steps; 0: never")
    save_every_minutes: float = _checkpoints(
        30.0, "write checkpoint-<step>.pt every N minutes; 0: never")
    keep_last_k: int = _checkpoints(5, "number of checkpoint-<step>.pt files to keep")

    log_interval: int = _logging(50, "steps between log lines")
    valid_interval: int = _logging(5000, "steps between validations")
    valid_decode: int = _logging(
        0, "number of utterances to decode in each validation; their WER is logged, and the model "
        "with the lowest WER is saved as best-valid-wer.pt; 0: none")
    patience: int = _logging(
        0, "stop after this number of consecutive validations without a lower WER (without "
        "--valid-decode: a lower loss); 0: never")
    tensorboard: bool = _logging(True, "write tensorboard files")
    inf_check: bool = _logging(False, "stop at the first module whose output is not finite")
    max_skipped_steps: int = _logging(
        20, "stop training after this number of skipped steps (non-finite loss or gradients, out "
        "of memory), not counting 1 in 100")

    def __post_init__(self):
        for name in ("start_epoch", "num_epochs", "log_interval", "valid_interval", "grad_accum",
                     "keep_last_k"):
            check_range(name, getattr(self, name), 1)
        for name in ("save_every_n", "save_every_minutes", "max_skipped_steps", "base_lr",
                     "weight_decay", "max_grad_norm", "token_ctc_weight", "valid_decode",
                     "patience"):
            check_range(name, getattr(self, name), 0)
        for name in ("lr_batches", "lr_epochs", *LR_FACTORS):
            check_range(name, getattr(self, name), 0, above=True)
        for name in ("label_smoothing", "projector_dropout"):
            check_range(name, getattr(self, name), 0, 0.99)
        self._check_optimizer()
        if self.start_epoch > self.num_epochs + 1:
            raise InputError(
                f"--start-epoch {self.start_epoch} is beyond --num-epochs {self.num_epochs}")
        if self.pretrained_model_path and self.start_epoch > 1:
            raise InputError(
                f"--start-epoch {self.start_epoch} resumes this run and cannot be combined "
                f"with --pretrained-model-path {self.pretrained_model_path}")
        if self.freeze_projector and self.start_epoch == 1 and not self.pretrained_model_path:
            raise InputError(
                "--freeze-projector true needs --pretrained-model-path: a new projector is random")
        if self.deepspeed:
            self._check_deepspeed()

    @property
    def adam_betas(self) -> tuple[float, float] | None:
        """Values of --betas; None for the optimizer's defaults."""
        if self.betas is None:
            return None
        try:
            first, second = map(float, comma_list(self.betas))
        except ValueError:
            first = second = -1.0
        if not (0 <= first < 1 and 0 <= second < 1):
            raise InputError(
                f"--betas {self.betas} must be two numbers from 0 to below 1, such as 0.9,0.98")
        return first, second

    def _check_optimizer(self) -> None:
        if self.optimizer == "scaled_adam":
            if self.weight_decay is not None:
                raise InputError(f"--weight-decay {self.weight_decay:g} needs --optimizer adamw")
            if self.max_grad_norm:
                raise InputError(
                    f"--max-grad-norm {self.max_grad_norm:g} needs --optimizer adamw: scaled_adam "
                    "clips relative to the median of recent norms")
        self.adam_betas  # raises InputError if invalid

    def _check_deepspeed(self) -> None:
        if self.optimizer != "adamw":
            raise InputError(
                f"--deepspeed needs --optimizer adamw: --optimizer {self.optimizer} needs whole "
                "parameters, and ZeRO shards them")
        if self.max_grad_norm:
            raise InputError(
                f"--max-grad-norm {self.max_grad_norm:g}: set gradient_clipping in the file of "
                "--deepspeed instead")
        unsupported = (*LR_FACTORS, "freeze_projector", "valid_decode")
        for name in unsupported:
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default:
                raise InputError(f"--deepspeed does not support {flag_name(name)} {spelled(value)}")


@dataclass(frozen=True)
class EncoderConfig:
    """Encoder options of pretrain_encoder.py.

    Raises:
      InputError: a value is out of range.
    """

    speech_encoder_path: Path | None = _encoder(
        None, "checkpoint of an encoder with a CTC head to fine-tune, of size --encoder-size",
        unset="train from scratch")
    speech_encoder_bpe_path: Path | None = _encoder(
        None, "BPE model of --speech-encoder-path, which is kept: --vocab-size, --uppercase and "
        "--lowercase have no effect")
    encoder_size: str = _encoder(
        "medium", "encoder size (models/zipformer/config.py)", choices=SIZES)
    causal: bool = _encoder(False, "train a streaming encoder, which uses no future chunks")
    chunk_size: str | None = _encoder(
        None, "causal: 20 ms frames per chunk, sampled per batch; -1: whole utterances",
        unset="16,32,64,-1")
    left_context_frames: str | None = _encoder(
        None, "causal: 20 ms frames of left context per chunk, sampled per batch; -1: all",
        unset="64,128,256,-1")
    vocab_size: int = _encoder(500, "maximum number of BPE pieces; small corpora give fewer")
    uppercase: bool = _encoder(False, "upper-case the texts, as for the published encoders")
    lowercase: bool = _encoder(False, "lower-case the texts; by default their case is kept")
    dropout: float = _encoder(0.1, "dropout in the encoder and before the CTC head")
    flat_start_batches: int = _encoder(
        400, "number of initial batches trained on evenly spaced tokens instead of with CTC; 0 "
        "with --speech-encoder-path")
    avg: int = _encoder(5, "number of final epochs to average into pretrained.pt")
    test_cuts: str | None = _encoder(
        None, "cut files to decode with greedy CTC and score at the end")

    def __post_init__(self):
        check_range("avg", self.avg, 1)
        if bool(self.speech_encoder_path) != bool(self.speech_encoder_bpe_path):
            raise InputError("--speech-encoder-path and --speech-encoder-bpe-path need each other")
        for name in ("chunk_size", "left_context_frames"):
            if getattr(self, name) and not self.causal:
                raise InputError(f"{flag_name(name)} {getattr(self, name)} needs --causal true")
        if self.causal:
            for chunking in self.chunkings:
                chunking.check(self.size)
        if self.uppercase and self.lowercase:
            raise InputError("--uppercase true and --lowercase true are mutually exclusive")

    @property
    def size(self) -> ZipformerConfig:
        """The encoder's dimensions."""
        return replace(SIZES[self.encoder_size], causal=self.causal)

    @property
    def chunkings(self) -> tuple[Chunking, ...]:
        """Chunkings to sample from in training; validation uses the last."""
        if not self.causal:
            return (OFFLINE,)
        sizes, left = self.chunk_size or "16,32,64,-1", self.left_context_frames
        return parse_chunkings(sizes, left or "64,128,256,-1")
