"""Philox4x32-10 and the Gumbel noise computed from it."""

from __future__ import annotations

import math

import pytest
import torch

from portalm_backends.portable.philox import gumbel, philox

KNOWN_ANSWERS = {  # from kat_vectors in Random123, the authors' library
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000",
              "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
             "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "digits of pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
                     "d16cfe09 94fdcceb 5001e420 24126ea1"),
}  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of(counter: list[int], key: list[int]) -> list[int]:
    """Run the vectorized function on one counter."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    return [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))]


def noise_of(seed: int, position: int, token: int) -> float:
    """Compute the noise of one token by the formula in SampleParams, one number at a time."""
    seed, position = seed % 2**64, position % 2**64
    counter = [token // 4, 0, position % 2**32, position >> 32]
    x = philox_of(counter, [seed % 2**32, seed >> 32])[token % 4]
    uniform = ((x >> 9) + 0.5) * 2.0**-23
    return -math.log(-math.log(uniform))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_published_answers(name: str) -> None:
    counter, key, answer = (words(text) for text in KNOWN_ANSWERS[name])

    assert philox_of(counter, key) == answer


def test_many_counters_at_once_give_what_each_gives_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, 2**32, (50,), generator=generator) for _ in range(6)]

    together = philox((columns[0], columns[1], columns[2], columns[3]), (columns[4], columns[5]))

    for i in range(50):
        row = [int(column[i]) for column in columns]
        assert [int(word[i]) for word in together] == philox_of(row[:4], row[4:])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 7, 2**32 - 1, 2**32, 2**40 + 3])
def test_noise_follows_the_formula_in_sample_params(seed: int, position: int) -> None:
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), 10)

    expected = torch.tensor([[noise_of(seed, position, token) for token in range(10)]])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    seed, position = torch.tensor([5]), torch.tensor([9])

    sizes = {size: gumbel(seed, position, size) for size in (1, 2, 3, 4, 5, 63, 64, 1001)}

    for size, noise in sizes.items():
        assert noise.shape == (1, size)
        assert torch.equal(noise[0, : min(size, 5)], sizes[1001][0, : min(size, 5)])


def test_the_noise_of_a_row_does_not_depend_on_other_rows() -> None:
    seed, position = torch.arange(37), torch.arange(37) * 3

    together = gumbel(seed, position, 203)

    for i in range(37):
        assert torch.equal(gumbel(seed[i : i + 1], position[i : i + 1], 203)[0], together[i])


def test_every_bit_of_seed_and_position_changes_the_noise() -> None:
    seeds = torch.tensor([0] + [1 << bit for bit in range(63)] + [-(2**63)])

    by_seed = gumbel(seeds, torch.zeros_like(seeds), 4)
    by_position = gumbel(torch.zeros_like(seeds), seeds, 4)

    assert len({tuple(row) for row in by_seed.tolist()}) == 65
    assert len({tuple(row) for row in by_position.tolist()}) == 65


def test_noise_is_finite_at_both_ends_of_the_uniform() -> None:
    seeds = torch.arange(2000)

    noise = gumbel(seeds, seeds, 1000)

    assert torch.isfinite(noise).all()
    assert noise.min() >= -math.log(-math.log(2.0**-24)) - 1e-5
    assert noise.max() <= -math.log(-math.log1p(-(2.0**-24))) + 1e-5


def test_noise_is_gumbel_distributed() -> None:
    seeds = torch.arange(1000)

    noise = gumbel(seeds, torch.zeros_like(seeds), 1000).flatten().double()

    # Kolmogorov-Smirnov over a million samples: chance exceeds 1.95 / sqrt(n) once in a thousand
    ordered = noise.sort().values
    expected = torch.exp(-torch.exp(-ordered))
    empirical = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert float((empirical - expected).abs().max()) < 1.95 / math.sqrt(len(ordered))
