"""CTC paths, word times and confidences, and CTM lines."""

import itertools
import math

import pytest
import torch

from speechllm.decoding.word_times import (
    Span,
    Word,
    align_words,
    ctc_best_paths,
    ctm_lines,
    time_words,
)
from speechllm.models.zipformer.frontend import Frontend


def seconds(frame: int) -> float:
    return 0.055 + 0.04 * frame


def posteriors(path: str, vocab_size: int = 5) -> torch.Tensor:
    """`..1.2`: a column per frame, 0.9 for its token; `.` is blank."""
    tokens = torch.tensor([0 if c == "." else int(c) for c in path])
    probabilities = torch.full((len(path), vocab_size), 0.1 / (vocab_size - 1))
    probabilities[torch.arange(len(path)), tokens] = 0.9
    return probabilities.log()


def align(log_probs, pieces):
    return align_words([log_probs], [pieces])[0]


def align_transcript(log_probs, duration, words, pieces, llm_log_probs=None, **options):
    return time_words(align(log_probs, pieces), duration, words, llm_log_probs, **options)


def collapse(path: tuple[int, ...]) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token]


@pytest.mark.parametrize("seed", range(12))
def test_viterbi_finds_the_best_of_all_paths(seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(6, 3, generator=generator)).log_softmax(dim=-1)
    target = torch.randint(1, 3, (seed % 4,), generator=generator).tolist()
    best = max(
        sum(log_probs[t, token].item() for t, token in enumerate(path))
        for path in itertools.product(range(3), repeat=6)
        if collapse(path) == target
    )
    [found] = ctc_best_paths([log_probs.numpy()], [target])
    tokens = [target[position] if position >= 0 else 0 for position in found]
    assert collapse(tuple(tokens)) == target
    assert sum(log_probs[t, token].item() for t, token in enumerate(tokens)) == pytest.approx(best)


def test_a_batch_is_aligned_like_its_utterances():
    generator = torch.Generator().manual_seed(0)
    cases = [(7, [[1, 2], [3]]), (30, [[1], [], [2, 2]]), (2, [[1, 1]]), (12, [[]]), (1, [[4]])]
    log_probs = [torch.randn(n, 5, generator=generator).log_softmax(dim=1) for n, _ in cases]
    pieces = [words for _, words in cases]
    assert align_words(log_probs, pieces) == list(map(align, log_probs, pieces))
    assert align_words([], []) == []


def test_spans_have_first_and_last_frame():
    log_probs = posteriors(".1.22.3.")
    log_probs[3, 2], log_probs[6, 3] = math.log(0.8), math.log(0.5)
    spans = align(log_probs, [[1, 2], [], [3]])
    assert spans[1] is None
    assert spans[0] == pytest.approx(Span(seconds(1), seconds(4), math.log(0.9)))
    assert spans[2] == pytest.approx(Span(seconds(6), seconds(6), math.log(0.5)))


@pytest.mark.parametrize("frames, fit", [(0, False), (3, False), (4, True)])
def test_words_that_do_not_fit_are_not_aligned(frames, fit):
    spans = align(torch.zeros(frames, 5), [[1, 1], [2]])  # needs 1 . 1 2
    assert [span is not None for span in spans] == [fit, fit]
    if not fit:
        words = align_transcript(torch.zeros(frames, 5), 0.3, ["ab", "c"], [[1, 1], [2]])
        times = [(word.start, word.end) for word in words]
        assert times == [pytest.approx((0, 0.2)), pytest.approx((0.2, 0.3))]


def test_frame_times_follow_the_frontend():
    """Encoder frame 5 is the mean of frontend frames 10 and 11: the centre of their inputs."""
    torch.manual_seed(0)
    frontend = Frontend(80, 16, 8).eval()
    features = torch.randn(1, 100, 80, requires_grad=True)
    frontend(features, torch.tensor([100]))[0][0, 10:12].abs().sum().backward()
    touched = features.grad[0].abs().sum(dim=1).nonzero().flatten()
    centre = (touched[0] + touched[-1]).item() / 2
    assert 0.01 * centre + 0.005 == pytest.approx(seconds(5))  # a frame is centred in its shift


