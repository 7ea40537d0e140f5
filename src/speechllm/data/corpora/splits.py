"""Assignment of utterances to splits by speaker."""

import logging
import random
from collections import defaultdict

from lhotse.cut import Cut

from speechllm.data.corpora.utterance import Utterance

TRAIN = "train"
HELD_OUT = {"dev": 0.1, "test": 0.1}  # fraction of the duration
SPLIT_SEED = 42

logger = logging.getLogger(__name__)


def assign_splits(cuts: list[tuple[Utterance, Cut]]) -> dict[str, list[Cut]]:
    """Group cuts by split; utterances without a split get their speaker's split, or a new one."""
    split_of = {_speaker(cut): one.split for one, cut in cuts if one.split}
    without = [cut for one, cut in cuts if not one.split]
    seconds = defaultdict(float)
    for cut in without:
        if _speaker(cut) not in split_of:
            seconds[_speaker(cut)] += cut.duration
    split_of |= divide_speakers(seconds)
    by_split = defaultdict(list)
    for one, cut in cuts:
        by_split[one.split or split_of[_speaker(cut)]].append(cut)
    if without:
        used = ", ".join(sorted({split_of[_speaker(cut)] for cut in without}))
        logger.info("%d utterances had no split: assigned by speaker to %s", len(without), used)
    return dict(by_split)


def _speaker(cut: Cut) -> str:
    return cut.supervisions[0].speaker


def divide_speakers(seconds: dict[str, float]) -> dict[str, str]:
    """Map speakers to random, reproducible splits; `seconds` is each speaker's speech."""
    speakers = sorted(seconds)
    random.Random(SPLIT_SEED).shuffle(speakers)
    split_of = dict.fromkeys(speakers, TRAIN)
    room = {split: share * sum(seconds.values()) for split, share in HELD_OUT.items()}
    for speaker in speakers:
        split = max(room, key=room.get)
        if seconds[speaker] <= room[split]:
            split_of[speaker] = split
            room[split] -= seconds[speaker]
    for split in HELD_OUT:  # with few speakers, take the shortest
        left = [speaker for speaker in speakers if split_of[speaker] == TRAIN]
        if split not in split_of.values() and len(left) > 1:
            split_of[min(left, key=seconds.get)] = split
    return split_of
