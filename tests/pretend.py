"""A device that is not there: tensors say that they are on `pretend:0` and compute on the CPU.

An operation on tensors of both devices raises, as on a GPU. `waits` counts the operations that would make the host wait
for the GPU: values that are read back, and operations whose result's shape depends on values.
"""

import collections
import itertools

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
READS_BACK = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "equal", "is_nonzero")
TAKES_CPU_INDICES = ("index", "index_put", "_index_put_impl", "_unsafe_index")
waits = collections.Counter()

if not hasattr(backend_registration, "_DummyBackendModule"):
    raise ImportError("this PyTorch has no backends in Python")
module = backend_registration._DummyBackendModule()
module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)


class Pretend(torch.Tensor):
    """A tensor that says it is on the pretend device. inner: the CPU's tensor that holds the values."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{NAME}:0", **layout)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Inside it, `.to("pretend")` and `device="pretend"` work."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


def inner(value):
    return value.inner if isinstance(value, Pretend) else value


def dispatch(operation, args, kwargs):
    """Runs an operation on the CPU; wraps its results if they belong on the pretend device."""
    name = operation._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]
    device = kwargs.get("device")
    wrap = bool(there) if device is None else torch.device(device).type == NAME
    if name in ("copy_", "_to_copy"):
        waits["to the CPU"] += bool(there) and not (isinstance(args[0], Pretend) if name == "copy_" else wrap)
    elif there and any(tensor.ndim for tensor in here):
        if name not in TAKES_CPU_INDICES or not isinstance(args[0], Pretend):
            raise RuntimeError(f"{name} got tensors of two devices")
    elif there and name in READS_BACK:
        waits[name] += 1
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    if device is not None and name != "_to_copy":
        kwargs["device"] = "cpu"
    found = operation(*tree_map(inner, args), **tree_map(inner, kwargs))
    if operation._schema.name.endswith("_") and not name.startswith("_"):  # in place
        return args[0]
    return tree_map(lambda leaf: Pretend(leaf) if wrap and isinstance(leaf, torch.Tensor) else leaf, found)


def move(model):
    """Puts a model's parameters and buffers onto the pretend device, in place; returns it."""
    for part in model.modules():
        for name, tensor in itertools.chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None:
                place = part._parameters if name in part._parameters else part._buffers
                moved = Pretend(tensor.detach())
                place[name] = torch.nn.Parameter(moved, requires_grad=False) if place is part._parameters else moved
    return model