EMITTED = "....1.....2.......3...."
WORDS, PIECES = ["one", "two", "three"], [[1], [2], [3]]


def at(lag: float = 0.0, emitted: str = EMITTED, words=WORDS, pieces=PIECES):
    return align_transcript(posteriors(emitted), 0.04 * len(emitted) + 0.1, words, pieces, lag=lag)


def test_borders_divide_the_time_between_spikes_by_letters():
    one, two, three = at()
    assert one.end == two.start == pytest.approx(seconds(7))  # 3 and 3 letters: half way
    assert two.end == three.start == pytest.approx(seconds(10) + 8 * 0.04 * 3 / 8)
    usual = (0.24 / 3 + 0.32 / 4) / 2  # seconds per letter
    assert one.start == pytest.approx(seconds(4) - 1.5 * usual)
    assert three.end == pytest.approx(seconds(18) + 2.5 * usual)
    assert all(word.aligned for word in (one, two, three))


def test_a_pause_is_not_part_of_a_word():
    one, two, three, four = at(
        emitted="....1.....2" + 40 * "." + "3.....4....",
        words=["one", "two", "six", "ten"],
        pieces=[[1], [2], [3], [4]],
    )
    assert one.end == two.start and three.end == four.start
    assert two.end == pytest.approx(seconds(10) + 0.12)  # 1.5 letters of 0.08 s
    assert three.start == pytest.approx(seconds(51) - 0.12)


def test_words_without_pieces_lie_between_their_neighbours():
    words = at(words=["un", "one", "odd", "two", "end"], pieces=[[], [1], [], [2], []])
    assert [word.aligned for word in words] == [False, True, False, True, False]
    assert all(a.end == b.start for a, b in itertools.pairwise(words))
    assert all(word.end > word.start for word in words)
    assert seconds(4) < words[2].start < words[2].end < seconds(10)


@pytest.mark.parametrize("seed", range(12))
def test_times_never_overlap_nor_leave_the_utterance(seed):
    generator = torch.Generator().manual_seed(seed)
    frames = int(torch.randint(1, 30, (1,), generator=generator))
    log_probs = (4 * torch.randn(frames, 5, generator=generator)).log_softmax(dim=-1)
    sizes = torch.randint(0, 3, (8,), generator=generator).tolist()
    pieces = [torch.randint(1, 5, (n,), generator=generator).tolist() for n in sizes]
    words = [letter * (1 + k % 3) for k, letter in enumerate("abcdefgh")]
    duration = 0.04 * frames + 0.05
    found = align_transcript(log_probs, duration, words, pieces, lag=0.2 * (seed % 2))
    assert [word.text for word in found] == words
    times = [time for word in found for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] and times[-1] <= duration
    assert all(0 <= word.confidence <= 1 for word in found)


def test_confidence_is_the_mean_of_ctc_and_llm():
    log_probs = posteriors(".1.2.")
    log_probs[3, 2] = math.log(0.5)
    words, pieces = ["a", "b", "c"], [[1], [2], []]
    alone = align_transcript(log_probs, 0.3, words, pieces)
    assert [word.confidence for word in alone] == pytest.approx([0.9, 0.5, 0.0])
    llm = [math.log(0.7), math.log(0.1), math.log(0.4)]
    both = align_transcript(log_probs, 0.3, words, pieces, llm)
    assert [word.confidence for word in both] == pytest.approx([0.8, 0.3, 0.4])
    assert align_transcript(log_probs, 0.3, ["a"], [[1]], [1e-7])[0].confidence <= 1


def test_ctm_lines():
    words = [
        Word(10.0504, 10.3005, "call", 0.95),
        Word(10.3005, 10.3005, "zoë", 0.25, aligned=False),
        Word(10.3005, 10.7126, "now", 1.0),
    ]
    assert ctm_lines("rec-1", "A", words) == [  # rounded times do not overlap
        "rec-1 A 10.050 0.250 call 0.950",
        ";; not aligned: zoë",
        "rec-1 A 10.300 0.000 zoë 0.250",
        "rec-1 A 10.300 0.413 now 1.000",
    ]
