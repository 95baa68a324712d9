"""Randomness as a pure function of its key, so that nothing random has to be saved or synchronised.

A key is an integer mixed from (seed, epoch, image index, purpose). The same key gives the same draw on a CPU and on a
GPU, with any number of workers or processes, before and after a restart. The mixing function is the finaliser of
SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014,
https://doi.org/10.1145/2660193.2660195).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for: a part of its key, so that no two purposes share draws.

    The numbers stay: another one would change the bytes of every run.
    """

    ORDER = 0  # of an epoch's images
    VIEW = 1  # of an image at an epoch
    DROPOUT = 2  # also the seed of what draws from torch's generator
    NUMBER = 3  # which of its numbered views an image shows, and what these are
    BOOTSTRAP_IMAGES = 4
    BOOTSTRAP_RUNS = 5
    CORRUPTION = 6
    MEMBER = 7  # of several networks that learn together: first weights and dropout
    CROP = 16
    ERASE = 17
    JITTER = 18
    TRIVIAL = 19
    MIX = 20
    PARTNER = 21  # with whom an image is mixed
    RAND_AUGMENT = 22
    NEGATIVES = 0x435244  # of contrastive losses, and their first memory
    # These three share a number with VIEW or DROPOUT and yet no draw: there an epoch and more follow the number.
    FIRST_WEIGHTS = 1  # of what losses learn
    SPLIT_ORDER = 1  # of the images at one rank of their classes
    CARVED = 2


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts a negative int64 arithmetically; we need the logical


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)


def key(*parts: int) -> int:
    """Mix integers into one key, an int that fits int64."""
    state = 0
    for part in parts:
        z = (state + (part + 1) * _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * _M1) & _MASK
        z = ((z ^ (z >> 27)) * _M2) & _MASK
        state = z ^ (z >> 31)
    return _signed(state)


def keys(base: int | Tensor, index: Tensor) -> Tensor:
    """Mix a key, or keys (int64), with each integer of `index` (any shape, int64): one key per element, same shape."""
    return _finalise(base + (index + 1) * _signed(_GOLDEN))


def uniform(key_tensor: Tensor) -> Tensor:
    """A float32 in [0, 1) for each key, from its upper 24 bits."""
    return _shift(key_tensor, 40).to(torch.float32) * (1.0 / (1 << 24))


def integers(key_tensor: Tensor, bound: Tensor | int) -> Tensor:
    """An integer in [0, bound) for each key, uniform to one part in 2^32; bound, up to 2^31, may be a tensor.

    It is the whole part of key * bound / 2^64: exact, where a float32 has too few bits for every integer to be hit.
    """
    high, low = _shift(key_tensor, 32), key_tensor & 0xFFFFFFFF
    return (high * bound + (low * bound >> 32)) >> 32


def normal(key_tensor: Tensor) -> Tensor:
    """A float64 of the standard normal distribution for each key (Box and Muller 1958), up to 6.8 from 0."""
    one = (_shift(key_tensor, 32).double() + 0.5) / 2**32
    other = (key_tensor & (2**32 - 1)).double() / 2**32
    return (-2 * one.log()).sqrt() * (2 * math.pi * other).cos()


def permutation(base: int, length: int) -> Tensor:
    """A permutation of range(length), int64 on the CPU: the order of the keys of its elements."""
    return torch.argsort(keys(base, torch.arange(length)), stable=True)
