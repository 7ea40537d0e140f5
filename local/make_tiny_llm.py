"""Make a Qwen2 of a few million parameters that knows a corpus' transcripts: an LLM for a CPU.

python local/make_tiny_llm.py --text ../shared/corpora/an4/transcripts.tsv --out exp/an4/llm

The directory loads like a downloaded Qwen2 (`AutoTokenizer`, `AutoModelForCausalLM`), has Qwen2's
pre-tokenizer and ChatML tokens, and keeps spare embedding rows for the five speech markers.

It is trained to answer, in the chat form of the recipe, with a lower-case transcript. In most chats
(--repeat-prob) the user's turn says the words of the answer: an instruct model of the usual size
can repeat what it is told, and speech recognition with a frozen LLM rests on that; a model that
only ever saw empty user turns would have to learn it through LoRA. Such turns have pauses, and
most of them (--random-prob) have words drawn at random, so that listening pays more than guessing.
"""

import argparse
import csv
import gzip
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from speechllm.errors import in_sentences
from speechllm.flags import Parser
from speechllm.prompt import IGNORED, IM_END, IM_START, PAD, SPEECH_TOKENS, chat_prompt

CHAT_TOKENS = (PAD, IM_START, IM_END)  # in Qwen2's order
logger = logging.getLogger(__name__)


# ---- transcripts


def read_texts(path: Path, split: str = "train") -> Iterator[str]:
    """Transcripts of a lhotse cuts file (*.jsonl, *.jsonl.gz), a table with a `text` column
    (*.csv, or tab-separated), or a file with one transcript a line.

    Of a table that has a `split` column, only the rows of `split` are used.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that holds no transcript, or no row of `split`; for a row with fewer or
        more fields than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if ".jsonl" in path.suffixes:
        texts = list(_cut_texts(path))
    else:
        with path.open(encoding="utf-8", newline="") as lines:
            try:
                texts = list(_table_texts(lines, "," if path.suffix == ".csv" else "\t", split))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    if not texts:
        raise ValueError(f"{path} holds no transcripts (rows of split {split!r} where it has one)")
    yield from texts


def _cut_texts(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            for supervision in json.loads(line).get("supervisions", ()):
                yield supervision.get("text") or ""


def _table_texts(lines: Iterable[str], delimiter: str, split: str) -> Iterator[str]:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    header = next(rows, [])
    if "text" not in header:  # no table: one transcript a line
        yield delimiter.join(header)
        yield from (delimiter.join(row) for row in rows)
        return
    text = header.index("text")
    of_split = header.index("split") if "split" in header else None
    for row in filter(None, rows):
        if len(row) != len(header):
            raise ValueError(
                f"line {rows.line_num} has {len(row)} fields, the header {len(header)}"
            )
        if of_split is None or row[of_split] == split:
            yield row[text]


def unique_transcripts(texts: Iterable[str]) -> list[str]:
    """Distinct texts as the recipe feeds them to an LLM: lower case, single spaces; no empty ones.

    Distinct, so that no held-out transcript is also trained on.
    """
    return list(dict.fromkeys(filter(None, (" ".join(text.lower().split()) for text in texts))))


def split_held_out(transcripts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """A tenth, at most 200, of the transcripts, drawn at random, apart from the others."""
    shuffled = random.Random(seed).sample(transcripts, len(transcripts))
    num_held_out = min(200, -(-len(transcripts) // 10))
    return shuffled[num_held_out:], shuffled[:num_held_out]


# ---- tokenizer


def train_tokenizer(transcripts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, the three ChatML tokens last.

    Nothing is out of its vocabulary: all 256 bytes are in it.
    """
    backend = Qwen2Tokenizer().backend_tokenizer  # brings Qwen2's pre-tokenizer and NFC
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(CHAT_TOKENS),
        min_frequency=2,  # a word seen once would become a token seen once
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["user", "assistant"] * len(transcripts)  # once per example: one token each
    backend.train_from_iterator(transcripts + roles, trainer)
    learned = json.loads(backend.to_str())["model"]
    vocab = learned["vocab"]
    vocab |= {token: i for i, token in enumerate(CHAT_TOKENS, start=len(vocab))}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=list(CHAT_TOKENS[1:]),
    )


