"""A tiny LLM is a Qwen2 directory: its tokenizer, its rows, what it learns, what it refuses."""

import gzip
import json
import math
import random
from pathlib import Path

import make_tiny_llm as tiny
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QWEN2_TOKENIZER = Path(__file__).parents[3] / "shared" / "tokenizer"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL = "--hidden-size 32 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-size 48"
SPEECH_MARKERS = ["<speech>", "<start_text>", "<end_text>", "<start_speech>", "<end_speech>"]


@pytest.fixture
def spelled(tmp_path):
    """A file of 60 spelled names, one a line."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(LETTERS.upper(), k=rng.randint(2, 6))) for _ in range(60)]
    path = tmp_path / "spelled.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer([" ".join(LETTERS), " ".join(reversed(LETTERS))], 400)


def make(text, out, flags=""):
    tiny.main(["--text", str(text), "--out", str(out), *f"{SMALL} --max-steps 2 {flags}".split()])
    return AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)


# ---- transcripts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.tsv",
            "id\tsplit\ttext\n1\ttrain\tYES\n2\ttest\tNO\n3\ttrain\tGO ON\n",
            ["YES", "GO ON"],
        ),
        ("a.tsv", 'id\ttext\n1\tSAY "HI\n2\tNO\n', ['SAY "HI', "NO"]),
        ("a.csv", 'text,id\n"YES, SIR",1\n', ["YES, SIR"]),
        ("a.txt", "YES\nNO TEXT HERE\n", ["YES", "NO TEXT HERE"]),
    ],
)
def test_tables_and_plain_lines(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert list(tiny.read_texts(tmp_path / name)) == expected


def test_cuts_give_the_texts_of_their_supervisions(tmp_path):
    path = tmp_path / "x_cuts_train.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for texts in (["ONE"], ["TWO", "THREE"], []):
            print(json.dumps({"supervisions": [{"text": text} for text in texts]}), file=lines)
    assert list(tiny.read_texts(path)) == ["ONE", "TWO", "THREE"]


def test_transcripts_are_distinct_lower_case_and_not_empty():
    assert tiny.unique_transcripts(["GO  ON", "go on", " ", "Yes\n"]) == ["go on", "yes"]


def test_no_held_out_transcript_is_trained_on():
    texts = [str(number) for number in range(95)]
    train, held_out = tiny.split_held_out(texts, seed=1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == sorted(texts)
    assert tiny.split_held_out(texts, seed=2)[1] != held_out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id\tsplit\ttext\n1\ttest\tNO\n", "holds no transcripts .*'train'"),
        ("id\ttext\n1\n", "line 2 has 1 fields, the header 2"),
        ("ONE LINE ONLY\n", "1 distinct transcript"),
    ],
)
def test_unusable_files_are_refused_in_a_sentence(tmp_path, content, sentence):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(SystemExit, match=sentence):
        make(tmp_path / "a.tsv", tmp_path / "llm")
    assert not (tmp_path / "llm").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.tsv does not exist"):
        make(tmp_path / "none.tsv", tmp_path / "llm")


# ---- tokenizer


def test_a_spelled_letter_is_one_token(tokenizer):
    assert tokenizer.tokenize("h i n") == ["h", "Ġi", "Ġn"]
    assert len(tokenizer("user").input_ids) == len(tokenizer("assistant").input_ids) == 1


def test_nothing_is_out_of_vocabulary(tokenizer):
    text = "naïve 42 日本\n\t<x>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_come_last_and_have_qwen2s_roles(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(tiny.CHAT_TOKENS))
    assert ids == list(range(len(tokenizer) - 3, len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == (None, None)


@pytest.mark.skipif(not QWEN2_TOKENIZER.is_dir(), reason="../shared/tokenizer is absent")
def test_text_is_cut_as_qwen2_cuts_it(tokenizer):
    qwen2 = AutoTokenizer.from_pretrained(QWEN2_TOKENIZER).backend_tokenizer
    backend = tokenizer.backend_tokenizer
    text = "it's 1984, h i n\n\n  naïve"
    assert backend.pre_tokenizer.pre_tokenize_str(text) == qwen2.pre_tokenizer.pre_tokenize_str(
        text
    )
    assert backend.normalizer.normalize_str("e\u0301") == qwen2.normalizer.normalize_str("e\u0301")


# ---- examples


def test_labels_cover_the_answer_and_its_closing_token(tokenizer):
    ids, labels = tiny.encode_example(tokenizer, "h i", user="x")
    rows = [
        (token, "-" if label == tiny.IGNORED else tokenizer.decode([label]))
        for token, label in zip(tokenizer.convert_ids_to_tokens(ids), labels, strict=True)
    ]
    assert rows == [
        ("<|im_start|>", "-"),
        ("user", "-"),
        ("Ċ", "-"),
        ("x", "-"),
        ("<|im_end|>", "-"),
        ("Ċ", "-"),
        ("<|im_start|>", "-"),
        ("assistant", "-"),
        ("Ċ", "-"),
        ("h", "h"),
        ("Ġi", " i"),
        ("<|im_end|>", "<|im_end|>"),
    ]


def test_collate_pads_on_the_right():
    ids, labels = tiny.collate([([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5])], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert labels.tolist() == [[-100, 2, 3], [-100, 5, -100]]


def test_repeat_prob_decides_how_many_users_say_the_answer(tokenizer):
    def user_turns(repeat_prob):
        examples = tiny.training_examples(tokenizer, ["h i n", "a m y"], repeat_prob, 0.5, seed=0)
        chats = [tokenizer.decode(next(examples)[0]) for _ in range(100)]
        return [
            (chat.split("user\n")[1].split("<|im_end|>")[0], chat.split("assistant\n")[1])
            for chat in chats
        ]

    assert all(user == "" for user, _ in user_turns(0))
    for user, answer in user_turns(1):
        assert " ".join(user.split()) + "<|im_end|>" == answer
    assert 30 < sum(user != "" for user, _ in user_turns(0.5)) < 70


def test_random_prob_decides_how_many_answers_are_no_transcripts(tokenizer):
    def answers(random_prob):
        examples = tiny.training_examples(tokenizer, ["h i n", "a m y"], 1, random_prob, seed=0)
        chats = [tokenizer.decode(next(examples)[0]) for _ in range(100)]
        return [chat.split("assistant\n")[1].removesuffix("<|im_end|>") for chat in chats]

    assert set(answers(0)) == {"h i n", "a m y"}
    assert set("".join(answers(1))) == set("hinamy ")
    counts = [
        sum(answer in ("h i n", "a m y") for answer in answers(prob)) for prob in (0, 0.5, 1)
    ]
    assert 100 == counts[0] > counts[1] > 40 > counts[2]


# ---- model


@pytest.mark.parametrize(("entries", "rows"), [(379, 384), (380, 448), (384, 448)])
def test_rows_are_a_multiple_of_64_with_five_to_spare(tokenizer, monkeypatch, entries, rows):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: entries)
    assert (
        tiny.build_model(tokenizer, 32, 1, 2, 1, 48).get_input_embeddings().num_embeddings == rows
    )


def test_training_stops_in_time_and_keeps_the_best_weights(tokenizer, monkeypatch):
    model = tiny.build_model(tokenizer, 32, 1, 2, 1, 48)
    states = []

    def scripted_loss(model, examples):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return [3.0, 1.0, 2.0, 2.5, 0.5][len(states) - 1]  # the fifth comes too late

    monkeypatch.setattr(tiny, "mean_loss", scripted_loss)
    examples = tiny.training_examples(tokenizer, ["h i n", "a m y"], 0, 0, seed=0)
    tiny.train(model, examples, [], 1e-2, 2, 100, 1.0, valid_interval=2, patience=2)
    assert len(states) == 4
    weight = "model.embed_tokens.weight"
    assert torch.equal(model.state_dict()[weight], states[1][weight])
    assert not torch.equal(states[1][weight], states[3][weight])


def test_divergence_is_an_error(tokenizer, monkeypatch):
    model = tiny.build_model(tokenizer, 32, 1, 2, 1, 48)
    monkeypatch.setattr(tiny, "mean_loss", lambda model, examples: math.nan)
    examples = tiny.training_examples(tokenizer, ["h i n"], 0, 0, seed=0)
    with pytest.raises(ValueError, match="diverged"):
        tiny.train(model, examples, [], 1e-2, 1, 1, 1.0)


def test_mean_loss_is_per_token(tokenizer):
    model = tiny.build_model(tokenizer, 32, 1, 2, 1, 48)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied: every next token is as likely
    examples = [tiny.encode_example(tokenizer, text) for text in ("h", "h i n i c h")]
    assert tiny.mean_loss(model, examples) == pytest.approx(math.log(model.config.vocab_size))


# ---- program


def test_the_directory_loads_as_a_qwen2(spelled, tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer, model = make(spelled, tmp_path / "new" / "llm")
    assert model.config.model_type == "qwen2"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["llm"]
    assert (tmp_path / "new" / "llm" / "model.safetensors").is_file()
    assert f"{len(tokenizer)} tokens" in caplog.text
    assert f"{model.num_parameters()} parameters" in caplog.text
    assert "held-out perplexity" in caplog.text

    first_spare = len(tokenizer)
    tokenizer.add_tokens(SPEECH_MARKERS, special_tokens=True)
    spare_ids = tokenizer.convert_tokens_to_ids(SPEECH_MARKERS)
    assert spare_ids == list(range(first_spare, first_spare + 5))
    assert model.get_input_embeddings().num_embeddings > max(spare_ids)


def test_it_learns_the_transcripts(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"call {a} {b}" for a in "abcdefg" for b in "abcdefg"))
    tokenizer, model = make(
        path, tmp_path / "llm", "--max-steps 60 --lr 2e-2 --batch-size 16 --repeat-prob 0"
    )
    examples = [tiny.encode_example(tokenizer, "call a b")]
    # "call" and the end are certain, each letter is one of seven: 2 ln 7 nats over four tokens
    assert tiny.mean_loss(model, examples) < 1.2 * 2 * math.log(7) / 4


def test_the_seed_fixes_the_weights_and_every_other_flag_changes_them(spelled, tmp_path):
    def weights(flags=""):
        out = tmp_path / f"llm{flags}".replace(" ", "")
        state = make(spelled, out, flags)[1].state_dict()
        return torch.cat([value.flatten() for value in state.values()])

    usual = weights()
    assert torch.equal(usual, weights("--seed 0"))
    for flags in (
        "--seed 1",
        "--lr 0.1",
        "--batch-size 2",
        "--repeat-prob 0",
        "--max-steps 3",
        "--minutes 0",
        "--vocab-size 270",
        "--hidden-size 48",
        "--num-layers 2",
        "--num-heads 1",
        "--num-kv-heads 2",
        "--intermediate-size 64",
    ):
        assert not torch.equal(usual, weights(flags)), flags


def test_split_chooses_rows(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(
        "split\ttext\n" + "".join(f"{'ab'[i % 2]}\tword{'xy'[i % 2]} {i}\n" for i in range(40))
    )
    a, _ = make(path, tmp_path / "a", "--split a")
    b, _ = make(path, tmp_path / "b", "--split b")
    assert "wordx" in a.get_vocab() and "wordx" not in b.get_vocab()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--vocab-size 258", "258 is below 259"),
        ("--num-heads 3", "--hidden-size 32 over --num-heads 3"),
        ("--num-kv-heads 3", "--num-heads 2 is no multiple of --num-kv-heads 3"),
        ("--repeat-prob 2", r"--repeat-prob 2\.0 is not between 0 and 1"),
        ("--random-prob -1", r"--random-prob -1\.0 is not between 0 and 1"),
        ("--batch-size 0", "at least 1"),
    ],
)
def test_unusable_flags_are_refused_in_a_sentence(spelled, tmp_path, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        make(spelled, tmp_path / "llm", flags)


def test_an_existing_directory_is_not_overwritten(spelled, tmp_path):
    (tmp_path / "llm").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        make(spelled, tmp_path / "llm")
    assert list((tmp_path / "llm").iterdir()) == []
