"""A model divided among the ranks: DeepSpeed's ZeRO (arXiv 1910.02054), stages 1, 2 and 3.

Checkpoints do not show it: parameters and optimizer are gathered, and saved as a training without
DeepSpeed saves them. Such a training, and any stage on any number of ranks, can go on from them.
DeepSpeed is imported where it is needed: nothing else of this project needs it.
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

from speechllm.checkpoint_file import copy_to_cpu
from speechllm.errors import InputError
from speechllm.training.distributed import Ranks
from speechllm.training.engine import Engine

REQUIREMENTS = "local/requirements-deepspeed.txt"
SUPPORTED = ("zero_optimization", "gradient_clipping")
SAID_BY_FLAGS = {
    "optimizer": "--optimizer adamw and --base-lr",
    "scheduler": "--lr-schedule",
    "fp16": "--use-bf16",
    "bf16": "--use-bf16",
    "torch_autocast": "--use-bf16",
    "train_batch_size": "--max-duration and --grad-accum",
    "train_micro_batch_size_per_gpu": "--max-duration",
    "gradient_accumulation_steps": "--grad-accum",
    "managed_gradient_accumulation": "--grad-accum",
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, in its shape


def deepspeed_config(args) -> dict | None:
    """What the file of --deepspeed says, None without one.

    Raises:
      FileNotFoundError, ValueError: one sentence; the flags do not go together, DeepSpeed is
        missing, or the file says what it cannot.
    """
    if not args.deepspeed:
        return None
    if args.optimizer != "adamw":
        raise InputError(
            f"--deepspeed needs --optimizer adamw: --optimizer {args.optimizer} looks at whole "
            "parameters, of which each process has only a part"
        )
    if args.use_fp16 and not args.use_bf16:
        raise InputError(
            "--deepspeed does not go with --use-fp16 true: use --use-bf16 true or --use-fp16 false"
        )
    if find_spec("deepspeed") is None:
        raise InputError(f"--deepspeed needs DeepSpeed: pip install -r {REQUIREMENTS}")
    return read_config(Path(args.deepspeed))


def read_config(path: Path) -> dict:
    """DeepSpeed's JSON file, as far as it is ours.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed {path} is missing")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--deepspeed {path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"--deepspeed {path} is no JSON object")
    for key in config:
        if key in SAID_BY_FLAGS:
            raise InputError(f"--deepspeed {path}: leave out {key}, said by {SAID_BY_FLAGS[key]}")
        if key not in SUPPORTED:
            raise InputError(f"--deepspeed {path}: unknown {key}, known are {', '.join(SUPPORTED)}")
    clipping = config.get("gradient_clipping", 0)
    if not isinstance(clipping, (int, float)) or clipping < 0:
        raise InputError(f"--deepspeed {path}: gradient_clipping {clipping} must be at least 0")
    _check_zero(config.get("zero_optimization"), path)
    return config


def _check_zero(zero: object, path: Path) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise InputError(
            f"--deepspeed {path}: the stage of zero_optimization is {stage}, not 1, 2 or 3"
        )
    for key, value in zero.items():
        if value == "auto":
            raise InputError(f'--deepspeed {path}: zero_optimization has {key} "auto": say a value')
        if key.startswith(("offload_", "cpu_offload")):
            raise InputError(f"--deepspeed {path}: {key} is not supported")
    try:
        _import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        wrong = error.errors()[0]
        key = ".".join(map(str, wrong["loc"]))
        raise InputError(
            f"--deepspeed {path}: zero_optimization has a wrong {key}: {wrong['msg']}"
        ) from None


