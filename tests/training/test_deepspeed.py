"""DeepSpeed's ZeRO: two ranks train as without it, and write the same checkpoints.

One launch of two processes does all trainings; the functions named `rank_…` run in them.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from exp_dirs import validation_losses
from free_port import free_port
from tiny_speech_llm import SpeechLoss, speech_batch, speech_llm

import train
from speechllm.checkpoints import load_checkpoint
from speechllm.distributed import launch
from speechllm.errors import InputError
from speechllm.models.state_dict import load_trainable_state, trainable_state
from speechllm.models.zipformer.checkpoint import save_encoder
from speechllm.models.zipformer.config import SIZES
from speechllm.models.zipformer.encoder import ZipformerEncoder
from speechllm.training import deepspeed
from speechllm.training.config import TrainConfig
from speechllm.training.engine import Engine
from speechllm.training.resume import TrainState, save_checkpoint
from speechllm.training.trainer import Trainer
from speechllm.training.validate import validate

LOCAL = Path(__file__).resolve().parents[2] / "local"
STEPS = 4
# Parameters of a model this small would all stay whole, and in one piece.
SMALL = {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason=f"DeepSpeed is missing: see {deepspeed.REQUIREMENTS}"
)
ranks = pytest.mark.ranks


# ---- in the two processes


def make_engine(dist_env, stage=None, use_lora=False, dtype=torch.float32, start=None):
    """Train the LLM (or LoRA) and the second of two encoders; without a stage under DDP.

    start: checkpoint file to resume from.
    """
    model = speech_llm(use_lora, frozen=(True, False))
    checkpoint = load_checkpoint(start) if start else None
    if checkpoint:
        load_trainable_state(model, checkpoint["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    # torch's smaller eps would amplify the rounding of gradients near zero.
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)
    if stage is None:
        engine = Engine(model, optimizer, dist_env, dtype)
    else:
        config = {"zero_optimization": {"stage": stage, **(SMALL if stage == 3 else {})}}
        engine = deepspeed.ZeroEngine(model, optimizer, dist_env, dtype, config)
    if checkpoint:
        engine.load_state_dict(checkpoint)
    return engine


def make_trainer(engine):
    return Trainer(
        config=TrainConfig(tensorboard=False), engine=engine, schedule=None, loaders=None,
        loss=SpeechLoss(engine.module.chat), model_state=None,
    )  # fmt: skip


def train_steps(engine, grad_accum=1, steps=range(STEPS)):
    """Return the loss of each step; learning rate and rows of a rank change."""
    trainer, losses = make_trainer(engine), []
    for step in steps:
        engine.optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 2)
        rows = [[0, 1], [2, 3]][(engine.dist_env.rank + step) % 2]
        groups = [rows] if grad_accum == 1 else [[row] for row in rows]
        batches = [speech_batch(group) for group in groups]
        tokens = sum(map(trainer.loss.num_tokens, batches))
        tokens = int(engine.dist_env.sum(torch.tensor(tokens)))
        losses.append(trainer.step(batches, tokens).reduced(engine.dist_env).means()["loss"])
    return losses


def failing_steps(engine, failure):
    """Return the skipped steps, where rank 1 fails in the second."""
    trainer, skipped = make_trainer(engine), []
    for step in range(STEPS):
        is_main = engine.dist_env.is_main
        more = {"failure": failure} if step == 1 and not is_main else {}
        batch = speech_batch([0, 1] if is_main else [2, 3], **more)
        if trainer.step([batch], trainer.loss.num_tokens({"rows": range(4)})) is None:
            skipped.append(step)
    return skipped


def validation_loss(engine):
    """Return the loss, where rank 1 has a batch more than rank 0."""
    batches = [speech_batch([0, 1]), speech_batch([2]), speech_batch([3])]
    mine = batches[:1] if engine.dist_env.is_main else batches[1:]

    class WithFrames(SpeechLoss):
        def __call__(self, model, batch):
            return {**super().__call__(model, batch), "frames": torch.tensor(1)}

    return validate(engine, WithFrames(engine.module.chat), mine).means()["loss"]


def save(engine, path):
    """Write a checkpoint as Trainer does."""
    model, others = trainable_state(engine.module, engine.full_param), engine.state_dict()
    if engine.dist_env.is_main:
        save_checkpoint(path, model, TrainState(), **others)
    elif engine.is_sharded:
        assert not any(value.numel() for value in model.values()), "all ranks keep a copy"
    engine.dist_env.barrier()


# (stage, batches in a step, LoRA is trained instead of the LLM)
KINDS = [(1, 1, False), (2, 2, False), (3, 1, False), (3, 2, True)]


def rank_trainings(dist_env, folder):
    """Write losses and checkpoints of each training; those without DeepSpeed have stage None."""
    results = {}

    def run(name, *how, start=None, steps=range(STEPS), **options):
        stage, accum, use_lora = how
        engine = make_engine(dist_env, stage, use_lora, start=start, **options)
        results[name] = [*train_steps(engine, accum, steps), validation_loss(engine)]
        save(engine, folder / f"{name}.pt")

    for _, accum, use_lora in KINDS[1:]:
        run(f"None-{accum}-{use_lora}", None, accum, use_lora)
    for how in KINDS:
        run("-".join(map(str, how)), *how)
    run("uninterrupted", None, 1, False, steps=range(6))
    for stage, start, steps in ((2, 0, 2), (3, 2, 4), (None, 4, 6), (1, 4, 6)):
        before = folder / f"until-{start}.pt" if start else None
        name = f"until-{steps}" if stage != 1 else "until-6-again"
        run(name, stage, 1, False, start=before, steps=range(start, steps))
    for stage in (None, 1, 2, 3):
        engine = make_engine(dist_env, stage)
        results[f"skipped-{stage}"] = failing_steps(engine, "nan")
        save(engine, folder / f"failing-{stage}.pt")
    for stage in (None, 2, 3):  # last: DeepSpeed keeps autocast for all later engines
        run(f"bf16-{stage}", stage, 2, False, dtype=torch.bfloat16)
    torch.save(results, folder / f"rank-{dist_env.rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the checkpoints, and the losses of both ranks."""
    folder = tmp_path_factory.mktemp("zero")
    launch(rank_trainings, folder, 2, free_port())
    return folder, *(torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2))


