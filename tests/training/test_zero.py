"""DeepSpeed's ZeRO: on two ranks the same training as without, and the same checkpoints.

One launch of two processes does all trainings; the functions named `rank_…` run in them.
"""

import argparse
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from free_port import free_port
from test_distributed import speech_llm

import decode
import train
from speechllm.checkpoint_file import load_checkpoint
from speechllm.errors import InputError
from speechllm.prompt import training_ids
from speechllm.trained_state import load_trainable_state, trainable_state
from speechllm.training import zero
from speechllm.training.checkpoint import TrainState, average_epochs, save_checkpoint
from speechllm.training.distributed import launch
from speechllm.training.engine import Engine
from speechllm.training.loop import Trainer
from speechllm.training.validation import validate as loop_validate
from speechllm.zipformer import SIZES, ZipformerEncoder, save_encoder

LOCAL = Path(__file__).resolve().parents[2] / "local"
STEPS = 4
# Parameters of a model this small would all stay whole, and in one piece.
SMALL = {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason=f"DeepSpeed is missing: see {zero.REQUIREMENTS}"
)


# What the two ranks do


def make_engine(ranks, stage=None, use_lora=False, dtype=torch.float32, start=None):
    """The whole LLM (or LoRA) is trained, and the second of two encoders; DDP without a stage.

    `start` is a checkpoint file to go on from.
    """
    model = speech_llm(use_lora, frozen=(True, False))
    checkpoint = load_checkpoint(start) if start else None
    if checkpoint:
        load_trainable_state(model, checkpoint["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    # With torch's smaller eps AdamW makes much of the rounding of gradients near zero.
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)
    if stage is None:
        engine = Engine(model, optimizer, ranks, dtype)
    else:
        config = {"zero_optimization": {"stage": stage, **(SMALL if stage == 3 else {})}}
        engine = zero.ZeroEngine(model, optimizer, ranks, dtype, config)
    if checkpoint:
        engine.load_state_dict(checkpoint)
    return engine


TRANSCRIPTS = [[10, 11], [12], [13, 14, 15, 16, 17], [18, 19, 20]]
USED = [[0], [0], [1, 0], [1]]  # a rank with the first two does not use the second encoder


def count_tokens(batch):
    return sum(len(TRANSCRIPTS[b]) + 1 for b in batch["rows"])


def batch_loss_of(chat):
    features = torch.randn(4, 90, 80, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([90, 60, 75, 81])

    def batch_loss(model, batch):
        rows = batch["rows"]
        used = [USED[b] for b in rows]
        ids, labels = training_ids(chat, [TRANSCRIPTS[b] for b in rows], [len(u) for u in used])
        if batch.get("fault") == "out of memory":
            raise torch.OutOfMemoryError
        factor = float(batch.get("fault", "1"))
        return model(factor * features[rows], lens[rows], ids, labels, used)

    return batch_loss


def train_steps(engine, grad_accum=1, steps=range(STEPS)):
    """The loss of each step; the learning rate and the rows of a rank change."""
    trainer = Trainer(
        engine=engine, schedule=None, batch_loss=batch_loss_of(engine.module.chat),
        count_tokens=count_tokens, train_loader=None, valid_loader=None, model_state=None,
        exp_dir=None, num_epochs=1, epoch_seconds=1.0,
    )  # fmt: skip
    losses = []
    for step in steps:
        engine.optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 2)
        rows = [[0, 1], [2, 3]][(engine.ranks.rank + step) % 2]
        groups = [rows] if grad_accum == 1 else [[b] for b in rows]
        batches = [{"rows": group, "ids": group} for group in groups]
        tokens = int(engine.ranks.sum(torch.tensor(sum(map(count_tokens, batches)))))
        losses.append(trainer.step(batches, tokens).reduced(engine.ranks).means()["loss"])
    return losses


def unlucky_steps(engine, fault):
    """Of rank 1 the second batch has a fault; the steps that were skipped."""
    trainer = Trainer(
        engine=engine, schedule=None, batch_loss=batch_loss_of(engine.module.chat),
        count_tokens=count_tokens, train_loader=None, valid_loader=None, model_state=None,
        exp_dir=None, num_epochs=1, epoch_seconds=1.0,
    )  # fmt: skip
    skipped = []
    for step in range(STEPS):
        rows = [0, 1] if engine.ranks.is_main else [2, 3]
        batch = {"rows": rows, "ids": [str(b) for b in rows], "seconds": 1.0}
        batch["features"] = torch.zeros(0)
        if step == 1 and not engine.ranks.is_main:
            batch["fault"] = fault
        if trainer.step([batch], count_tokens({"rows": range(4)})) is None:
            skipped.append(step)
    return skipped


def validate(engine):
    """Rank 1 has a batch more than rank 0."""
    batches = [{"rows": [0, 1]}, {"rows": [2]}, {"rows": [3]}]
    mine = batches[:1] if engine.ranks.is_main else batches[1:]
    loss = batch_loss_of(engine.module.chat)
    return loop_validate(engine, loss, count_tokens, mine).means()["loss"]


def save(engine, path):
    """As the training loop does."""
    model, others = trainable_state(engine.module, engine.value), engine.state_dict()
    if engine.ranks.is_main:
        save_checkpoint(path, model, TrainState(), **others)
    elif engine.divided:
        assert not any(value.numel() for value in model.values()), "all ranks keep a copy"
    engine.ranks.barrier()



# (stage, batches in a step, whether LoRA is trained instead of the LLM)
ALIKE = [(stage, accum, False) for stage in (1, 2, 3) for accum in (1, 2)] + [(3, 2, True)]


def rank_trainings(ranks, args):
    """Each training's losses and checkpoint; those without DeepSpeed have the stage None."""
    results = {}

    def run(name, *how, start=None, steps=range(STEPS), **options):
        stage, accum, use_lora = how
        engine = make_engine(ranks, stage, use_lora, start=start, **options)
        results[name] = [*train_steps(engine, accum, steps), validate(engine)]
        save(engine, args.exp_dir / f"{name}.pt")

    for _, accum, use_lora in ALIKE[-3:]:
        run(f"None-{accum}-{use_lora}", None, accum, use_lora)
    for how in ALIKE:
        run("-".join(map(str, how)), *how)
    run("undisturbed", None, 1, False, steps=range(6))
    for stage, start, steps in ((2, 0, 2), (3, 2, 4), (None, 4, 6), (1, 4, 6)):
        before = args.exp_dir / f"until-{start}.pt" if start else None
        name = f"until-{steps}" if stage != 1 else "until-6-again"
        run(name, stage, 1, False, start=before, steps=range(start, steps))
    for stage in (None, 1, 2, 3):
        engine = make_engine(ranks, stage)
        results[f"skipped-{stage}"] = unlucky_steps(engine, "nan")
        save(engine, args.exp_dir / f"unlucky-{stage}.pt")
    for stage in (None, 2, 3):  # last: DeepSpeed keeps for all later engines that there is autocast
        run(f"bf16-{stage}", stage, 2, False, dtype=torch.bfloat16)
    torch.save(results, args.exp_dir / f"rank-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of their checkpoints, and the losses of both ranks."""
    folder = tmp_path_factory.mktemp("zero")
    launch(rank_trainings, argparse.Namespace(exp_dir=folder), 2, free_port())
    return folder, *(torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2))


def assert_alike(first, second, tolerance):
    """Two checkpoints or parts of them."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_alike(first[key], second[key], tolerance)
    elif isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)
    elif isinstance(first, list) and first and isinstance(first[0], dict):
        for one, other in zip(first, second, strict=True):
            assert_alike(one, other, tolerance)
    else:
        assert first == second


@needs_deepspeed
@pytest.mark.parametrize("stage, accum, use_lora", ALIKE)
def test_the_training_is_that_of_ddp(trained, stage, accum, use_lora):
    folder, *ranks = trained
    name, reference = f"{stage}-{accum}-{use_lora}", f"None-{accum}-{use_lora}"
    for losses in ranks:
        assert losses[reference][0] - losses[reference][-1] > 0.05
        assert losses[name] == pytest.approx(losses[reference], abs=1e-5)
    assert_alike(
        load_checkpoint(folder / f"{name}.pt"), load_checkpoint(folder / f"{reference}.pt"), 1e-5
    )


@needs_deepspeed
def test_going_on_with_another_stage_and_without_deepspeed(trained):
    folder, losses, _ = trained
    for last in ("until-6", "until-6-again"):
        steps = [losses[name][:-1] for name in ("until-2", "until-4", last)]
        assert sum(steps, []) == pytest.approx(losses["undisturbed"][:-1], abs=1e-5)
        assert_alike(
            load_checkpoint(folder / f"{last}.pt"), load_checkpoint(folder / "undisturbed.pt"), 1e-5
        )


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_autocast_and_what_is_saved_is_not_rounded(trained, stage):
    folder, losses, _ = trained
    assert losses[f"bf16-{stage}"] == pytest.approx(losses["bf16-None"], abs=3e-3)
    assert losses[f"bf16-{stage}"] != pytest.approx(losses["None-2-False"], abs=1e-5)
    for name, value in load_checkpoint(folder / f"bf16-{stage}.pt")["model"].items():
        assert value.dtype == torch.float32
        assert value.numel() < 50 or not torch.equal(value, value.bfloat16().float()), name


@needs_deepspeed
def test_checkpoints_are_averaged_and_loaded(trained, tmp_path):
    folder, *_ = trained
    for epoch, stage in ((1, 2), (2, 3)):
        shutil.copy(folder / f"{stage}-1-False.pt", tmp_path / f"epoch-{epoch}.pt")
    average, _ = average_epochs(tmp_path, 2, 2)
    model = speech_llm(use_lora=False, frozen=(True, False))
    assert load_trainable_state(model, average) == []
    assert_alike(trainable_state(model), average, 0)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_is_skipped_as_by_ddp(trained, stage):
    folder, *ranks = trained
    for results in ranks:
        assert results[f"skipped-{stage}"] == results["skipped-None"] == [1]
    assert_alike(
        load_checkpoint(folder / f"unlucky-{stage}.pt"),
        load_checkpoint(folder / "unlucky-None.pt"),
        1e-5,
    )


def rank_out_of_memory(ranks, args):
    unlucky_steps(make_engine(ranks, 2), "out of memory")


@needs_deepspeed
def test_out_of_memory_ends_a_divided_training():
    with pytest.raises(InputError, match="rank 1 is out of memory, and with --deepspeed no batch"):
        launch(rank_out_of_memory, None, 2, free_port())


# A user's day


@needs_deepspeed
@pytest.mark.usefixtures("restore_logging")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank would need a GPU")
def test_training_on_two_ranks_then_on_one_and_decoding(
    tiny_argv, tiny_train_argv, tmp_path, monkeypatch
):
    """Other processes do not know the tests' encoder size."""
    linear = torch.nn.functional.linear  # stage 3 replaces it for the whole process
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    save_encoder(ZipformerEncoder(SIZES["tiny"], vocab_size=7), tmp_path / "encoder.pt")
    model = [
        "--speech-encoder-type", "tiny", "--speech-encoder-path", str(tmp_path / "encoder.pt"),
        "--use-lora", "false", "--exp-dir", str(tmp_path / "exp"),
    ]  # fmt: skip
    argv = [*tiny_train_argv(tmp_path / "exp"), *model, "--optimizer", "adamw", "--base-lr", "1e-3"]
    train.main([
        *argv, "--num-epochs", "1", "--max-duration", "3", "--world-size", "2",
        "--master-port", str(free_port()), "--deepspeed", str(LOCAL / "deepspeed_zero2.json"),
    ])  # fmt: skip
    train.main([*argv, "--start-epoch", "2", "--deepspeed", str(LOCAL / "deepspeed_zero3.json")])
    assert not torch.distributed.is_initialized()
    train.main([*argv, "--start-epoch", "3", "--num-epochs", "3"])
    first, *later = (load_checkpoint(tmp_path / "exp" / f"epoch-{n}.pt") for n in (1, 2, 3))
    for checkpoint in later:
        assert checkpoint.keys() == first.keys()
        assert checkpoint["batch_idx_train"] > first["batch_idx_train"]
        for name, value in first["model"].items():
            assert value.shape == checkpoint["model"][name].shape, name
        group, group_of_first = (c["optimizer"]["param_groups"][0] for c in (checkpoint, first))
        assert group == group_of_first
    logs = (path.read_text() for path in sorted((tmp_path / "exp" / "log").iterdir()))
    losses = [float(x) for log in logs for x in re.findall(r"validation: loss=([\d.]+)", log)]
    assert losses[-1] < losses[0]
    decode.main([
        *tiny_argv(), *model, "--test-cuts", "tiny_cuts_test", "--epoch", "3", "--avg", "3",
        "--max-new-tokens", "3",
    ])  # fmt: skip
    assert list((tmp_path / "exp" / "decode").glob("recogs-*"))


# What is refused, in one sentence


def flags(tmp_path, config, **changed):
    path = tmp_path / "zero.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    args = {"deepspeed": path, "optimizer": "adamw", "use_fp16": False, "use_bf16": False}
    return argparse.Namespace(**{**args, **changed})


def with_stage(stage, **others):
    return {"zero_optimization": {"stage": stage, **others}}


@pytest.mark.parametrize("changed, sentence", [
    ({"optimizer": "scaled_adam"}, "--deepspeed needs --optimizer adamw: --optimizer scaled_adam "),
    ({"use_fp16": True}, "not go with --use-fp16 true: use --use-bf16 true or --use-fp16 false$"),
])  # fmt: skip
def test_flags_that_do_not_go_together(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence):
        zero.deepspeed_config(flags(tmp_path, with_stage(2), **changed))


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install -r local/requirements-deepspeed.txt$"):
        zero.deepspeed_config(flags(tmp_path, with_stage(2)))
    assert zero.deepspeed_config(flags(tmp_path, None, deepspeed=None)) is None


@needs_deepspeed
@pytest.mark.parametrize("config, sentence", [
    (None, "zero.json is missing$"),
    ("{", "zero.json is no JSON: Expecting property name .* line 1 column 2"),
    ("[]", "zero.json is no JSON object$"),
    ({}, "the stage of zero_optimization is None, not 1, 2 or 3$"),
    ({"zero_optimization": True}, "the stage of zero_optimization is None, not 1, 2 or 3$"),
    (with_stage(0), "the stage of zero_optimization is 0, not 1, 2 or 3$"),
    (with_stage("auto"), "the stage of zero_optimization is auto, not 1, 2 or 3$"),
    (with_stage(2, reduce_bucket_size="auto"), 'has reduce_bucket_size "auto": say a value$'),
    (with_stage(2, reduce_bucket_size=0), "has a wrong reduce_bucket_size: .* greater than 0$"),
    (with_stage(2, bucket=1), "has a wrong bucket: Extra inputs are not permitted$"),
    (with_stage(2, offload_optimizer={"device": "cpu"}), "offload_optimizer is not supported$"),
    ({**with_stage(2), "optimizer": {}}, "leave out optimizer, said by --optimizer adamw and "),
    ({**with_stage(2), "fp16": {"enabled": True}}, "leave out fp16, said by --use-bf16$"),
    ({**with_stage(2), "train_batch_size": "auto"}, "leave out train_batch_size, said by --max"),
    ({**with_stage(2), "zero_optimisation": {}}, "unknown zero_optimisation, known are zero_"),
    ({**with_stage(2), "gradient_clipping": -1}, "gradient_clipping -1 must be at least 0$"),
    ({**with_stage(2), "gradient_clipping": "auto"}, "gradient_clipping auto must be at least 0$"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, config, sentence):
    with pytest.raises((InputError, FileNotFoundError), match=sentence) as error:
        zero.deepspeed_config(flags(tmp_path, config))
    assert str(error.value).startswith(f"--deepspeed {tmp_path}/zero.json")


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_that_are_there(tmp_path, stage):
    path = LOCAL / f"deepspeed_zero{stage}.json"
    fp16_too = flags(tmp_path, None, deepspeed=path, use_fp16=True, use_bf16=True)
    assert zero.deepspeed_config(fp16_too) == with_stage(stage)


def test_what_the_program_says_itself():
    whole = zero.whole_config(with_stage(2), torch.float32)
    assert whole == {
        **with_stage(2), "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
    }  # fmt: skip
    clipped = zero.whole_config({**with_stage(2), "gradient_clipping": 2.0}, torch.bfloat16)
    assert clipped["gradient_clipping"] == 2.0
    assert clipped["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
