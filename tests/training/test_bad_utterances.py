"""Counting what loaders left out, over ranks and epochs."""

import json
import threading

import pytest
import torch

from speechllm.cut_faults import Fault
from speechllm.training.bad_utterances import BadUtterances
from speechllm.training.distributed import Ranks


def fault(name, reason="not-finite"):
    return Fault(name, reason, f"cut {name} is broken")


def batch(*faults):
    return {"ids": ["good"], "bad": list(faults)}


@pytest.fixture
def listing(tmp_path):
    return tmp_path / "exp" / "bad-cuts.jsonl"


def listed(listing):
    return [json.loads(line)["id"] for line in listing.read_text().splitlines()]


def test_nothing_bad_leaves_nothing(listing):
    bad = BadUtterances(listing, 100, 0.0, Ranks())
    bad.note(batch())
    bad.check()
    assert not listing.exists() and bad.state_dict() == {}


def test_the_limit_is_a_share_of_the_epoch_and_each_epoch_counts_anew(listing, caplog):
    bad = BadUtterances(listing, 300, 0.01, Ranks(), {"no-text": 1})
    bad.note(batch(fault("a"), fault("b", "unreadable-audio")))
    bad.check()
    assert "1 no-text, 1 unreadable-audio, 1 not-finite of 300 utterances" in caplog.text
    assert "Left out (not-finite): cut a is broken" in caplog.text
    bad.start_epoch()
    bad.note(batch(fault("a"), fault("b", "unreadable-audio")))
    bad.check()
    assert listed(listing) == ["a", "b"]
    bad.note(batch(fault("c")))
    with pytest.raises(ValueError) as error:
        bad.check()
    assert str(error.value) == (
        "4 of 300 utterances are bad (1 no-text, 1 unreadable-audio, 2 not-finite), more than "
        f"--max-bad-fraction 0.01 allows, such as: cut c is broken; {listing} lists them"
    )
    assert listed(listing) == ["a", "b", "c"]


def test_without_tolerance_one_is_too_many(listing):
    bad = BadUtterances(listing, 10**6, 0.0, Ranks())
    bad.note(batch(fault("a")))
    with pytest.raises(ValueError, match="1 of 1000000 utterances are bad"):
        bad.check()


def test_counting_goes_on_from_a_checkpoint(listing, tmp_path):
    bad = BadUtterances(listing, 100, 0.02, Ranks(), {"no-text": 1})
    bad.note(batch(fault("a")))
    bad.check()
    torch.save(bad.state_dict(), tmp_path / "x.pt")
    other = BadUtterances(listing, 100, 0.02, Ranks(), {"no-text": 1})
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    other.note(batch(fault("b")))
    with pytest.raises(ValueError, match="3 of 100 utterances are bad"):
        other.check()


class Threads(Ranks):
    """Two ranks that are threads."""

    meeting, values = threading.Barrier(2), {}

    def sum(self, value):
        self.values[self.rank] = value.clone()
        self.meeting.wait()
        total = self.values[0] + self.values[1]
        self.meeting.wait()
        return total


def test_all_ranks_stop_alike(listing):
    said = {}

    def run(rank):
        bad = BadUtterances(listing, 100, 0.01, Threads(rank, 2))
        bad.note(batch(fault(f"a{rank}")))
        try:
            bad.check()
        except ValueError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(said[rank].startswith("2 of 100 utterances are bad") for rank in range(2))
    assert sorted(listed(listing)) == ["a0", "a1"]
