"""Properties of manifests, prompts, transcripts and normalization for arbitrary input."""

import copy
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechllm.data.manifests import cuts_within, read_lines, scan_manifests
from speechllm.data.validation import REASONS, validate_cut
from speechllm.errors import InputError
from speechllm.models.prompt import (
    IGNORED,
    add_speech_tokens,
    build_chat_template,
    decode_transcripts,
    encode_transcripts,
    training_ids,
)
from speechllm.scoring.normalize import NORMALIZERS

quick = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


# ---- manifests


@pytest.fixture(scope="module")
def lines(tiny_corpus):
    with gzip.open(tiny_corpus / "tiny_cuts_train.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def field_paths(value, path=()):
    """Yield the paths of all nested fields of a cut."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from field_paths(inner, (*path, key))


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@quick
@given(data=st.data())
def test_any_value_of_any_field_is_a_valid_or_an_invalid_cut_or_an_input_error(
    lines, tmp_path, data
):
    """Never another exception; exactly the valid cuts are kept."""
    changed = copy.deepcopy(lines[:3])
    *above, key = data.draw(st.sampled_from(sorted(field_paths(changed[1]), key=str)))
    holder = changed[1]
    for step in above:
        holder = holder[step]
    holder[key] = data.draw(JSON)
    path = write(tmp_path / "x.jsonl", changed)
    [_, item, _] = read_lines(path)
    if isinstance(item, str):
        assert item and "\n" not in item
        with pytest.raises(InputError, match="cannot be read beyond cut 1: "):
            scan_manifests([path], tolerate=True)
        return
    errors = validate_cut(item)
    assert all(error.reason in REASONS and "\n" not in error.message for error in errors)
    statistics = scan_manifests([path], tolerate=True)
    assert bool(errors) <= (1 in statistics.errors[path])
    kept = list(cuts_within([path], skip=statistics.errors))
    assert len(kept) == statistics.kept >= 2 - len(statistics.errors[path].keys() - {1})


@quick
@given(garbage=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_cut_file_are_an_input_error(tmp_path, garbage):
    for name in ("x.jsonl", "x.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(garbage)
        assert all(isinstance(item, str) and item for item in read_lines(path))
        with pytest.raises(InputError, match="cannot be read beyond cut 0: "):
            scan_manifests([path], tolerate=True)


# ---- prompts and transcripts


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    add_speech_tokens(tokenizer)
    return tokenizer


@quick
@given(texts=st.lists(st.tuples(UNICODE, st.integers(1, 4)), min_size=1, max_size=4))
def test_labels_cover_exactly_the_transcript_and_its_end(tokenizer, texts):
    chat = build_chat_template(tokenizer)
    transcripts = encode_transcripts(tokenizer, [text for text, _ in texts])
    groups = [count for _, count in texts]
    ids, labels = training_ids(chat, transcripts, groups)
    assert ids.shape == labels.shape
    for row, label, transcript, count in zip(ids, labels, transcripts, groups):
        learned = label != IGNORED
        assert label[learned].tolist() == [*transcript, chat.end] == row[learned].tolist()
        assert learned.tolist() == sorted(learned.tolist())  # all at the end
        assert (row == chat.speech).sum() == count
        prompt = chat.prompt(count)
        assert row[~learned].tolist()[-len(prompt):] == prompt
        assert set(row[~learned].tolist()[: -len(prompt)]) <= {chat.pad}


@quick
@given(text=UNICODE | st.sampled_from(["<speech>", "<|im_end|> a", " <|im_start|>user"]))
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    [ids] = encode_transcripts(tokenizer, [text])
    assert not set(ids) & set(tokenizer.all_special_ids)
    [back] = decode_transcripts(tokenizer, [ids])
    [normal] = [tokenizer.backend_tokenizer.normalizer.normalize_str(text.strip())] if (
        tokenizer.backend_tokenizer.normalizer
    ) else [text.strip()]
    assert back == normal.strip()


# ---- normalization


@quick
@given(text=UNICODE)
def test_normalization_is_idempotent(text):
    for name in ("none", "basic"):
        once = NORMALIZERS[name](text)
        assert NORMALIZERS[name](once) == once