class ZeroEngine(Engine):
    """Each rank holds a part of the optimizer, from stage 2 of gradients, from 3 of parameters."""

    divided = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        ranks: Ranks,
        dtype: torch.dtype,
        config: dict,
    ):
        """`config` is of `read_config`. Afterwards `model` belongs to DeepSpeed.

        `optimizer` has all parameters of the model that are trained in one group, in order.
        """
        self.module, self.optimizer, self.ranks, self.dtype = model, optimizer, ranks, dtype
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=False)
        self.stage = config["zero_optimization"]["stage"]
        self.shapes = {p: p.shape for p in model.parameters() if p.requires_grad}
        for parameter in model.parameters():
            if parameter.dim() == 0:  # DeepSpeed cannot send these
                parameter.data = parameter.data.view(1)
        deepspeed = _ready_deepspeed(ranks)
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=whole_config(config, dtype)
        )

    def gathering(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged in each backward pass: a rank has no room for all of its own."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def recover(self) -> None:
        """
        Raises:
          ValueError: always; each pass is full of what all ranks do together.
        """
        raise InputError(
            f"rank {self.ranks.rank} is out of memory, and with --deepspeed no batch can be left "
            "out: use a lower --max-duration, --activation-checkpointing true or a higher stage"
        )

    def gradients_finite(self) -> Tensor:
        """Said by `step` instead, where DeepSpeed looks at its parts."""
        return torch.tensor(True)

    def step(self) -> bool:
        """Where they were not finite on some rank, DeepSpeed forgets them on all."""
        self.model.step()
        return not self.model.optimizer.overflow

    def skip_step(self) -> None:
        """Gradients of a loss that is not finite are not either."""
        self.step()

    def value(self, parameter: Tensor) -> Tensor:
        """All ranks take part, and only the one that saves it keeps it: elsewhere it is empty."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._kept(safe_get_full_fp32_param(parameter), parameter)

    def _kept(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """On the rank that saves it a copy on the CPU, of the parameter's own shape."""
        if not self.ranks.is_main:
            return torch.empty(0)
        return copy_to_cpu(whole).view(self.shapes[parameter])

    def state_dict(self) -> dict:
        """What AdamW's would be without DeepSpeed; gathered one moment at a time."""
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
        if self.stage < 3:  # finds these; otherwise after the first step
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self.shapes):
            for name in MOMENTS:
                self._load_moment(parameter, name, saved["state"][number][name])
        [options] = saved["param_groups"]
        [group] = self.optimizer.param_groups
        group.update((name, value) for name, value in options.items() if name != "params")

    def _load_moment(self, parameter: Tensor, name: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        whole = whole.to(self.ranks.device)
        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, name)
            return
        # DeepSpeed's function for the whole fails where the ranks do not divide its elements.
        size = parameter.ds_tensor.numel()
        padded = pad(whole.flatten(), (0, size * self.ranks.world_size - whole.numel()))
        mine = padded.split(size)[self.ranks.rank]
        safe_set_local_optimizer_state(parameter, mine, name)

    def _parts(self) -> list[Tensor]:
        """What AdamW has instead of the parameters: this rank's parts, end to end, in float32."""
        if self.stage == 3:
            return self.model.optimizer.fp32_partitioned_groups_flat
        return self.model.optimizer.single_partition_of_fp32_groups


def whole_config(config: dict, dtype: torch.dtype) -> dict:
    """With what the program decides itself; DeepSpeed would clip gradients unless told not to."""
    config = {
        "gradient_clipping": 0.0,
        **config,
        "train_micro_batch_size_per_gpu": 1,  # must be there, and is not used
        "managed_gradient_accumulation": False,  # a step is where the loop has it
    }
    if dtype != torch.float32:
        config["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}
    return config


def _ready_deepspeed(ranks: Ranks):
    """DeepSpeed as a module, told what it would ask MPI and a compiler."""
    cpu = ranks.device.type == "cpu"
    os.environ.setdefault("LOCAL_RANK", str(ranks.rank if cpu else ranks.device.index))
    if not dist.is_initialized():  # DeepSpeed wants a group also of one process
        backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _import_deepspeed()
    if cpu:  # it would be compiled when first used: sums in shared memory
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    return deepspeed


def _import_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    return deepspeed
