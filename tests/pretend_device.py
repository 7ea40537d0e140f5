"""A pretend accelerator on the CPU: tensors that claim to be on another device, with real data.

    with pretend_device() as device:
        model.to(PRETEND)(features.to(PRETEND), lens)
    print(device.waits, device.copies)

Inside the context a tensor on the device `meta` has data on the CPU, and every operation runs.
As on a GPU, an operation that mixes devices raises. What makes the CPU wait for a GPU (`.item()`,
`.tolist()`, `nonzero`, a mask as an index, a copy to the CPU) and copies to the device are counted
by the line that causes them.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from speechllm.models.zipformer import layer

PRETEND = torch.device("meta")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class DeviceTensor(torch.Tensor):
    """A tensor on the pretend device; `data_on_cpu` is its content."""

    @staticmethod
    def __new__(cls, data, counter):
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device=PRETEND,
        )  # fmt: skip
        made.data_on_cpu, made.counter = data, counter
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.data_on_cpu!r})"

    def tolist(self):
        self.counter.wait("tolist")
        return self.data_on_cpu.tolist()

    def __reduce_ex__(self, protocol):
        self.counter.wait("pickle")
        return self.data_on_cpu.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        return first.counter.run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Runs operations on the data of DeviceTensors, and counts waits and copies.

    Attributes:
      waits, copies: Counters of `<operation> at <file>:<line> <function>`.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.copies, self.active = Counter(), Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def wait(self, operation):
        self.waits[f"{operation} at {_caller()}"] += 1

    def copy(self, operation):
        self.copies[f"{operation} at {_caller()}"] += 1

    def run(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        creates = target is not None and torch.device(target) == PRETEND
        if not on_device and not creates:
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._transfer(func, name, args, kwargs)
        self._check_devices(name, args, tensors)
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        if creates:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = func(*tree_map(_data, args), **tree_map(_data, kwargs))
        in_place = {id(x.data_on_cpu): x for x in on_device}

        def wrap(x):
            return in_place[id(x)] if id(x) in in_place else self.placed(x)

        return tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, result)

    def placed(self, tensor):
        return tensor if isinstance(tensor, DeviceTensor) else DeviceTensor(tensor, self)

    def _transfer(self, func, name, args, kwargs):
        if name == "copy_":
            source, to_device = args[1], isinstance(args[0], DeviceTensor)
        else:
            source, target = args[0], kwargs.get("device")
            to_device = PRETEND == (source.device if target is None else torch.device(target))
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        if to_device and not isinstance(source, DeviceTensor):
            self.copy(name)
        elif isinstance(source, DeviceTensor) and not to_device:
            self.wait(f"{name} to the CPU")
        result = func(*map(_data, args), **kwargs)
        if name == "copy_":
            return args[0]
        return self.placed(result) if to_device else result

    def _check_devices(self, name, args, tensors):
        """Raise for mixed devices; as on a GPU, numbers, indices and CTC lengths may be mixed."""
        if name.startswith("_ctc_loss"):
            return
        indices = [x for x in tree_leaves(args[1]) if x is not None] if name in INDEXING else []
        for index in indices:
            if index.dtype == torch.bool:
                self.wait("a mask as an index")
            elif not isinstance(index, DeviceTensor):
                self.copy("an index")
        on_cpu = [x for x in tensors if not isinstance(x, DeviceTensor)]
        if bad := [x for x in on_cpu if x.dim() and not any(x is index for index in indices)]:
            shape = tuple(bad[0].shape)
            raise RuntimeError(f"{name} at {_caller()}: a tensor {shape} on the CPU among others")


class _Factories(TorchFunctionMode):
    """`torch.tensor(…, device=…)` and a list as an index bypass the dispatcher."""

    def __init__(self, counter):
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == PRETEND:
            del kwargs["device"]
            made = func(*args, **kwargs)
            if made.numel():  # transformers makes empty ones
                self.counter.copy("tensor")
            return self.counter.placed(made)
        if func is torch.Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            self.counter.copy("new_tensor")
            data = torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs})
            return self.counter.placed(data)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            if isinstance(args[0], DeviceTensor):
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                args = (args[0], tuple(map(self._index, index)), *args[2:])
        return func(*args, **kwargs)

    def _index(self, index):
        if not isinstance(index, list):
            return index
        self.counter.copy("a list as an index")
        return self.counter.placed(torch.tensor(index))


@contextmanager
def pretend_device():
    """Yield the PretendDevice: the device `meta`, once a module is moved to it.

    Until then `meta` is torch's own, on which transformers builds a model before it loads it.
    """
    device, move = PretendDevice(), nn.Module.to
    with ExitStack() as stack:

        def to(module, *args, **kwargs):
            if args[:1] != (PRETEND,):
                return move(module, *args, **kwargs)
            if not device.active:
                device.active = True
                stack.enter_context(device)
                stack.enter_context(_Factories(device))
            return _place(module, device)

        stack.enter_context(patch.object(nn.Module, "to", to))
        # A tensor kept from torch's own `meta`, or from here, would be on the wrong device.
        layer._embeddings.cache_clear()
        stack.callback(layer._embeddings.cache_clear)
        yield device


def _place(module: nn.Module, device: PretendDevice) -> nn.Module:
    """Move parameters and buffers; shared ones stay shared."""
    moved = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p not in moved:
                moved[p] = nn.Parameter(device.placed(p.detach()), p.requires_grad)
            part._parameters[name] = moved.get(p)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else device.placed(buffer)
    return module


def _data(x):
    return x.data_on_cpu if isinstance(x, DeviceTensor) else x


def _caller():
    """Return the innermost line of this project, or else of a library."""
    stack = [f for f in traceback.extract_stack() if f.filename != __file__]
    ours = [frame for frame in stack if "/src/" in frame.filename]
    frame = (ours or [f for f in stack if "/torch/" not in f.filename])[-1]
    return f"{frame.filename.split('/src/')[-1]}:{frame.lineno} {frame.name}"
