"""CheckpointConfig and SearchConfig: options for the trained model and for the search."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from speechllm.cli import check_range, comma_list, flag_name, option
from speechllm.errors import InputError
from speechllm.models.config import MAX_NEW_TOKENS

HOTWORD_SCORE = 2.0
BEAM_SIZE = 4
LAG = 0.03  # s; delay of the CTC spikes of encoders trained from a flat start
EXP_DIR = Path("exp/asr_librispeech_zipformer_qwen2_1.5B")

_model = functools.partial(option, group="trained model")
_search = functools.partial(option, group="search")


@dataclass(frozen=True)
class CheckpointConfig:
    """Parameters of a trained model: --exp-dir with --epoch, --iter or --checkpoint."""

    exp_dir: Path = _model(EXP_DIR, "directory of the checkpoints, or an exported model")
    epoch: int = _model(0, "last epoch to average; 0: the newest in --exp-dir")
    iter: int = _model(0, "above 0: average checkpoint-<step>.pt files up to this step, not epochs")
    avg: int = _model(0, "number of epochs or checkpoints to average; 0: up to 5")
    checkpoint: str | None = _model(None, "file in --exp-dir; replaces --epoch and --avg")
    use_encoders: str | None = _model(None, "encoders to use, such as 1,3", unset="all")
    use_fp16: bool | None = _model(None, "decode in float16", unset="true on a GPU")
    use_bf16: bool = _model(False, "decode in bfloat16; takes precedence over --use-fp16")
    use_flash_attn: bool = _model(False, "use flash-attn instead of torch's SDPA")

    def encoder_indices(self, num_encoders: int) -> list[int]:
        """Return the 0-based encoders selected by --use-encoders: `1,3` -> [0, 2].

        Raises:
          InputError: an encoder does not exist or is named twice.
        """
        possible = [str(k) for k in range(1, num_encoders + 1)]
        numbers = possible if self.use_encoders is None else comma_list(self.use_encoders)
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(possible):
            raise InputError(
                f"--use-encoders {self.use_encoders}: the model has encoders {', '.join(possible)}"
            )
        return [int(number) - 1 for number in numbers]


@dataclass(frozen=True)
class SearchConfig:
    """Search method and its options; `resolve` sets those that depend on the model.

    Raises:
      InputError: a value is out of range, or options contradict each other.
    """

    method: str | None = _search(
        None, "draft: speculative decoding with the CTC text, same output as greedy; beam: the "
        "default with --beam-size above 1", choices=("draft", "greedy", "beam"),
        unset="draft with a CTC head and a BPE model, else greedy",
    )  # fmt: skip
    beam_size: int | None = _search(None, "beam size of --method beam", unset=str(BEAM_SIZE))
    nbest: int = _search(1, "above 1: number of hypotheses to write to nbest-*.jsonl")
    ctc_weight: float = _search(
        0.0, "weight of the CTC log-probability (0 to 1) in the choice among the beam's hypotheses"
    )
    draft_accept_prob: float = _search(
        1.0, "below 1: also accept draft tokens that have at least this probability for the LLM"
    )
    forward_cost: int | None = _search(
        None, "cost of an LLM forward pass, in tokens, which determines the length of proposals",
        unset="by device, dtype and size of the LLM",
    )  # fmt: skip
    ctc_bypass_entropy: float = _search(
        0.0, "use the CTC text without the LLM if every frame's entropy is below this (in nats)"
    )
    guard: str | None = _search(
        None, "stop: end repetitions and list suspicious utterances; fallback: also decode these "
        "again with beam search and CTC, or use the CTC text",
        choices=("stop", "fallback", "off"), unset="stop; fallback in transcribe.py and serve.py",
    )  # fmt: skip
    word_timestamps: bool = _search(True, "write word times (needs a CTC head)")
    ctc_lag: float = _search(LAG, "delay of the CTC spikes in seconds, subtracted from word times")
    hotwords: Path | None = _search(
        None, "file of phrases to favor where the CTC posteriors allow them, one per line"
    )
    hotword: tuple[str, ...] = _search((), "a phrase to add to --hotwords; repeatable")
    hotword_score: float = _search(HOTWORD_SCORE, "bonus per hotword token, in nats")
    max_new_tokens: int = _search(MAX_NEW_TOKENS, "maximum tokens per hypothesis")

    def __post_init__(self):
        check_range("beam_size", self.beam_size, 1)
        check_range("nbest", self.nbest, 1, self.beam_size or BEAM_SIZE)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        check_range("ctc_weight", self.ctc_weight, 0, 1)
        check_range("draft_accept_prob", self.draft_accept_prob, 0, 1)
        check_range("forward_cost", self.forward_cost, 1)
        check_range("ctc_bypass_entropy", self.ctc_bypass_entropy, 0)
        check_range("hotword_score", self.hotword_score, 0)
        method = self._method(has_ctc=True)
        if method != "beam" and self._beam_options:
            raise InputError(f"--method {method} has no beam: {self._beam_options[0]}")
        if method != "draft" and self.draft_accept_prob < 1:
            raise InputError(
                f"--method {method} has no draft: --draft-accept-prob {self.draft_accept_prob:g}"
            )

    @property
    def ctc_options(self) -> list[str]:
        """Options in use that need a CTC head; only for a resolved config."""
        options = (
            ("--method draft", self.method == "draft"),
            ("--ctc-weight", self.ctc_weight),
            ("--ctc-bypass-entropy", self.ctc_bypass_entropy),
            ("--guard fallback", self.guard == "fallback"),
        )
        return [flag for flag, is_used in options if is_used]

    @property
    def _beam_options(self) -> list[str]:
        """Options in use that need a beam."""
        least = {"beam_size": 1, "nbest": 1, "ctc_weight": 0}
        values = {name: getattr(self, name) or 0 for name in least}
        return [f"{flag_name(name)} {x}" for name, x in values.items() if x > least[name]]

    def _method(self, has_ctc: bool) -> str:
        needs_beam = self._beam_options or (not has_ctc and (self.hotwords or self.hotword))
        return self.method or ("beam" if needs_beam else "draft" if has_ctc else "greedy")

    def resolve(self, has_ctc: bool, default_guard: str = "stop") -> "SearchConfig":
        """Return the config with method, beam size and guard set.

        Args:
          has_ctc: true if an encoder has a CTC head and a BPE model.
          default_guard: default of --guard with CTC; without CTC, it is "stop".
        """
        method = self._method(has_ctc)
        beam_size = (self.beam_size or BEAM_SIZE) if method == "beam" else 1
        guard = self.guard or (default_guard if has_ctc else "stop")
        return dataclasses.replace(self, method=method, beam_size=beam_size, guard=guard)

    @property
    def name(self) -> str:
        """Component of result file names; only for a resolved config."""
        parts = (
            (True, f"beam{self.beam_size}" if self.method == "beam" else self.method),
            (self.nbest > 1, f"nbest{self.nbest}"),
            (self.ctc_weight, f"ctc{self.ctc_weight:g}"),
            (self.draft_accept_prob < 1, f"relaxed{self.draft_accept_prob:g}"),
            (self.ctc_bypass_entropy, f"confident{self.ctc_bypass_entropy:g}"),
            (self.guard != "stop", f"guard-{self.guard}"),
            (self.hotwords or self.hotword, "hotwords"),
            (self.hotwords, self.hotwords and self.hotwords.stem),
            (self.hotword_score != HOTWORD_SCORE, f"score{self.hotword_score:g}"),
        )
        return "-".join(part for is_used, part in parts if is_used)