# ---- examples


Example = tuple[list[int], list[int]]  # ids and labels of one chat, of equal length


def encode_example(tokenizer: PreTrainedTokenizerBase, answer: str, user: str = "") -> Example:
    """A chat in which `user` is answered by `answer`; labels on the answer and its closing id."""
    prompt = tokenizer(chat_prompt(user)).input_ids
    closed_answer = tokenizer(answer + IM_END).input_ids
    return prompt + closed_answer, [IGNORED] * len(prompt) + closed_answer


def with_pauses(words: list[str], rng: random.Random) -> str:
    """The words, each after one to four spaces: as speech embeddings outnumber a text's tokens."""
    return "".join(" " * rng.randint(1, 4) + word for word in words)


def training_examples(
    tokenizer: PreTrainedTokenizerBase,
    transcripts: list[str],
    repeat_prob: float,
    random_prob: float,
    seed: int,
) -> Iterator[Example]:
    """Examples without end, the transcripts in a new order each epoch."""
    rng = random.Random(seed)
    all_words = [word for transcript in transcripts for word in transcript.split()]
    while True:
        for transcript in rng.sample(transcripts, len(transcripts)):
            if rng.random() >= repeat_prob:
                yield encode_example(tokenizer, transcript)
                continue
            words = transcript.split()
            if rng.random() < random_prob:
                words = rng.choices(all_words, k=len(words))
            yield encode_example(tokenizer, " ".join(words), with_pauses(words, rng))


