"""The step sizes that are captured as graphs: decodes, and mixed steps of few tokens.

Enqueuing a layer takes the host about 0.19 ms. Computing it takes 2 * parameters / 790 TFLOP/s per
token on an H200: 0.55 us for Llama-3.1-8B, 0.15 us for Llama-3.2-1B. So an eager step waits for the
host up to 340 and 1,230 tokens, and is limited by the device above; capturing it gains nothing
there. Padding costs nothing below 184 tokens, where reading the weights takes longer than
multiplying by them (790 TFLOP/s by 4.3 TB/s), and its share of the tokens above. Sizes grow by at
most a sixth there, so that a large model loses at most that.

A padded request costs a row of logits and its sampling: 1.6 us for the 8B model, 0.4 ms for 256.
Prompts that arrive when few requests run get buckets of their own, up to the size where that is
less than a twentieth of the step.
"""

from __future__ import annotations

from portalm.backend import Bucket

_MIXED_TOKENS = (
    *(32, 64, 128, 192, 224, 256, 288, 320, 352, 384, 448),
    *(512, 576, 640, 704, 768, 896, 1024),
)

_FEW_REQUESTS = 32

_MOST_TOKENS_OF_FEW = 512


def step_buckets(max_tokens: int, max_requests: int, max_blocks: int) -> list[Bucket]:
    """Buckets of decodes, one token per request, and of mixed steps, in ascending order.

    In a mixed bucket one request may have all tokens, so steps with several tokens for each of
    many requests fit, too.
    """
    decodes = [Bucket(n, n, max_blocks, 1) for n in decode_sizes(max_requests)]
    mixed = {
        Bucket(tokens, min(tokens, requests, max_requests), max_blocks, tokens)
        for tokens in mixed_sizes(max_tokens)
        for requests in (_FEW_REQUESTS, max_requests)
        if requests == max_requests or tokens <= _MOST_TOKENS_OF_FEW
    }
    return sorted([*decodes, *mixed])


def decode_sizes(max_requests: int) -> list[int]:
    """1, 2, 4, 8, multiples of 8, and `max_requests` itself."""
    sizes = {n for n in (1, 2, 4) if n < max_requests}
    return sorted(sizes | {*range(8, max_requests, 8), max_requests})


def mixed_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens of mixed steps; the last is `max_tokens` if it is small."""
    sizes = {n for n in _MIXED_TOKENS if n < max_tokens}
    return sorted(sizes | {min(max_tokens, _MIXED_TOKENS[-1])})
