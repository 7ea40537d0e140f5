"""InvalidUtteranceTracker: counts over ranks and epochs, the list, and the limit."""

import json
import threading

import pytest

from speechllm.data.validation import CutError
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.training.invalid_utterances import InvalidUtteranceTracker


def error(name, reason="not-finite"):
    return CutError(name, reason, f"cut {name} is broken")


def batch(*errors):
    return {"cut_ids": ["good"], "invalid": list(errors)}


@pytest.fixture
def listing(tmp_path):
    return tmp_path / "exp" / "invalid-cuts.jsonl"


def listed(listing):
    return [json.loads(line)["id"] for line in listing.read_text().splitlines()]


def test_the_limit_is_a_fraction_of_each_epoch(listing, caplog):
    tracker = InvalidUtteranceTracker(listing, 300, 0.01, DistEnv(), [[error("s", "no-text")]])
    for _ in range(2):
        tracker.start_epoch()
        tracker.add(batch(error("a"), error("b", "unreadable-audio")))
        tracker.check()
    line = "3 of 300 utterances in this epoch (1 no-text, 1 unreadable-audio, 1 not-finite)"
    assert f"Skipped {line}" in caplog.text
    assert "Skipped (not-finite): cut a is broken" in caplog.text
    assert listed(listing) == ["a", "b"]
    tracker.add(batch(error("c")))
    with pytest.raises(InputError) as raised:
        tracker.check()
    assert str(raised.value) == (
        "4 of 300 utterances are invalid (1 no-text, 1 unreadable-audio, 2 not-finite), more than "
        f"--max-invalid-fraction 0.01 allows, e.g. cut c is broken; {listing} lists them"
    )
    assert listed(listing) == ["a", "b", "c"]


def test_counts_continue_from_a_checkpoint(listing):
    tracker, other = (
        InvalidUtteranceTracker(listing, 100, 0.02, DistEnv(), [[error("s", "no-text")]])
        for _ in range(2)
    )
    tracker.add(batch(error("a")))
    tracker.check()
    other.load_state_dict(tracker.state_dict())
    other.add(batch(error("b")))
    with pytest.raises(InputError, match="3 of 100 utterances are invalid"):
        other.check()


class Threads(DistEnv):
    """Two ranks that are threads."""

    meeting, values = threading.Barrier(2), {}

    def sum(self, value):
        self.values[self.rank] = value.clone()
        self.meeting.wait()
        total = self.values[0] + self.values[1]
        self.meeting.wait()
        return total


def test_all_ranks_raise_together(listing):
    messages = {}

    def run(rank):
        tracker = InvalidUtteranceTracker(listing, 100, 0.01, Threads(rank, 2))
        tracker.add(batch(error(f"a{rank}")))
        try:
            tracker.check()
        except InputError as raised:
            messages[rank] = str(raised)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(messages[rank].startswith("2 of 100 utterances are inv") for rank in range(2))
    assert sorted(listed(listing)) == ["a0", "a1"]
