"""The few functions of the CUDA driver that running an engine needs, called through ctypes.

libcuda comes with every NVIDIA driver, on a desktop and on a Jetson, so nothing has to be installed. Declared after
the headers of CUDA 12.9 and 13.5; not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

import numpy as np

from bar_edge.errors import BarEdgeError, EnvironmentLacks

#: exported name -> types of the arguments; every function returns an error code. A device pointer is a number.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
STREAM_NON_BLOCKING = 1
#: other threads may go on using CUDA while this one captures
CAPTURE_THREAD_LOCAL = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What an engine is built for."""

    name: str
    #: such as 8.7 for Jetson Orin
    compute_capability: str
    #: CUDA version that the driver supports, such as 12.6
    cuda: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """Pinned host memory as an array, and as many bytes on the device."""

    host: np.ndarray
    host_address: int
    device_address: int


def load_libcuda() -> Any:
    """Open the driver's library; raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


class Cuda:
    """The first GPU in its primary context (TensorRT's), and one stream on it.

    Raises EnvironmentLacks without a driver or a GPU.
    """

    def __init__(self) -> None:
        remedy = "run it on the device with the GPU, or export --target trt-bundle and build there"
        try:
            self._library = load_libcuda()
        except OSError as error:
            raise EnvironmentLacks("an NVIDIA GPU and its driver", got=f"{error}", remedy=remedy) from error
        for name, arguments in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        try:
            self.call("cuInit", 0)
            self._device = self._new(c_int, "cuDeviceGet", 0)
        except BarEdgeError as error:
            raise EnvironmentLacks("an NVIDIA GPU", got=error.got, remedy=remedy) from error
        self._context = self._new(c_void_p, "cuDevicePrimaryCtxRetain", self._device)
        self.call("cuCtxSetCurrent", self._context)
        self.stream: int = self._new(c_void_p, "cuStreamCreate", STREAM_NON_BLOCKING)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function; raises BarEdgeError with CUDA's name for the error."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            got = (text.value or b"an unknown error").decode()
            raise BarEdgeError(f"{name} to succeed", got=f"{got} ({code})", consequence="nothing was run")

    def gpu(self) -> Gpu:
        """Describe the device."""
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), self._device)
        major, minor = (
            self._new(c_int, "cuDeviceGetAttribute", attribute, self._device)
            for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)
        )
        version = self._new(c_int, "cuDriverGetVersion")
        return Gpu(
            name=name.value.decode(),
            compute_capability=f"{major}.{minor}",
            cuda=f"{version // 1000}.{version % 1000 // 10}",
        )

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Allocate an array on both sides."""
        size = max(1, math.prod(shape) * dtype.itemsize)
        host = self._new(c_void_p, "cuMemAllocHost_v2", size)
        device = self._new(c_ulonglong, "cuMemAlloc_v2", size)
        memory = memoryview((ctypes.c_byte * size).from_address(host)).cast("B")
        array = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
        return Buffer(host=array, host_address=host, device_address=device)

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back; its array must not be used any more."""
        self.call("cuMemFreeHost", buffer.host_address)
        self.call("cuMemFree_v2", buffer.device_address)

    def to_device(self, buffer: Buffer) -> None:
        """Queue the copy of a buffer to the device."""
        self.call("cuMemcpyHtoDAsync_v2", buffer.device_address, buffer.host_address, buffer.host.nbytes, self.stream)

    def to_host(self, buffer: Buffer) -> None:
        """Queue the copy of a buffer from the device."""
        self.call("cuMemcpyDtoHAsync_v2", buffer.host_address, buffer.device_address, buffer.host.nbytes, self.stream)

    def wait(self) -> None:
        """Wait until everything queued is done."""
        self.call("cuStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """Record what is queued from now on instead of running it."""
        self.call("cuStreamBeginCapture_v2", self.stream, CAPTURE_THREAD_LOCAL)

    def end_capture(self) -> int:
        """Return what was recorded as a graph that can be launched."""
        graph = self._new(c_void_p, "cuStreamEndCapture", self.stream, first=False)
        launchable: int = self._new(c_void_p, "cuGraphInstantiateWithFlags", graph, 0)
        self.call("cuGraphDestroy", graph)
        return launchable

    def launch(self, graph: int) -> None:
        """Queue a graph."""
        self.call("cuGraphLaunch", graph, self.stream)

    def drop_graph(self, graph: int) -> None:
        """Give a graph back."""
        self.call("cuGraphExecDestroy", graph)

    def event(self) -> int:
        """Make an event that `mark` puts into the queue."""
        made: int = self._new(c_void_p, "cuEventCreate", 0)
        return made

    def mark(self, event: int) -> None:
        """Queue an event: it notes when everything before it is done."""
        self.call("cuEventRecord", event, self.stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the time between two events that have happened."""
        return float(self._new(c_float, "cuEventElapsedTime", start, end))

    def _new(self, kind: Any, name: str, *arguments: Any, first: bool = True) -> Any:
        """Call a function that writes its result through a pointer, its first argument or its last."""
        result = kind()
        pointer = ctypes.byref(result)
        self.call(name, *((pointer, *arguments) if first else (*arguments, pointer)))
        return result.value
