"""Other implementations of step attention, each used as its users would, at its best settings.

All take `StepAttention` and plan once: buffers laid out as they want them, masks built, kernels compiled. What they
return is timed, the attention alone. Writing a step's K/V into a peer's buffer is not part of its time, though ours
needs no such copy.

To add one: a function here from the operands to the call (or to `Prepared`, where its result has another layout), and
its line in `STEP`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tidar_kernels as tk

from ..core.operands import OURS, Implementation, Prepared
from . import flex

if TYPE_CHECKING:
    from .step_attention import StepAttention

Run = Callable[[], Any]
PAGE = 16  # tokens of a FlashInfer page, as its users choose it
WORKSPACE = 128 * 2**20  # bytes, FlashInfer's own advice


def flex_attention(operands: StepAttention) -> Run:
    """FlexAttention as TiDAR uses it, in-flight keys before the context."""
    attend, mask = flex.plan(operands.case, operands.device)
    keys, values = operands.joined(context_first=False)
    return lambda: attend(operands.q, keys, values, block_mask=mask, enable_gqa=True)


def sdpa(operands: StepAttention, *, masked: bool) -> Run:
    """SDPA over context and in-flight keys, with the mask or with nothing masked; on CUDA, where masks and grouped
    heads exclude each other in the fused kernels, K/V heads are repeated beforehand."""
    keys, values = operands.joined(context_first=True)
    mask = operands.pattern.dense(operands.case.context_len).to(operands.device) if masked else None
    grouped = operands.device != "cuda"
    if not grouped:
        group = operands.case.num_heads // operands.case.num_kv_heads
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    q = operands.q
    return lambda: F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)


def folded(operands: StepAttention, backend: SDPBackend) -> Run:
    """SDPA without a mask by one backend, query heads of a group as rows: the same work at its best."""
    keys, values = operands.joined(context_first=True)
    case = operands.case
    q = operands.q.reshape(case.batch, case.num_kv_heads, -1, case.head_dim)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, keys, values)

    return run


def _token_major(x: Tensor) -> Tensor:
    """`[batch, heads, n, head_dim]` -> `[batch * n, heads, head_dim]`, contiguous."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _indptr(count: int, size: int, device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """`[0, size, 2 * size, ..]`: where each of `count` sequences of one size starts."""
    return torch.arange(count + 1, dtype=dtype, device=device) * size


def flashinfer(operands: StepAttention) -> Prepared:
    """FlashInfer's batch prefill over a paged cache that holds context and in-flight keys, with a custom mask."""
    library = importlib.import_module("flashinfer")
    case, device = operands.case, operands.device
    rows, length = operands.pattern.q_len, operands.case.context_len + operands.pattern.q_len
    pages = -(-length // PAGE)
    joined = torch.stack(operands.joined(context_first=True), dim=1)  # batch, 2, heads, n, dim
    joined = F.pad(joined, (0, 0, 0, pages * PAGE - length))
    cache = joined.reshape(case.batch, 2, case.num_kv_heads, pages, PAGE, case.head_dim)
    cache = cache.permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, PAGE, case.num_kv_heads, case.head_dim).contiguous()
    mask = operands.pattern.dense(case.context_len).to(device).flatten().repeat(case.batch)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD"
    )
    wrapper.plan(
        _indptr(case.batch, rows, device),
        _indptr(case.batch, pages, device),
        torch.arange(case.batch * pages, dtype=torch.int32, device=device),
        torch.full((case.batch,), length - (pages - 1) * PAGE, dtype=torch.int32, device=device),
        case.num_heads, case.num_kv_heads, case.head_dim, PAGE,
        custom_mask=mask, q_data_type=operands.dtype, kv_data_type=operands.dtype,
    )  # fmt: skip
    q = _token_major(operands.q)
    return Prepared(lambda: wrapper.run(q, cache), operands.head_major)


# Where the kernel is in older and newer versions.
SGLANG = (
    "sglang.srt.layers.attention.triton_ops.extend_attention",
    "sglang.kernels.ops.attention.extend_attention",
)