def collate(examples: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, (B, L) each, padded on the right (where causal attention never looks)."""
    longest = max(len(ids) for ids, _ in examples)
    ids = [ids + [pad_id] * (longest - len(ids)) for ids, _ in examples]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in examples]
    return torch.tensor(ids), torch.tensor(labels)


# ---- model


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
) -> Qwen2ForCausalLM:
    """An untrained Qwen2 with tied embeddings.

    Its rows are a multiple of 64 and leave at least five after the tokenizer's entries.
    """
    config = Qwen2Config(
        vocab_size=-(-(len(tokenizer) + len(SPEECH_TOKENS)) // 64) * 64,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,  # as in Qwen2: <|endoftext|> opens and pads
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, examples: list[Example]) -> float:
    """Mean negative log-likelihood (nats) of a labelled token."""
    model.eval()
    total = num_labels = 0
    for start in range(0, len(examples), 64):
        ids, labels = collate(examples[start : start + 64], model.config.pad_token_id)
        count = int((labels != IGNORED).sum())
        total += count * model(input_ids=ids, labels=labels).loss.item()
        num_labels += count
    model.train()
    return total / num_labels


def train(
    model: Qwen2ForCausalLM,
    examples: Iterator[Example],
    held_out: list[Example],
    lr: float,
    batch_size: int,
    max_steps: int,
    minutes: float,
    valid_interval: int = 50,
    patience: int = 5,
) -> None:
    """Train until the held-out loss has not improved for `patience` validations, or `max_steps` or
    `minutes` are over, and leave the model with the weights of the lowest held-out loss.

    Raises:
      ValueError: if the loss was not a number from the first validation on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - step / max_steps)
    )
    best_loss, best_step, best_state = math.inf, 0, {}
    deadline = time.monotonic() + 60 * minutes
    for step in range(1, max_steps + 1):
        ids, labels = collate(list(islice(examples, batch_size)), model.config.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        over = step == max_steps or time.monotonic() > deadline
        if step % valid_interval and not over:
            continue
        valid_loss = mean_loss(model, held_out)
        logger.info("step %d: loss %.3f, held-out loss %.3f", step, loss.item(), valid_loss)
        if valid_loss < best_loss:
            best_loss, best_step = valid_loss, step
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if over or step - best_step >= patience * valid_interval:
            break
    if not best_state:
        raise ValueError(f"training diverged: the held-out loss is {valid_loss}; lower --lr {lr}")
    model.load_state_dict(best_state)
    logger.info("kept the weights of step %d, held-out loss %.3f", best_step, best_loss)


# ---- program


def save_directory(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model and tokenizer to `out`, which appears only when complete."""
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.eval().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, out)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    # data
    add("--text", type=Path, nargs="+", required=True, help="tables, cuts files or text files")
    add("--split", default="train", help="rows used of a table that has a split column")
    add("--out", type=Path, required=True, help="directory to write")
    add("--vocab-size", type=int, default=1000, help="most entries the tokenizer may have")
    # model
    add("--hidden-size", type=int, default=256, help="width of the model")
    add("--num-layers", type=int, default=4, help="transformer layers")
    add("--num-heads", type=int, default=4, help="attention heads")
    add("--num-kv-heads", type=int, default=2, help="heads of keys and values")
    add("--intermediate-size", type=int, default=768, help="width inside the feed-forward layers")
    # training
    add("--lr", type=float, default=1e-3, help="learning rate, after 50 steps falling to zero")
    add("--batch-size", type=int, default=32, help="transcripts a batch")
    add("--repeat-prob", type=float, default=0.9, help="share of user turns that say the answer")
    add("--random-prob", type=float, default=0.9, help="share of these that say random words")
    add("--max-steps", type=int, default=600, help="most training steps")
    add("--minutes", type=float, default=5.0, help="most minutes of training")
    add("--seed", type=int, default=0, help="of weights, order and held-out transcripts")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse, in a sentence, what would fail later."""
    if args.out.exists():
        raise SystemExit(f"{args.out} exists already: remove it to make another LLM there")
    if args.vocab_size < 256 + len(CHAT_TOKENS):
        raise SystemExit(f"--vocab-size {args.vocab_size} is below 259: 256 bytes and 3 tokens")
    if args.hidden_size % args.num_heads or (args.hidden_size // args.num_heads) % 2:
        raise SystemExit(
            f"--hidden-size {args.hidden_size} over --num-heads {args.num_heads} "
            "is not an even whole number"
        )
    if args.num_heads % args.num_kv_heads:
        raise SystemExit(
            f"--num-heads {args.num_heads} is no multiple of --num-kv-heads {args.num_kv_heads}"
        )
    for flag, value in (
        ("--repeat-prob", args.repeat_prob),
        ("--random-prob", args.random_prob),
    ):
        if not 0 <= value <= 1:
            raise SystemExit(f"{flag} {value} is not between 0 and 1")
    if args.max_steps < 1 or args.batch_size < 1:
        raise SystemExit("--max-steps and --batch-size are at least 1")


@in_sentences
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    check_args(args)
    try:
        texts = [text for path in args.text for text in read_texts(path, args.split)]
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    transcripts = unique_transcripts(texts)
    if len(transcripts) < 2:
        raise SystemExit(f"{len(transcripts)} distinct transcript: one to train on, one held out")
    train_texts, held_out_texts = split_held_out(transcripts, args.seed)
    logger.info(
        "%d texts, %d distinct: %d to train on, %d held out",
        len(texts), len(transcripts), len(train_texts), len(held_out_texts),
    )  # fmt: skip

    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    model = build_model(
        tokenizer,
        args.hidden_size,
        args.num_layers,
        args.num_heads,
        args.num_kv_heads,
        args.intermediate_size,
    )
    logger.info(
        "%d tokens, %d embedding rows, %d parameters",
        len(tokenizer), model.config.vocab_size, model.num_parameters(),
    )  # fmt: skip

    rng = random.Random(args.seed)
    alone = [encode_example(tokenizer, text) for text in held_out_texts]
    repeating = [
        encode_example(tokenizer, text, with_pauses(text.split(), rng)) for text in held_out_texts
    ]
    examples = training_examples(
        tokenizer, train_texts, args.repeat_prob, args.random_prob, args.seed
    )
    held_out = alone + (repeating if args.repeat_prob else [])
    try:
        train(
            model, examples, held_out, args.lr, args.batch_size, args.max_steps, args.minutes
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(str(error)) from error
    logger.info(
        "held-out perplexity per token: %.2f after an empty user turn, %.2f after one that says it",
        math.exp(mean_loss(model, alone)), math.exp(mean_loss(model, repeating)),
    )  # fmt: skip
    save_directory(model, tokenizer, args.out)
    logger.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
