"""Backends with a planted fault: the kit must catch each, and pass the one without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from portalm.backend import SCALED_KV_DTYPES
from portalm.conformance.kit import run_kit
from portalm_backends.portable import philox
from portalm_backends.reference import attention
from portalm_backends.reference.backend import ReferenceBackend
from portalm_backends.reference.cache import ScaledKV


class SlotOffByOne(ReferenceBackend):
    def kv_write(self, kv, layer, key, value, meta):
        last = kv.shape[2] * kv.shape[3] - 1
        slots = (meta.slot_mapping + 1).clamp(max=last)
        return super().kv_write(kv, layer, key, value, replace(meta, slot_mapping=slots))


class SeqLenOffByOne(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        shorter = meta.host_seq_lens.copy()
        shorter[shorter > 1] -= 1
        return super().attend(kv, layer, query, replace(meta, host_seq_lens=shorter), spec, sinks)


class NoCausalMask(ReferenceBackend):
    """Every token attends to the whole context, as if it were the last of its request."""

    def attend(self, kv, layer, query, meta, spec, sinks=None):
        out = torch.zeros_like(query)
        loc = meta.host_query_start_loc
        for i in range(len(meta.host_seq_lens)):
            one = replace(
                meta,
                host_query_start_loc=np.array([0, 1]),
                host_seq_lens=meta.host_seq_lens[i : i + 1],
                block_table=meta.block_table[i : i + 1],
            )
            for token in range(loc[i], loc[i + 1]):
                row = query[token : token + 1]
                out[token] = super().attend(kv, layer, row, one, spec, sinks)[0]
        return out


class WindowOffByOne(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        if spec.sliding_window is not None:
            spec = replace(spec, sliding_window=spec.sliding_window + 1)
        return super().attend(kv, layer, query, meta, spec, sinks)


class NoSoftCap(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        return super().attend(kv, layer, query, meta, replace(spec, soft_cap=None), sinks)


class NoSlopes(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        spec = replace(spec, alibi_slopes=None)
        return super().attend(kv, layer, query, meta, spec, sinks)


class SinksIgnored(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        return super().attend(kv, layer, query, meta, spec)


class MaskByMultiplying(ReferenceBackend):
    """Reads whole blocks and multiplies unused slots by 0: 0 * NaN is NaN."""

    def attend(self, kv, layer, query, meta, spec, sinks=None):
        out = super().attend(kv, layer, query, meta, spec, sinks)
        for i, seq_len in enumerate(meta.host_seq_lens.tolist()):
            if isinstance(kv, torch.Tensor) and seq_len % kv.shape[3]:
                block = int(meta.block_table[i, (seq_len - 1) // kv.shape[3]])
                dead = kv[layer, 1, block, seq_len % kv.shape[3] :].float().sum()
                start, end = meta.host_query_start_loc[i : i + 2]
                out[start:end] += (dead * 0).to(out.dtype)
        return out


class RestOfSharedKeysIgnored(ReferenceBackend):
    """Computes scores only from the part of a key that is its value."""

    def attend(self, kv, layer, query, meta, spec, sinks=None):
        query = query.clone()
        query[..., spec.out_size :] = 0
        return super().attend(kv, layer, query, meta, spec, sinks)


class SharedValuesFromTheEnd(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        if spec.value_size is None:
            return super().attend(kv, layer, query, meta, spec, sinks)
        whole = replace(spec, value_size=spec.head_size)
        return super().attend(kv, layer, query, meta, whole, sinks)[..., -spec.value_size :]


class OneWeightForAllHeads(ReferenceBackend):
    def linear_heads(self, x, weight):
        return super().linear_heads(x, weight[:1].expand(weight.shape))


class SwappedGroups(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        group = spec.num_heads // spec.num_kv_heads
        order = torch.arange(spec.num_heads).view(spec.num_kv_heads, group).T.flatten()
        out = super().attend(kv, layer, query[:, order], meta, spec, sinks)
        return out[:, torch.argsort(order)]


class RopeOffByOne(ReferenceBackend):
    def rope(self, query, key, positions, cos_sin, *, is_interleaved):
        shifted = (positions + 1).clamp(max=len(cos_sin) - 1)
        return super().rope(query, key, shifted, cos_sin, is_interleaved=is_interleaved)


class RopeKeyUnrotated(ReferenceBackend):
    def rope(self, query, key, positions, cos_sin, *, is_interleaved):
        rotated, _ = super().rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)
        return rotated, key


class UnrotatedKeyWritten(ReferenceBackend):
    def rope_kv_write(self, kv, layer, query, key, value, meta, cos_sin, *, is_interleaved):
        rotated, _ = self.rope(query, key, meta.positions, cos_sin, is_interleaved=is_interleaved)
        return self.kv_write(kv, layer, key, value, meta), rotated


class TiesToHighestId(ReferenceBackend):
    def sample(self, logits, params):
        out = super().sample(logits, params)
        if params.is_greedy:
            best = logits == logits.amax(dim=-1, keepdim=True)
            ids = torch.where(best, torch.arange(logits.shape[1]), -1).amax(dim=-1)
            out.token_ids = ids.to(torch.int32)
        return out


class SeedIgnored(ReferenceBackend):
    def sample(self, logits, params):
        return super().sample(logits, replace(params, seed=torch.zeros_like(params.seed)))


class TopPOffByOne(ReferenceBackend):
    def sample(self, logits, params):
        return super().sample(logits, replace(params, top_p=params.top_p * 0.9))


class PenaltyOfPrompt(ReferenceBackend):
    def sample(self, logits, params):
        if params.penalties is not None:
            both = torch.cat([params.penalties.prompt_ids, params.penalties.output_ids], dim=1)
            params = replace(params, penalties=replace(params.penalties, output_ids=both))
        return super().sample(logits, params)


class CopySkipsALayer(ReferenceBackend):
    def kv_copy(self, kv, src, dst):
        if isinstance(kv, torch.Tensor):
            kv[1:, :, dst.long()] = kv[1:, :, src.long()]
            return kv
        return super().kv_copy(kv, src, dst)


class CopySkipsTheScales(ReferenceBackend):
    def kv_copy(self, kv, src, dst):
        if isinstance(kv, torch.Tensor):
            return super().kv_copy(kv, src, dst)
        kv.codes[:, :, dst.long()] = kv.codes[:, :, src.long()]
        return kv


class OneScaleForAllHeads(ReferenceBackend):
    def kv_write(self, kv, layer, key, value, meta):
        super().kv_write(kv, layer, key, value, meta)
        if isinstance(kv, ScaledKV):
            slots = meta.slot_mapping.long()
            scales = kv.scales[layer].flatten(1, 2)
            scales[:, slots] = scales[:, slots, :1]
        return kv


class ScaleOfTheFirstToken(ReferenceBackend):
    def kv_write(self, kv, layer, key, value, meta):
        super().kv_write(kv, layer, key, value, meta)
        if isinstance(kv, ScaledKV):
            slots = meta.slot_mapping.long()
            scales = kv.scales[layer].flatten(1, 2)
            scales[:, slots] = scales[:, slots[:1]]
        return kv


class CodesClipped(ReferenceBackend):
    """Clips to the range of the codes, as if every scale were 1."""

    def kv_write(self, kv, layer, key, value, meta):
        if isinstance(kv, ScaledKV):
            limit = SCALED_KV_DTYPES[kv.dtype]
            key, value = (x.clamp(-limit, limit) for x in (key * 100, value * 100))
            super().kv_write(kv, layer, key, value, meta)
            kv.scales[layer] /= 100
            return kv
        return super().kv_write(kv, layer, key, value, meta)


class NanReplaced(ReferenceBackend):
    def kv_write(self, kv, layer, key, value, meta):
        if isinstance(kv, ScaledKV):
            key, value = key.nan_to_num(), value.nan_to_num()
        return super().kv_write(kv, layer, key, value, meta)


class ScaleIgnored(ReferenceBackend):
    """Attention uses a wrong scale; the cache is written correctly."""

    side: int

    def attend(self, kv, layer, query, meta, spec, sinks=None):
        if isinstance(kv, ScaledKV):
            scales = kv.scales.clone()
            live = scales[layer, self.side].isfinite()
            scales[layer, self.side] = torch.where(live, 0.03, scales[layer, self.side])
            kv = replace(kv, scales=scales)
        return super().attend(kv, layer, query, meta, spec, sinks)


class ScaleOfKeysIgnored(ScaleIgnored):
    side = 0


class ScaleOfValuesIgnored(ScaleIgnored):
    side = 1


class ScaleOfTheNextToken(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        if isinstance(kv, ScaledKV):
            kv = replace(kv, scales=kv.scales.roll(-1, 3).nan_to_num(0.01))
        return super().attend(kv, layer, query, meta, spec, sinks)


class ScaleOfTheNextHead(ReferenceBackend):
    def attend(self, kv, layer, query, meta, spec, sinks=None):
        if isinstance(kv, ScaledKV):
            kv = replace(kv, scales=kv.scales.roll(1, 4))
        return super().attend(kv, layer, query, meta, spec, sinks)


class EpsIgnored(ReferenceBackend):
    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, 0.1)


class ResidualUnrounded(ReferenceBackend):
    def add_rms_norm(self, x, residual, weight, eps):
        out, total = super().add_rms_norm(x, residual, weight, eps)
        return out, total + residual * 1e-3


class PromptsAttendToEachOther(ReferenceBackend):
    def attend_encoder(self, query, key, value, meta, spec):
        whole = replace(meta, host_query_start_loc=meta.host_query_start_loc[[0, -1]])
        return super().attend_encoder(query, key, value, whole, spec)


class EncoderWindowOffByOne(ReferenceBackend):
    def attend_encoder(self, query, key, value, meta, spec):
        if spec.sliding_window is not None:
            spec = replace(spec, sliding_window=spec.sliding_window + 1)
        return super().attend_encoder(query, key, value, meta, spec)


class EncoderIsCausal(ReferenceBackend):
    def attend_encoder(self, query, key, value, meta, spec):
        out = super().attend_encoder(query, key, value, meta, spec)
        for start in meta.host_query_start_loc[:-1]:
            first = replace(meta, host_query_start_loc=np.array([0, 1]))
            part = slice(start, start + 1)
            out[part] = super().attend_encoder(query[part], key[part], value[part], first, spec)
        return out


class MeanNotSubtracted(ReferenceBackend):
    def layer_norm(self, x, weight, bias, eps):
        return self.rms_norm(x, weight, eps) + bias


class GeluByTanh(ReferenceBackend):
    def gelu(self, x):
        return torch.nn.functional.gelu(x, approximate="tanh")


class GateAfterUp(ReferenceBackend):
    def gelu_tanh_mul(self, gate_up):
        return super().gelu_tanh_mul(gate_up.roll(gate_up.shape[1] // 2, 1))


class HeadsNormedTogether(ReferenceBackend):
    def rms_norm(self, x, weight, eps):
        ones = torch.ones(x[0].numel(), dtype=x.dtype)
        return super().rms_norm(x.flatten(1), ones, eps).view(x.shape) * weight


class NextExpert(ReferenceBackend):
    def moe(self, x, expert_ids, expert_weights, experts):
        shifted = (expert_ids + 1) % len(experts.down)
        return super().moe(x, shifted, expert_weights, experts)


class ClampIgnored(ReferenceBackend):
    def moe(self, x, expert_ids, expert_weights, experts):
        if experts.swiglu_limit is not None:
            experts = replace(experts, swiglu_limit=100.0)
        return super().moe(x, expert_ids, expert_weights, experts)


class LogitsInTheDtype(ReferenceBackend):
    def logits(self, x, weight):
        return torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()).float()


class SealIgnored(ReferenceBackend):
    def compile(self, fn, bucket, example):
        return fn


class Float16Inside(ReferenceBackend):
    def linear(self, x, weight, bias=None):
        return (
            super()
            .linear(x.half(), weight.half(), None if bias is None else bias.half())
            .to(x.dtype)
        )


FAULTS = {  # fault: pattern of the checks that must catch it
    SlotOffByOne: "attend",
    SeqLenOffByOne: "attend",
    NoCausalMask: "attend",
    WindowOffByOne: "window",
    NoSoftCap: "cap",
    NoSlopes: "alibi",
    SinksIgnored: "sinks",
    MaskByMultiplying: "attend",
    RestOfSharedKeysIgnored: "value in key",
    SharedValuesFromTheEnd: "value in key",
    OneWeightForAllHeads: "linear_heads",
    SwappedGroups: "gqa",
    RopeOffByOne: "rope",
    RopeKeyUnrotated: "rope",
    UnrotatedKeyWritten: "rope_kv_write",
    TiesToHighestId: "ties",
    SeedIgnored: "sample",
    TopPOffByOne: "sample[top_p]",
    PenaltyOfPrompt: "sample[penalties]",
    CopySkipsALayer: "copy",
    CopySkipsTheScales: "copy",
    OneScaleForAllHeads: "8-bit KV codes",
    ScaleOfTheFirstToken: "8-bit KV codes",
    CodesClipped: "8-bit KV codes",
    NanReplaced: "8-bit KV codes",
    ScaleOfKeysIgnored: "decode, gqa, float32, kv",
    ScaleOfValuesIgnored: "decode, gqa, float32, kv",
    ScaleOfTheNextToken: "decode, gqa, float32, kv",
    ScaleOfTheNextHead: "decode, gqa, float32, kv",
    EpsIgnored: "rms_norm",
    ResidualUnrounded: "rms_norm",
    PromptsAttendToEachOther: "encoder alone",
    EncoderIsCausal: "attend_encoder",
    EncoderWindowOffByOne: "attend_encoder",
    MeanNotSubtracted: "layer_norm",
    GeluByTanh: "gelu",
    GateAfterUp: "gelu_tanh",
    HeadsNormedTogether: "norms per head",
    NextExpert: "moe",
    ClampIgnored: "moe",
    LogitsInTheDtype: "logits",
    SealIgnored: "seal",
    Float16Inside: "linear",
}


def failures(backend: ReferenceBackend, pattern: str = "") -> list[str]:
    results = run_kit(backend, levels=["L0", "L1", "L2"], pattern=pattern)
    assert results, f"no check matches {pattern}"
    return [result.name for result in results if result.status == "fail"]


def test_the_backend_without_faults_passes() -> None:
    assert failures(ReferenceBackend()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: type[ReferenceBackend]) -> None:
    assert failures(fault(), FAULTS[fault]) != []


def test_a_wrong_philox_counter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = philox.philox

    def swapped(counter, key):
        c0, c1, c2, c3 = counter
        return right((c0, c2, c1, c3), key)

    monkeypatch.setattr(philox, "philox", swapped)

    assert failures(ReferenceBackend(), "sample") != []


def test_results_that_depend_on_the_batch_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.paged_attention

    def leaky(query, kv, layer, meta, spec, sinks=None):
        out = right(query, kv, layer, meta, spec, sinks)
        return out + 1e-4 * (len(meta.host_seq_lens) - 1)

    monkeypatch.setattr(attention, "paged_attention", leaky)

    assert failures(ReferenceBackend(), "alone") != []
