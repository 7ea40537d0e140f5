"""ZeroEngine: sharded training with DeepSpeed's ZeRO (arXiv 1910.02054), stages 1, 2 and 3.

Checkpoints are the same as without DeepSpeed: parameters and optimizer state are gathered. Training
can resume from them with or without DeepSpeed, and with any stage or number of ranks. DeepSpeed is
imported only where it is used.
"""

import json
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from speechllm.checkpoints import copy_to_cpu
from speechllm.distributed import DistEnv
from speechllm.errors import InputError
from speechllm.training.engine import Engine

REQUIREMENTS = "local/requirements-deepspeed.txt"
SUPPORTED = ("zero_optimization", "gradient_clipping")  # without offloading
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter, of the same shape


def deepspeed_config(path: Path | None, dtype: torch.dtype) -> dict | None:
    """Read the --deepspeed file; return None without the flag.

    Raises:
      FileNotFoundError, InputError: the precision is float16, DeepSpeed is not installed, or the
        file is missing or invalid.
    """
    if not path:
        return None
    if dtype == torch.float16:  # also the default on a GPU
        raise InputError(
            "--deepspeed does not support float16: use --use-bf16 true or --use-fp16 false"
        )
    if find_spec("deepspeed") is None:
        raise InputError(f"--deepspeed needs DeepSpeed: pip install -r {REQUIREMENTS}")
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed {path} is missing")
    try:
        config = json.loads(path.read_text())
        _check(config)
    except ValueError as error:  # also pydantic's and json's
        reason = " ".join(str(error).split())
        raise InputError(f"--deepspeed {path} is invalid: {reason}") from None
    return config


def _check(config: object) -> None:
    """Raise ValueError if DeepSpeed or this module does not support an entry."""
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ValueError("it must be a JSON object with zero_optimization")
    zero = config["zero_optimization"]
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"the stage of zero_optimization is {zero.get('stage')}, not 1, 2 or 3")
    offload = [name for name in zero if "offload" in name]
    for name in sorted(config.keys() - {*SUPPORTED}) + offload:
        raise ValueError(
            f"{name} is not supported: flags set everything except {' and '.join(SUPPORTED)}"
        )
    float(config.get("gradient_clipping", 0))
    _import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**zero)


class ZeroEngine(Engine):
    """Engine that shards optimizer state, gradients from stage 2, and parameters in stage 3."""

    is_sharded = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        dist_env: DistEnv,
        dtype: torch.dtype,
        config: dict,
    ):
        """
        Args:
          model: managed by DeepSpeed from then on.
          optimizer: contains all trainable parameters in one group, in order.
          config: as returned by `deepspeed_config`.
        """
        self.module, self.optimizer, self.dist_env, self.dtype = model, optimizer, dist_env, dtype
        self.scaler = torch.amp.GradScaler(dist_env.device.type, enabled=False)
        self.stage = config["zero_optimization"]["stage"]
        self.shapes = {p: p.shape for p in model.parameters() if p.requires_grad}
        for parameter in model.parameters():
            if parameter.dim() == 0:  # DeepSpeed cannot send scalars
                parameter.data = parameter.data.view(1)
        deepspeed = _ready_deepspeed(dist_env)
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=whole_config(config, dtype)
        )

    def grad_sync(self, last: bool) -> AbstractContextManager:
        """Return a null context: gradients are averaged in every backward pass."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def recover_from_oom(self) -> None:
        """Fail: all ranks communicate throughout each pass, so no batch can be skipped.

        Raises:
          InputError: always.
        """
        raise InputError(
            f"rank {self.dist_env.rank} is out of memory, and with --deepspeed no batch can be "
            "skipped: use a lower --max-duration, --activation-checkpointing true or a higher stage"
        )

    def gradients_finite(self) -> Tensor:
        """Return True: DeepSpeed checks its shards in `step`."""
        return torch.tensor(True)

    def step(self) -> bool:
        """Take a step; return false if DeepSpeed skipped it because of non-finite gradients."""
        self.model.step()
        return not self.model.optimizer.overflow

    def skip_step(self) -> None:
        """Call `step`: a non-finite loss has non-finite gradients, which DeepSpeed skips."""
        self.step()

    def full_param(self, parameter: Tensor) -> Tensor:
        """Return a gathered CPU copy of the parameter on rank 0, an empty tensor elsewhere."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._kept(safe_get_full_fp32_param(parameter), parameter)

    def _kept(self, whole: Tensor, parameter: Tensor) -> Tensor:
        if not self.dist_env.is_main:
            return torch.empty(0)
        return copy_to_cpu(whole).view(self.shapes[parameter])

    def state_dict(self) -> dict:
        """Return AdamW's state in the format used without DeepSpeed, gathered moment by moment."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self.optimizer.state[self._parts()[0]]["step"]
        state = {}
        for number, parameter in enumerate(self.shapes):
            moments = {
                name: self._kept(safe_get_full_optimizer_state(parameter, name), parameter)
                for name in MOMENTS
            }
            state[number] = {"step": copy_to_cpu(step), **moments}
        [group] = self.optimizer.param_groups
        options = {name: value for name, value in group.items() if name != "params"}
        groups = [{**options, "params": list(state)}]
        return {"optimizer": {"state": state, "param_groups": groups}, "grad_scaler": {}}

    def load_state_dict(self, state: dict) -> None:
        saved = state["optimizer"]
        for part in self._parts():
            self.optimizer.state[part] = {
                "step": saved["state"][0]["step"].clone(),
                **{name: torch.zeros_like(part) for name in MOMENTS},
            }
        if self.stage < 3:  # otherwise initialized after the first step
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self.shapes):
            for name in MOMENTS:
                self._load_moment(parameter, name, saved["state"][number][name])
        [options] = saved["param_groups"]
        [group] = self.optimizer.param_groups
        group.update((name, value) for name, value in options.items() if name != "params")

    def _load_moment(self, parameter: Tensor, name: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        whole = whole.to(self.dist_env.device)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, name)
            return
        # DeepSpeed's function for whole tensors fails unless the ranks divide their size.
        size = parameter.ds_tensor.numel()
        padded = pad(whole.flatten(), (0, size * self.dist_env.world_size - whole.numel()))
        mine = padded.split(size)[self.dist_env.rank]
        safe_set_local_optimizer_state(parameter, mine, name)

    def _parts(self) -> list[Tensor]:
        """Return AdamW's parameters: this rank's concatenated shards in float32."""
        if self.stage == 3:
            return self.model.optimizer.fp32_partitioned_groups_flat
        return self.model.optimizer.single_partition_of_fp32_groups


def whole_config(config: dict, dtype: torch.dtype) -> dict:
    """Return the config with options set by flags, and without DeepSpeed's default clipping."""
    config = {
        "gradient_clipping": 0.0,
        **config,
        "train_micro_batch_size_per_gpu": 1,  # required but unused
        "managed_gradient_accumulation": False,  # the trainer decides when to step
    }
    if dtype != torch.float32:
        config["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}
    return config


def _ready_deepspeed(dist_env: DistEnv):
    """Import DeepSpeed with settings that avoid MPI and a compiler."""
    cpu = dist_env.device.type == "cpu"
    os.environ.setdefault("LOCAL_RANK", str(dist_env.rank if cpu else dist_env.device.index))
    if not dist.is_initialized():  # DeepSpeed needs a process group even for one process
        backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _import_deepspeed()
    if cpu:  # otherwise reductions in shared memory are compiled at first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions that torch 2.13 renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    return deepspeed


def _import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    return deepspeed
