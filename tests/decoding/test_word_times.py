import itertools
import math

import pytest
import torch

from speechllm.decoding.word_times import (
    LAG,
    SECONDS_PER_LETTER,
    Span,
    WordTime,
    align_words,
    ctc_best_path,
    ctm_lines,
    words_with_times,
)
from speechllm.errors import InputError
from speechllm.zipformer.frontend import Frontend


def seconds(frame: int) -> float:
    return 0.055 + 0.04 * frame


def posteriors(path: str, vocab_size: int = 5) -> torch.Tensor:
    """`..1.2`: a column per frame, 0.9 for its token; `.` is blank."""
    tokens = torch.tensor([0 if c == "." else int(c) for c in path])
    probabilities = torch.full((len(path), vocab_size), 0.1 / (vocab_size - 1))
    probabilities[torch.arange(len(path)), tokens] = 0.9
    return probabilities.log()


def shown(path) -> str:
    return "".join("." if position < 0 else str(position) for position in path)


@pytest.mark.parametrize(
    "heard, target, expected",
    [
        ("..1..22.", [1, 2], "..0..11."),
        ("11.2", [1, 2], "00.1"),
        ("12", [1, 2], "01"),
        (".1.1.", [1, 1], ".0.1."),
        ("...", [], "..."),
        ("1", [1], "0"),
    ],
)
def test_the_path_is_the_one_heard(heard, target, expected):
    assert shown(ctc_best_path(posteriors(heard).numpy(), target)) == expected


def test_equal_neighbours_need_a_blank_between_them():
    path = shown(ctc_best_path(posteriors(".11.").numpy(), [1, 1]))
    assert path in ("0.1.", ".0.1")


def test_a_word_that_was_not_heard_goes_where_another_was():
    _, span, _ = align_words(posteriors("1...4..2"), [[1], [3], [2]])
    assert span.start == span.end == pytest.approx(seconds(4))
    assert span.log_prob == pytest.approx(math.log(0.025))


def collapse(path: tuple[int, ...]) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token]


@pytest.mark.parametrize("seed", range(30))
def test_no_path_that_says_the_target_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(6, 3, generator=generator)).log_softmax(dim=-1)
    target = torch.randint(1, 3, (seed % 4,), generator=generator).tolist()
    best = max(
        sum(log_probs[t, token].item() for t, token in enumerate(path))
        for path in itertools.product(range(3), repeat=6)
        if collapse(path) == target
    )
    found = ctc_best_path(log_probs.numpy(), target)
    tokens = [target[position] if position >= 0 else 0 for position in found]
    assert collapse(tuple(tokens)) == target
    assert sum(log_probs[t, token].item() for t, token in enumerate(tokens)) == pytest.approx(best)


def test_frames_that_deny_every_path_still_give_one():
    log_probs = torch.full((4, 3), -math.inf)
    log_probs[:, 0] = 0.0
    assert [span is None for span in align_words(log_probs, [[1], [2, 2]])] == [False, False]


def test_spans():
    log_probs = posteriors(".1.22.3.")
    log_probs[3, 2], log_probs[6, 3] = math.log(0.8), math.log(0.5)
    spans = align_words(log_probs, [[1, 2], [], [3]])
    assert spans[1] is None
    assert spans[0] == pytest.approx(Span(seconds(1), seconds(4), math.log(0.9)))
    assert spans[2] == pytest.approx(Span(seconds(6), seconds(6), math.log(0.5)))


@pytest.mark.parametrize("frames, fit", [(0, False), (3, False), (4, True)])
def test_words_that_do_not_fit_are_not_placed(frames, fit):
    spans = align_words(torch.zeros(frames, 5), [[1, 1], [2]])  # needs 1 . 1 2
    assert [span is not None for span in spans] == [fit, fit]
    words = words_with_times(torch.zeros(frames, 5), 0.3, ["ab", "c"], [[1, 1], [2]])
    assert [word.placed for word in words] == [fit, fit]
    if not fit:
        assert [word[1:3] for word in words] == [pytest.approx((0, 0.2)), pytest.approx((0.2, 0.3))]


def test_a_long_utterance_takes_milliseconds():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(750, 500, generator=generator).log_softmax(dim=-1)
    pieces = torch.randint(1, 500, (100, 3), generator=generator).tolist()
    spans = align_words(log_probs, pieces)
    starts_and_ends = [time for span in spans for time in span[:2]]
    assert starts_and_ends == sorted(starts_and_ends)
    assert 0 < starts_and_ends[0] and starts_and_ends[-1] < 750 * 0.04 + 0.055


def test_frame_times_follow_the_frontend():
    """Encoder frame 5 is the mean of frontend frames 10 and 11: what is in their middle?"""
    torch.manual_seed(0)
    frontend = Frontend(80, 16, 8).eval()
    features = torch.randn(1, 100, 80, requires_grad=True)
    frontend(features, torch.tensor([100]))[0][0, 10:12].abs().sum().backward()
    touched = features.grad[0].abs().sum(dim=1).nonzero().flatten()
    centre = (touched[0] + touched[-1]).item() / 2
    assert 0.01 * centre + 0.005 == pytest.approx(seconds(5))  # a frame is centred in its shift


HEARD = "....1.....2.......3...."
WORDS, PIECES = ["one", "two", "three"], [[1], [2], [3]]


def at(lag: float = 0.0, heard: str = HEARD, words=WORDS, pieces=PIECES):
    return words_with_times(posteriors(heard), 0.04 * len(heard) + 0.1, words, pieces, lag=lag)


