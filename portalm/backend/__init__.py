"""The seam: everything that PortaLM asks of a device. No code above it knows the device.

Shapes: T tokens in a step, S requests, MB blocks of the longest request, B block size, H/H_kv
query/KV heads, D head size, C hidden size, V vocabulary size, R rows whose logits are needed.
Index tensors are int32. docs/adding-a-backend.md explains how to implement `Backend`.
"""

from portalm.backend.capabilities import Capabilities, DeviceReport, MemInfo
from portalm.backend.kv_cache import KV, SCALED_KV_DTYPES, KVSpec
from portalm.backend.protocol import API_VERSION, Backend
from portalm.backend.registry import (
    ENTRY_POINT_GROUP,
    choose_backend,
    find_backends,
    load_backend,
    report_backends,
)
from portalm.backend.sampling import LogitBias, Penalties, SampleOutput, SampleParams
from portalm.backend.step import (
    AttentionSpec,
    Bucket,
    HostFuture,
    StepFn,
    StepInputs,
    StepMeta,
)
from portalm.backend.weights import (
    QUANTIZED_FORMATS,
    Experts,
    PackedWeight,
    QuantizedWeight,
    Weights,
)

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "KV",
    "QUANTIZED_FORMATS",
    "SCALED_KV_DTYPES",
    "AttentionSpec",
    "Backend",
    "Bucket",
    "Capabilities",
    "DeviceReport",
    "Experts",
    "HostFuture",
    "KVSpec",
    "LogitBias",
    "MemInfo",
    "PackedWeight",
    "Penalties",
    "QuantizedWeight",
    "SampleOutput",
    "SampleParams",
    "StepFn",
    "StepInputs",
    "StepMeta",
    "Weights",
    "choose_backend",
    "find_backends",
    "load_backend",
    "report_backends",
]
