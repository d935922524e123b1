"""A pytest plugin for machines without a GPU: the tests marked `gpu` on a CUDA device made of host memory.

    python -m pytest -p tests.emulated_cuda tests/gpu tests/model/test_frame_step.py -m gpu

Numbers come from the CPU's kernels. This finds most operations that mix tensors of the CPU and of the GPU, and wrong
arguments of the variable-length kernel. It does not test CUDA's kernels, graph capture, compilation, generators, the
order of asynchronous work, memory or speed. device.cpp is compiled against the headers of the installed torch (2.13
tried) in about 20 seconds, once per process of pytest-xdist.

Needs g++ and a torch built without CUDA, which must not be imported yet.
"""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILER = ("g++", "-std=c++20", "-shared", "-fPIC", "-O1")
LIBRARIES = ("c10", "torch_cpu")
SKIPPED = {
    "test_with_compilation.py": "nothing is compiled for an emulated device",
    "test_a_root_mean_square_is_one_operation_each_way": "CUDA's own kernels",
    "test_the_micro_batch_that_is_chosen_fits_the_memory": "memory is not limited",
    "test_the_scale_small_gpu_learns_a_batch_in_50_steps": "takes an hour on a CPU",
}


def load_device() -> None:
    """Compile device.cpp and load it. UsageError where that is not possible."""
    if "torch" in sys.modules:  # which has looked for devices
        raise pytest.UsageError(
            "torch is imported already. Name the plugin on the command line: -p tests.emulated_cuda"
        )
    torch = Path(find_spec("torch").origin).parent
    include, libraries = torch / "include", torch / "lib"
    if (libraries / "libtorch_cuda.so").exists():
        raise pytest.UsageError(f"the torch in {torch} is built with CUDA. Leave out -p tests.emulated_cuda")
    if shutil.which(COMPILER[0]) is None:
        raise pytest.UsageError(f"tests.emulated_cuda needs {COMPILER[0]}, which is not installed (Debian: g++)")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "device.so")
        command = [*COMPILER, Path(__file__).parent / "device.cpp", "-o", target, f"-I{include}"]
        command += [f"-I{include / 'torch/csrc/api/include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        done = subprocess.run([*command, *(f"-l{name}" for name in LIBRARIES)], capture_output=True, text=True)
        if done.returncode:
            raise pytest.UsageError(f"device.cpp does not compile against the torch in {torch}:\n{done.stderr[-2000:]}")
        ctypes.CDLL(str(target))


class Event:
    """`torch.cuda.Event` of a device that has done its work when a call returns."""

    def __init__(self, *arguments, **options):
        self._time = 0.0

    def record(self, *arguments) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other._time - self._time)

    def synchronize(self) -> None:
        pass


class Properties:
    """`torch.cuda.get_device_properties` of a device whose peak is known."""

    name, major, minor, total_memory = "NVIDIA H100 80GB HBM3", 9, 0, 80 * 2**30


def on_device(attend):
    """`attend` of tests/model/varlen.py, with its arguments and what the kernel checks beyond it."""
    import torch

    @functools.wraps(attend)
    def checked(queries, keys, values, starts, key_starts, *lengths, **options):
        assert {part.device.type for part in (queries, keys, values, starts, key_starts)} == {"cuda"}
        assert queries.dtype in (torch.float16, torch.bfloat16)
        assert queries.shape[2] % 8 == 0
        return attend(queries, keys, values, starts, key_starts, *lengths, **options)

    return checked


def replace_python_functions() -> None:
    """What torch asks its CUDA library for, and its kernels and graphs."""
    import torch
    from torch.cuda.amp import common
    from torch.nn.attention import varlen

    from tests.model.varlen import attend_causally

    cuda, nothing = torch.cuda, lambda *arguments, **options: None
    cuda.is_available = cuda.is_bf16_supported = cuda.is_initialized = lambda *arguments, **options: True
    cuda._is_in_bad_fork = cuda.is_current_stream_capturing = lambda: False
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_properties = lambda *arguments: Properties
    cuda.get_device_name = lambda *arguments: Properties.name
    cuda.get_device_capability = lambda *arguments: (Properties.major, Properties.minor)
    cuda.max_memory_allocated = cuda.memory_allocated = cuda.max_memory_reserved = lambda *arguments: 0
    cuda._lazy_init = cuda.synchronize = cuda.set_device = cuda.manual_seed_all = nothing
    cuda.empty_cache = cuda.reset_peak_memory_stats = nothing
    cuda.Event, cuda.get_rng_state_all = Event, list
    common.amp_definitely_not_available = lambda: False
    varlen.varlen_attn = on_device(attend_causally)

    def as_bytes(storage):
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    of_host = torch.UntypedStorage.clone
    torch.UntypedStorage.clone = lambda self: (
        as_bytes(self).clone().untyped_storage() if self.device.type == "cuda" else of_host(self)
    )


def pytest_collection_modifyitems(items) -> None:
    from model import frame_step
    from tests.model.test_frame_step import record

    frame_step.capture_cuda = record
    for item in items:
        reason = SKIPPED.get(item.path.name) or SKIPPED.get(getattr(item, "originalname", item.name))
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


load_device()
replace_python_functions()
