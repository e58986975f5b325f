"""llama.cpp's MoE feed-forward block on the CPU, through ctypes, as a competitor to time against.

Only ggml (the tensor library inside llama.cpp) is loaded; ``libggml-base.so`` and ``libggml-cpu.so`` are looked for in
``$GGML_LIB_DIR`` and in ``llama_cpp/lib`` of an installed ``llama-cpp-python``. The graph is the one that llama.cpp's
``build_moe_ffn`` builds after routing.
"""

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import pathlib
import sys
import weakref
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

import numpy as np
import numpy.typing as npt

KINDS = {"BF16": 30, "Q8_0": 8, "Q6_K": 14, "Q5_K": 13, "Q4_K": 12, "Q4_0": 2, "Q3_K": 11, "Q2_K": 10, "TQ2_0": 35,
         "TQ1_0": 34}  # enum ggml_type # fmt: skip
F32, I32, MADV_HUGEPAGE = 0, 26, 14

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("block", c_int64), ("interleave", c_int64), ("size", c_size_t), ("quant", c_bool),
                ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)))  # fmt: skip


_LogFn = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ExtraBuftsFn = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
_TYPES = {"v": None, "p": c_void_p, "s": c_char_p, "b": c_bool, "i": c_int, "q": c_int64, "z": c_size_t,
          "I": _InitParams, "T": ctypes.POINTER(_TypeTraits), "L": _LogFn}  # fmt: skip
_PROTOTYPES = """
version=s commit=s log_set=vLp init=pI free=vp tensor_overhead=z graph_overhead=z get_data=pp nbytes=zp row_size=ziq
get_type_traits=Ti quantize_chunk=zippqqqp new_tensor_2d=ppiqq new_tensor_3d=ppiqqq view_2d=pppqqzz mul_mat_id=ppppp
swiglu_split=pppp mul=pppp add=pppp cont=ppp set_input=vp set_output=vp new_graph=pp build_forward_expand=vpp
threadpool_pause=vp
gallocr_new=pp gallocr_alloc_graph=bpp gallocr_free=vp threadpool_params_init=vpi threadpool_new=pp threadpool_free=vp
backend_cpu_init=p backend_cpu_reg=p backend_cpu_buffer_type=p backend_cpu_set_n_threads=vpi
backend_cpu_set_threadpool=vpp backend_free=vp backend_get_device=pp backend_supports_op=bpp
backend_reg_get_proc_address=pps backend_buft_name=sp backend_alloc_ctx_tensors_from_buft=ppp
backend_buffer_get_base=pp backend_buffer_get_size=zp backend_buffer_free=vp backend_tensor_set=vppzz
backend_graph_plan_create=ppp backend_graph_plan_compute=ipp backend_graph_plan_free=vpp
"""  # name without "ggml_" = result, arguments: letters of _TYPES


