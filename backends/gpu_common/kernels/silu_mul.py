"""silu(gate) * up of a merged projection.

    gate_up  [T, 2 I]   gate first; any row stride
    out      [T, I]

Mapping:  one program per BLOCK columns of a row.
Bound by: memory, 3 T I elements.
Meaning:  TorchBackend.silu_mul, but rounded only once.
"""

import torch
import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up of [T, 2 I]: [T, I]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _silu_mul[(num_rows, triton.cdiv(width, _BLOCK))](
            gate_up, out, width, gate_up.stride(0), _BLOCK, **options()
        )
    return out


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, row_stride, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    """Compute BLOCK columns of a row."""
    wait_for_inputs(WAITS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate_up_ptr += row * row_stride
    gate = tl.load(gate_up_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