def test_borders_divide_the_time_between_peaks_by_letters():
    one, two, three = at()
    assert one.end == two.start == pytest.approx(seconds(7))  # 3 and 3 letters: half way
    assert two.end == three.start == pytest.approx(seconds(10) + 8 * 0.04 * 3 / 8)
    usual = (0.24 / 3 + 0.32 / 4) / 2  # seconds per letter
    assert one.start == pytest.approx(seconds(4) - 1.5 * usual)
    assert three.end == pytest.approx(seconds(18) + 2.5 * usual)
    assert all(word.placed for word in (one, two, three))


def test_lag_moves_all_times():
    assert at(lag=LAG) == words_with_times(posteriors(HEARD), 1.0, WORDS, PIECES)  # the default
    for now, later in zip(at(), at(lag=0.05), strict=True):
        assert later.start == pytest.approx(now.start - 0.05)
        assert later.end == pytest.approx(now.end - 0.05)


def test_a_pause_belongs_to_no_word():
    one, two, three, four = at(
        heard="....1.....2" + 40 * "." + "3.....4....",
        words=["one", "two", "six", "ten"],
        pieces=[[1], [2], [3], [4]],
    )
    assert one.end == two.start and three.end == four.start
    assert two.end == pytest.approx(seconds(10) + 0.12)  # 1.5 letters of 0.08 s
    assert three.start == pytest.approx(seconds(51) - 0.12)


def test_a_single_word_is_as_long_as_its_letters():
    (word,) = at(words=["one"], pieces=[[1]], heard="....1.....")
    assert word.end - word.start == pytest.approx(3 * SECONDS_PER_LETTER)
    assert (word.start + word.end) / 2 == pytest.approx(seconds(4))


def test_words_without_pieces_lie_between_their_neighbours():
    words = at(words=["un", "one", "odd", "two", "end"], pieces=[[], [1], [], [2], []])
    assert [word.placed for word in words] == [False, True, False, True, False]
    assert all(a.end == b.start for a, b in itertools.pairwise(words))
    assert all(word.end > word.start for word in words)
    assert seconds(4) < words[2].start < words[2].end < seconds(10)


def test_no_words():
    assert words_with_times(posteriors("..."), 0.2, [], []) == []


@pytest.mark.parametrize("seed", range(40))
def test_times_never_overlap_nor_leave_the_utterance(seed):
    generator = torch.Generator().manual_seed(seed)
    frames = int(torch.randint(1, 30, (1,), generator=generator))
    log_probs = (4 * torch.randn(frames, 5, generator=generator)).log_softmax(dim=-1)
    sizes = torch.randint(0, 3, (8,), generator=generator).tolist()
    pieces = [torch.randint(1, 5, (n,), generator=generator).tolist() for n in sizes]
    words = [letter * (1 + k % 3) for k, letter in enumerate("abcdefgh")]
    duration = 0.04 * frames + 0.05
    found = words_with_times(log_probs, duration, words, pieces, lag=0.2 * (seed % 2))
    assert [word.word for word in found] == words
    times = [time for word in found for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] and times[-1] <= duration
    assert all(0 <= word.confidence <= 1 for word in found)


def test_confidence_is_the_mean_of_ctc_and_llm():
    log_probs = posteriors(".1.2.")
    log_probs[3, 2] = math.log(0.5)
    words, pieces = ["a", "b", "c"], [[1], [2], []]
    alone = words_with_times(log_probs, 0.3, words, pieces)
    assert [word.confidence for word in alone] == pytest.approx([0.9, 0.5, 0.0])
    llm = [math.log(0.7), math.log(0.1), math.log(0.4)]
    both = words_with_times(log_probs, 0.3, words, pieces, llm)
    assert [word.confidence for word in both] == pytest.approx([0.8, 0.3, 0.4])
    assert words_with_times(log_probs, 0.3, ["a"], [[1]], [1e-7])[0].confidence <= 1


def test_one_llm_log_prob_is_needed_for_each_word():
    with pytest.raises(ValueError):
        words_with_times(posteriors(".1.2."), 0.3, ["a", "b"], [[1], [2]], [0.0])


def test_ctm():
    words = [
        WordTime("call", 0.0504, 0.3, 0.95, True),
        WordTime("zoë", 0.3, 0.3, 0.25, False),
        WordTime("now", 0.3, 0.7126, 1.0, True),
    ]
    assert ctm_lines("rec-1", "A", 10.0, words) == [
        "rec-1 A 10.050 0.250 call 0.950",
        ";; not placed: zoë",
        "rec-1 A 10.300 0.000 zoë 0.250",
        "rec-1 A 10.300 0.413 now 1.000",
    ]
    assert ctm_lines("rec-1", "A", 0.0, []) == []


def test_rounded_times_do_not_overlap():
    words = [WordTime("a", 0.0004, 0.0015, 1.0, True), WordTime("b", 0.0015, 0.0027, 1.0, True)]
    first, second = (line.split() for line in ctm_lines("r", "1", 0.0, words))
    assert float(first[2]) + float(first[3]) == pytest.approx(float(second[2]))


@pytest.mark.parametrize(
    "recording, channel, word",
    [("a b", "1", "x"), ("a", "", "x"), ("a", "1", "x y"), ("a", "1", " x")],
)
def test_fields_with_spaces_are_refused(recording, channel, word):
    with pytest.raises(InputError, match="cannot be one field"):
        ctm_lines(recording, channel, 0.0, [WordTime(word, 0.0, 1.0, 1.0, True)])


def test_a_pause_between_two_words_is_no_part_of_them():
    log_probs = torch.full((150, 4), -9.0)
    log_probs[:, 0] = -0.01
    for frame, piece in ((25, 1), (125, 2)):  # at about 1 s and 5 s
        log_probs[frame, 0], log_probs[frame, piece] = -9.0, -0.01
    yes, no = words_with_times(log_probs, 6.0, ["yes", "no"], [[1], [2]])
    assert yes.end < 1.5 and no.start > 4.5