def assert_close(first, second, tolerance):
    """Compare two checkpoints or parts of them."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key], tolerance)
    elif isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)
    elif isinstance(first, list) and first and isinstance(first[0], dict):
        for one, other in zip(first, second, strict=True):
            assert_close(one, other, tolerance)
    else:
        assert first == second


@needs_deepspeed
@ranks
@pytest.mark.parametrize("stage, accum, use_lora", KINDS)
def test_training_equals_ddp(trained, stage, accum, use_lora):
    folder, *ranks = trained
    name, reference = f"{stage}-{accum}-{use_lora}", f"None-{accum}-{use_lora}"
    for losses in ranks:
        assert losses[reference][0] - losses[reference][-1] > 0.05
        assert losses[name] == pytest.approx(losses[reference], abs=1e-5)
    assert_close(
        load_checkpoint(folder / f"{name}.pt"), load_checkpoint(folder / f"{reference}.pt"), 1e-5
    )


@needs_deepspeed
@ranks
def test_stages_resume_from_each_other_and_from_ddp(trained):
    folder, losses, _ = trained
    for last in ("until-6", "until-6-again"):
        steps = [losses[name][:-1] for name in ("until-2", "until-4", last)]
        assert sum(steps, []) == pytest.approx(losses["uninterrupted"][:-1], abs=1e-5)
        found, expected = (load_checkpoint(folder / f"{x}.pt") for x in (last, "uninterrupted"))
        assert_close(found, expected, 1e-5)


@needs_deepspeed
@ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_autocast_and_saved_parameters_are_not_rounded(trained, stage):
    folder, losses, _ = trained
    assert losses[f"bf16-{stage}"] == pytest.approx(losses["bf16-None"], abs=3e-3)
    assert losses[f"bf16-{stage}"] != pytest.approx(losses["None-2-False"], abs=1e-5)
    for name, value in load_checkpoint(folder / f"bf16-{stage}.pt")["model"].items():
        assert value.dtype == torch.float32
        assert value.numel() < 50 or not torch.equal(value, value.bfloat16().float()), name


@needs_deepspeed
@ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_non_finite_steps_are_skipped_as_by_ddp(trained, stage):
    folder, *ranks = trained
    for results in ranks:
        assert results[f"skipped-{stage}"] == results["skipped-None"] == [1]
    assert_close(
        load_checkpoint(folder / f"failing-{stage}.pt"),
        load_checkpoint(folder / "failing-None.pt"),
        1e-5,
    )


def rank_out_of_memory(dist_env, config):
    failing_steps(make_engine(dist_env, 2), "out of memory")


@needs_deepspeed
@ranks
def test_out_of_memory_ends_a_sharded_training():
    with pytest.raises(InputError, match="rank 1 is out of memory, and with --deepspeed no batch"):
        launch(rank_out_of_memory, None, 2, free_port())


# ---- train.py


@needs_deepspeed
@ranks
@pytest.mark.slow
@pytest.mark.usefixtures("restore_logging")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank would need a GPU")
def test_training_on_two_ranks_then_on_one_without_deepspeed(tiny_train_argv, tmp_path):
    """With an encoder size that other processes have, too."""
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
    assert not torch.distributed.is_initialized()
    train.main([*argv, "--start-epoch", "2"])
    first, second = (load_checkpoint(tmp_path / "exp" / f"epoch-{n}.pt") for n in (1, 2))
    assert second.keys() == first.keys() and second["batch_idx_train"] > first["batch_idx_train"]
    for name, value in first["model"].items():
        assert value.shape == second["model"][name].shape, name
    groups = [one["optimizer"]["param_groups"] for one in (first, second)]
    assert groups[0] == groups[1]
    losses = validation_losses(tmp_path / "exp")
    assert losses[-1] < losses[0]


# ---- errors


def with_stage(stage, **others):
    return {"zero_optimization": {"stage": stage, **others}}


def read(tmp_path, config):
    path = tmp_path / "zero.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    return deepspeed.deepspeed_config(path, torch.float32)


def test_float16_and_a_missing_installation_are_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="support float16: use --use-bf16 true or --use-fp16 fal"):
        deepspeed.deepspeed_config(tmp_path, torch.float16)
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install -r local/requirements-deepspeed.txt$"):
        read(tmp_path, with_stage(2))
    assert deepspeed.deepspeed_config(None, torch.float16) is None


@needs_deepspeed
@pytest.mark.parametrize("config, message", [
    (None, "zero.json is missing$"),
    ("{", "Expecting property name .* line 1 column 2"),
    ({}, "it must be a JSON object with zero_optimization$"),
    (with_stage(0), "the stage of zero_optimization is 0, not 1, 2 or 3$"),
    (with_stage(2, offload_param={}), "offload_param is not supported: flags set everything exc"),
    (with_stage(2, reduce_bucket_size="x"), "reduce_bucket_size"),
    ({**with_stage(2), "optimizer": {}}, "optimizer is not supported: flags set everything except"),
])  # fmt: skip
def test_invalid_files_are_errors(tmp_path, config, message):
    with pytest.raises((InputError, FileNotFoundError), match=message) as error:
        read(tmp_path, config)
    assert str(error.value).startswith(f"--deepspeed {tmp_path}/zero.json is ")


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_provided_files_are_valid(stage):
    path = LOCAL / f"deepspeed_zero{stage}.json"
    assert deepspeed.deepspeed_config(path, torch.bfloat16) == with_stage(stage)
