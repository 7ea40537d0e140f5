"""How to search for a transcript, and the flags that say it."""

import argparse
import re
from dataclasses import dataclass, fields

from speechllm.decoding.word_times import LAG
from speechllm.errors import InputError
from speechllm.flags import str2bool

MAX_NEW_TOKENS = 200
BEAM_SIZE = 4


@dataclass(frozen=True)
class SearchOptions:
    """How to write; the name says it in files."""

    method: str = "greedy"  # draft, greedy or beam
    beam_size: int = 1
    nbest: int = 1
    ctc_weight: float = 0.0  # of the CTC log-probability in the choice among the n best
    accept: float = 1.0  # a draft's token is taken at this probability
    ctc_confident: float = 0.0  # below this entropy the CTC text is taken
    guard: str = "stop"  # stop, fallback or off
    word_times: bool = True  # where there is a CTC head
    ctc_lag: float = LAG  # s, see word_times
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def name(self) -> str:
        parts = [self.method if self.method != "beam" else f"beam{self.beam_size}"]
        if self.nbest > 1:
            parts.append(f"nbest{self.nbest}")
        if self.ctc_weight:
            parts.append(f"ctc{self.ctc_weight:g}")
        if self.accept < 1:
            parts.append(f"relaxed{self.accept:g}")
        if self.ctc_confident:
            parts.append(f"confident{self.ctc_confident:g}")
        if self.guard != "stop":
            parts.append(f"guard-{self.guard}")
        return "-".join(parts)


def add_search_arguments(parser: argparse.ArgumentParser, usual_guard: str = "stop") -> None:
    """What `search_options` reads.

    Args:
      usual_guard: without --guard, where there is a CTC head.
    """
    parser.set_defaults(usual_guard=usual_guard)
    add = parser.add_argument_group("search").add_argument
    add("--method", choices=["draft", "greedy", "beam"],
        help="draft (the default where an encoder has a CTC head and a BPE model): greedy, faster "
        "by verifying the CTC text; beam: the default with --beam-size above 1")  # fmt: skip
    add("--beam-size", type=int, help=f"hypotheses kept by --method beam, {BEAM_SIZE} by default")
    add("--nbest", type=int, default=1, help="how many of them to write to nbest-*.jsonl")
    add("--ctc-weight", type=float, default=0.0,
        help="from 0 to 1: of the CTC log-probability in the choice among the beam's")  # fmt: skip
    add("--accept", type=acceptance, default="exact",
        help="exact: of a draft only the LLM's own choices; relaxed:P: also tokens that it gives "
        "at least probability P")  # fmt: skip
    add("--ctc-confident", type=float, default=0.0,
        help="take the CTC text, without the LLM, where the entropy of every frame is below this "
        "(nats)")  # fmt: skip
    without = "" if usual_guard == "stop" else ", stop without a CTC head"
    add("--guard", choices=["stop", "fallback", "off"],
        help="stop: end loops, list what to distrust; fallback: decode that anew by beam search "
        "with CTC, and take the CTC text where this is no better "
        f"(default: {usual_guard}{without})")  # fmt: skip
    add("--word-times", type=str2bool, default=True,
        help="where there is a CTC head, write when each word was said")  # fmt: skip
    add("--ctc-lag", type=float, default=LAG,
        help="seconds by which this encoder's CTC head is late to say a word")  # fmt: skip
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest hypothesis, in tokens")


def acceptance(text: str) -> float:
    """`exact` or `relaxed:0.3` to a probability."""
    if text == "exact":
        return 1.0
    found = re.fullmatch(r"relaxed:(0?\.\d+|0|1|1\.0*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither exact nor relaxed:P, 0 <= P <= 1")
    return float(found[1])


def search_options(args, can_draft: bool) -> SearchOptions:
    """What the flags ask for.

    Raises:
      ValueError: a value is out of range, or flags contradict each other.
    """
    for flag, value, low, high in (
        ("--beam-size", args.beam_size, 1, None),
        ("--nbest", args.nbest, 1, args.beam_size or BEAM_SIZE),
        ("--max-new-tokens", args.max_new_tokens, 1, None),
        ("--ctc-weight", args.ctc_weight, 0, 1),
        ("--ctc-confident", args.ctc_confident, 0, None),
    ):
        if value is not None and not (low <= value and (high is None or value <= high)):
            between = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"{flag} {value} must be {between}")
    needs_beam = [
        f"{flag} {value}"
        for flag, value, least in (
            ("--beam-size", args.beam_size or 1, 1),
            ("--nbest", args.nbest, 1),
            ("--ctc-weight", args.ctc_weight, 0),
        )
        if value > least
    ]
    method = args.method or ("beam" if needs_beam else "draft" if can_draft else "greedy")
    if method != "beam" and needs_beam:
        raise InputError(f"--method {method} has no beam: {needs_beam[0]}")
    if method != "draft" and args.accept < 1:
        raise InputError(f"--method {method} has no draft: --accept relaxed:{args.accept:g}")
    beam_size = (args.beam_size or BEAM_SIZE) if method == "beam" else 1
    given = {field.name: getattr(args, field.name) for field in fields(SearchOptions)}
    guard = args.guard or (args.usual_guard if can_draft else "stop")
    return SearchOptions(**given | {"method": method, "beam_size": beam_size, "guard": guard})