@_LogFn
def _log(level: int, text: bytes, _: object) -> None:
    if level in (3, 4):  # warnings and errors
        sys.stderr.write(text.decode())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """libggml-cpu with its prototypes declared, or None where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    packages = spec.submodule_search_locations if spec else None
    for place in (os.environ.get("GGML_LIB_DIR", "."), *(f"{package}/lib" for package in packages or ())):
        base, cpu = (pathlib.Path(place) / f"libggml-{part}.so" for part in ("base", "cpu"))
        if base.exists() and cpu.exists():
            ctypes.CDLL(str(base))  # libggml-cpu needs it, and finds it by its soname once loaded
            library = ctypes.CDLL(str(cpu))
            for name, letters in (prototype.split("=") for prototype in _PROTOTYPES.split()):
                function = getattr(library, f"ggml_{name}")
                function.restype, *function.argtypes = (_TYPES[letter] for letter in letters)
            library.ggml_log_set(_log, None)
            return library
    return None


class GgmlMoE:
    """The experts of one MoE layer in one ggml type, with random weights, and their forward pass.

    With ``repack`` the weights go to the first of the CPU's extra buffer types (AMX, CPU_REPACK) that supports
    ``mul_mat_id`` of this type, as llama.cpp itself chooses; ``layout`` names the buffer type that was taken.
    """

    def __init__(self, kind: str, experts: int, hidden: int, intermediate: int, top_k: int, threads: int,
                 repack: bool = True, seed: int = 0) -> None:  # fmt: skip
        g = _library()
        if g is None:
            raise RuntimeError("llama.cpp is not installed: pip install llama-cpp-python==0.3.36")
        self._g, self._type, self.experts, self.hidden, self.top_k = g, KINDS[kind], experts, hidden, top_k
        self._shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self._owned = contextlib.ExitStack()
        self.close = weakref.finalize(self, self._owned.close)  # gives back all memory and threads; run() needs them
        self._plans: dict[int, tuple[int, F32Array, I32Array, F32Array, F32Array]] = {}

        params = ctypes.create_string_buffer(4096)  # ample for struct ggml_threadpool_params, 536 bytes
        g.ggml_threadpool_params_init(params, threads)
        pool = self._pool = self._own(g.ggml_threadpool_new(params), g.ggml_threadpool_free)
        self._backend = self._own(g.ggml_backend_cpu_init(), g.ggml_backend_free)
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        g.ggml_backend_cpu_set_threadpool(self._backend, pool)

        buffer_types = [g.ggml_backend_cpu_buffer_type()]
        address = g.ggml_backend_reg_get_proc_address(g.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        if repack and address:
            device = g.ggml_backend_get_device(self._backend)
            buffer_types[:0] = itertools.takewhile(bool, _ExtraBuftsFn(address)(device))
        self._weights = next(filter(None, map(self._allocate, buffer_types)))
        rng = np.random.default_rng(seed)
        self._rows: dict[str, npt.NDArray[np.uint8]] = {}  # the first expert's; expert e has them rotated by e
        for name, (rows, columns) in self._shapes.items():
            values = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
            quantized = self._rows[name] = np.empty((rows, g.ggml_row_size(self._type, columns)), np.uint8)
            g.ggml_quantize_chunk(self._type, values.ctypes.data, quantized.ctypes.data, 0, rows, columns, None)
            stacked = np.stack([np.roll(quantized, expert, axis=0) for expert in range(experts)])
            assert stacked.nbytes == g.ggml_nbytes(self._weights[name])
            g.ggml_backend_tensor_set(self._weights[name], stacked.ctypes.data, 0, stacked.nbytes)
        self.nbytes_per_expert = sum(quantized.nbytes for quantized in self._rows.values())

    def _own(self, handle: int | None, free: Callable[..., object]) -> int:
        """Keep what ggml allocated until close()."""
        if not handle:
            raise MemoryError("ggml could not allocate")
        self._owned.callback(free, handle)
        return handle

    def _allocate(self, buffer_type: int) -> dict[str, int] | None:
        """The weight tensors in memory of a buffer type; None where it does not support mul_mat_id of their type."""
        g = self._g
        context = self._own(g.ggml_init(_InitParams(16 * g.ggml_tensor_overhead(), None, True)), g.ggml_free)
        weights = {name: g.ggml_new_tensor_3d(context, self._type, columns, rows, self.experts)
                   for name, (rows, columns) in self._shapes.items()}  # fmt: skip
        buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        ids = g.ggml_new_tensor_2d(context, I32, self.top_k, 1)
        for name, weight in weights.items():
            x = g.ggml_new_tensor_3d(context, F32, self._shapes[name][1], self.top_k, 1)
            if not g.ggml_backend_supports_op(self._backend, g.ggml_mul_mat_id(context, weight, x, ids)):
                g.ggml_backend_buffer_free(buffer)
                return None
        self._own(buffer, g.ggml_backend_buffer_free)
        start, size = g.ggml_backend_buffer_get_base(buffer), g.ggml_backend_buffer_get_size(buffer)
        page = -(-start // 4096) * 4096  # huge pages, where the system grants them: several per cent for cold experts
        ctypes.CDLL(None).madvise(c_void_p(page), c_size_t(start + size - page), MADV_HUGEPAGE)
        self.layout = g.ggml_backend_buft_name(buffer_type).decode()
        return weights

    def _plan(self, tokens: int) -> tuple[int, F32Array, I32Array, F32Array, F32Array]:
        """The compute plan for a number of tokens, and views of its inputs and its output."""
        g, k, h = self._g, self.top_k, self.hidden
        size = g.ggml_graph_overhead() + (2 * k + 16) * g.ggml_tensor_overhead()
        c = self._own(g.ggml_init(_InitParams(size, None, True)), g.ggml_free)
        x, ids = g.ggml_new_tensor_3d(c, F32, h, 1, tokens), g.ggml_new_tensor_2d(c, I32, k, tokens)
        weights = g.ggml_new_tensor_3d(c, F32, 1, k, tokens)
        gate, up = (g.ggml_mul_mat_id(c, self._weights[name], x, ids) for name in ("gate", "up"))
        routed = g.ggml_mul_mat_id(c, self._weights["down"], g.ggml_swiglu_split(c, gate, up), ids)
        routed = g.ggml_mul(c, routed, weights)
        parts = [g.ggml_view_2d(c, routed, h, tokens, 4 * h * k, 4 * h * slot) for slot in range(k)]
        out = functools.reduce(functools.partial(g.ggml_add, c), parts) if k > 1 else g.ggml_cont(c, parts[0])
        for tensor in (x, ids, weights):
            g.ggml_set_input(tensor)
        g.ggml_set_output(out)
        graph = g.ggml_new_graph(c)
        g.ggml_build_forward_expand(graph, out)
        allocator = self._own(g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type()), g.ggml_gallocr_free)
        if not g.ggml_gallocr_alloc_graph(allocator, graph):
            raise MemoryError("ggml could not allocate the graph")
        plan = self._own(g.ggml_backend_graph_plan_create(self._backend, graph),
                         functools.partial(g.ggml_backend_graph_plan_free, self._backend))  # fmt: skip

        def view(tensor: int, kind: type[c_float] | type[c_int32], width: int) -> np.ndarray:
            return np.ctypeslib.as_array((kind * width * tokens).from_address(g.ggml_get_data(tensor)))

        return plan, view(x, c_float, h), view(ids, c_int32, k), view(weights, c_float, k), view(out, c_float, h)

    def run(self, x: F32Array, ids: I32Array, weights: F32Array) -> F32Array:
        """The layer's output [T, H] for inputs x [T, H], expert ids [T, top_k] and their weights [T, top_k]."""
        tokens = len(x)
        if tokens not in self._plans:
            self._plans[tokens] = self._plan(tokens)
        plan, x_in, ids_in, weights_in, out = self._plans[tokens]
        x_in[:], ids_in[:], weights_in[:] = x, ids, weights
        if self._g.ggml_backend_graph_plan_compute(self._backend, plan):
            raise RuntimeError("ggml failed to compute the graph")
        return out.copy()

    def pause(self) -> None:
        """Put the threads to sleep, which otherwise wait for work at full speed; `run` wakes them."""
        self._g.ggml_threadpool_pause(self._pool)

    def dequantized(self, name: str, expert: int) -> F32Array:
        """The float32 values of one expert's "gate", "up" or "down" matrix [out, in]."""
        rows, out = np.roll(self._rows[name], expert, axis=0), np.empty(self._shapes[name], np.float32)
        self._g.ggml_get_type_traits(self._type).contents.to_float(rows.ctypes.data, out.ctypes.data, out.size)
        return out
