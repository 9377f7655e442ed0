"""A pretended GPU: a device "gpu" whose numbers are computed on the CPU.

What a real GPU refuses it refuses: tensors of two devices in one operation, `.numpy()` of its
tensors, a generator of another device. So code that was never run on a GPU can be searched,
on a machine without one, for what is left on the wrong device. It says nothing of speed,
memory and rounding, and it knows no fake tensors, so `plan` cannot run on it.

    with pretend_gpu.machine() as device:
        model.to(device)

A tensor of it, `OnGpu`, wraps one of the CPU. Each operation of PyTorch comes to `run`, which
checks the devices, unwraps, computes and wraps again. PyTorch keeps the device until the process
ends, so tests that use it need a process of their own.
"""

import contextlib
import copy
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._to_copy.default}  # which may go from device to device
TAKES_INDICES = {  # whose indices may lie on the CPU while the tensor is on the GPU
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
}
NO_ARRAY = "can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first"
CPU = torch.device("cpu")


class Backend:
    """What `torch.gpu` is: a module of one device, which draws from the CPU's random numbers."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = is_autocast_enabled = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed = manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=0: None)
    synchronize = staticmethod(lambda device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        layout = inner.size(), inner.stride(), inner.storage_offset()
        settings = {"dtype": inner.dtype, "device": DEVICE, "requires_grad": requires_grad}
        with torch.inference_mode(False):  # in which PyTorch makes no wrappers
            return torch.Tensor._make_wrapper_subclass(cls, *layout, **settings)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    # what does not come to `run`
    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError(NO_ARRAY)

    __array__ = numpy

    def __format__(self, spec):
        return format(self.inner.item() if self.dim() == 0 else self.inner, spec)

    def __deepcopy__(self, memo):
        new = OnGpu(copy.deepcopy(self.inner.detach(), memo), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new


def run(function, args, kwargs):
    """One operation: devices checked, tensors unwrapped, the result wrapped again."""
    leaves = tree_leaves((args, kwargs))
    wrapped = {id(t.inner): t for t in leaves if isinstance(t, OnGpu)}
    asked = kwargs.get("device")
    on_gpu = bool(wrapped) if asked is None else is_gpu(asked)
    check_devices(function, args, leaves, on_gpu)
    if not wrapped and not on_gpu:
        return function(*args, **kwargs)
    if torch.is_inference_mode_enabled():  # in which nobody took it apart before
        result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    args, kwargs = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
    if "device" in kwargs:
        kwargs = kwargs | {"device": CPU}
    result = function(*args, **kwargs)
    if function is ATEN.copy_.default:
        on_gpu = id(result) in wrapped  # it returns its first argument

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not on_gpu:
            return value
        return wrapped[id(value)] if id(value) in wrapped else OnGpu(value)

    return tree_map(wrap, result)


def check_devices(function, args, leaves, on_gpu: bool) -> None:
    """Refuse, as a GPU does, what lies on two devices."""
    for generator in (g for g in leaves if isinstance(g, torch._C.Generator)):
        if (generator._cdata in Generator.of_gpu) != on_gpu:
            raise RuntimeError("Expected a generator of the tensors' own device type")
    here = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu)]
    if function in TAKES_INDICES and isinstance(args[0], OnGpu):
        indices = {id(t) for t in tree_leaves(args[1])}
        here = [t for t in here if id(t) not in indices]
    there = any(isinstance(t, OnGpu) for t in leaves)
    if there and function not in COPIES and any(t.dim() > 0 for t in here):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found gpu:0 and cpu ({function})"
        )


def is_gpu(device) -> bool:
    return torch.device(device).type == "gpu"


class Generator(torch.Generator):
    """A generator that says a device; its numbers are the CPU's.

    PyTorch hands `run` another object for the same generator, known by its address.
    """

    of_gpu = set()  # addresses

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.place = torch.device(device)
        if self.place.type == "gpu":
            self.of_gpu.add(self._cdata)

    def __del__(self):
        self.of_gpu.discard(self._cdata)

    @property
    def device(self):
        return self.place


class Machine(TorchDispatchMode):
    """Brings to `run` what has no tensor of the GPU yet, such as `torch.zeros(device="gpu")`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def made_on_cpu_first(make):
    """`torch.tensor` or `torch.as_tensor`, which PyTorch does not bring to `run`."""

    def maker(data, *args, device=None, **kwargs):
        if device is None or not is_gpu(device):
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return maker


@contextlib.contextmanager
def machine():
    """A machine with the pretended GPU; yields its device."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # for `model.to("gpu")`
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        for make in (torch.tensor, torch.as_tensor):
            stack.enter_context(mock.patch.object(torch, make.__name__, made_on_cpu_first(make)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(Machine())
        yield DEVICE


def register() -> list[torch.library.Library]:
    """Tell PyTorch of the device, and that its operations are `run`'s."""
    _setup_privateuseone_for_python_backend("gpu", Backend())
    libraries = [torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")]
    aten, everything = libraries
    for name in ("empty_strided", "empty"):
        make = getattr(torch, name)
        overload = {"empty": "empty.memory_format"}.get(name, name)

        def on_gpu(*sizes, dtype=None, make=make, **_):
            return OnGpu(make(*sizes, dtype=dtype))

        aten.impl(overload, on_gpu, "PrivateUse1")
    everything.fallback(
        lambda function, *args, **kwargs: run(function, args, kwargs), "PrivateUse1"
    )
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return libraries


LIBRARIES = register()  # kept, or what they register is gone
DEVICE = torch.device("gpu", 0)