def sglang(operands: StepAttention) -> Prepared:
    """SGLang's Triton extend kernel, not causal, the custom mask applied to the in-flight keys alone."""
    try:
        extend = importlib.import_module(SGLANG[0]).extend_attention_fwd
    except ModuleNotFoundError:
        extend = importlib.import_module(SGLANG[1]).extend_attention_fwd
    case, device, rows = operands.case, operands.device, operands.pattern.q_len
    length = case.context_len + rows
    q, k, v = (_token_major(x) for x in (operands.q, operands.k, operands.v))
    context = (x[:, :, : case.context_len] for x in (operands.k_cache, operands.v_cache))
    k_buffer, v_buffer = (_token_major(x) for x in context)
    mask = operands.pattern.dense(case.context_len).to(device).flatten().repeat(case.batch)
    out = torch.empty_like(q)
    arguments = {
        "q_extend": q, "k_extend": k, "v_extend": v, "o_extend": out, "k_buffer": k_buffer, "v_buffer": v_buffer,
        "qo_indptr": _indptr(case.batch, rows, device),
        "kv_indptr": _indptr(case.batch, case.context_len, device),
        "kv_indices": torch.arange(case.batch * case.context_len, dtype=torch.int64, device=device),
        "custom_mask": mask, "is_causal": False,
        "mask_indptr": _indptr(case.batch, rows * length, device, torch.int64),
        "max_len_extend": rows,
        "k_scale": 1.0, "v_scale": 1.0,  # newer versions ask for these two
    }  # fmt: skip
    known = inspect.signature(extend).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}

    def run() -> Tensor:
        extend(**arguments)
        return out

    return Prepared(run, operands.head_major)


def flash_attention(operands: StepAttention, module: str) -> Run:
    """FlashAttention, split over the context, causal: it has no such mask."""
    attend = importlib.import_module(module).flash_attn_with_kvcache
    keys, values = (x.transpose(1, 2).contiguous() for x in operands.joined(context_first=True))
    q, lengths = operands.q.transpose(1, 2).contiguous(), operands.lengths + operands.pattern.q_len
    return lambda: attend(q, keys, values, cache_seqlens=lengths, causal=True)


CUDA = ("cuda",)
STEP: dict[str, Implementation] = {
    OURS: Implementation(
        OURS, lambda o: lambda: tk.step_attention(o.q, o.k, o.v, o.k_cache, o.v_cache, o.lengths, o.pattern)
    ),
    "flex_attention": Implementation("FlexAttention, compiled", flex_attention, compiles=True),
    "sdpa_dense_mask": Implementation("SDPA, dense mask", partial(sdpa, masked=True)),
    "sdpa_no_mask": Implementation("SDPA without mask", partial(sdpa, masked=False), ceiling=True, devices=("cpu",)),
    "sdpa_flash": Implementation(
        "SDPA without mask, flash", partial(folded, backend=SDPBackend.FLASH_ATTENTION), ceiling=True, devices=CUDA
    ),
    "sdpa_cudnn": Implementation(
        "SDPA without mask, cuDNN", partial(folded, backend=SDPBackend.CUDNN_ATTENTION), ceiling=True, devices=CUDA
    ),
    "flashinfer": Implementation(
        "FlashInfer, custom mask", flashinfer, module="flashinfer", package="flashinfer-python", devices=CUDA,
        install="pip install flashinfer-python",
    ),
    "sglang_extend": Implementation(
        "SGLang extend kernel", sglang, module="sglang", package="sglang", devices=CUDA, install="pip install sglang"
    ),
    "flash_attention_2": Implementation(
        "FlashAttention 2, causal", partial(flash_attention, module="flash_attn"), ceiling=True, devices=CUDA,
        module="flash_attn", package="flash-attn", install="pip install flash-attn --no-build-isolation",
    ),
    "flash_attention_3": Implementation(
        "FlashAttention 3, causal", partial(flash_attention, module="flash_attn_interface"), ceiling=True, devices=CUDA,
        module="flash_attn_interface", package="flash-attn-3",
        install="python setup.py install in hopper/ of a checkout of Dao-AILab/flash-attention",
    ),
}  # fmt: skip
