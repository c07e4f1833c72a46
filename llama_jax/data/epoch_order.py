"""The order in which the epochs of a source read its windows: permutations without a list.

A Feistel network whose halves are the digits of an index to the base b: index = left · b + right,
with left < a, right < b and a·b ≥ n (the generalized Feistel cipher of Black and Rogaway, 'Ciphers
with Arbitrary Finite Domains', CT-RSA 2002). Each round adds a hash of one half to the other half,
modulo its size: that is invertible, whatever the hash. An index that leaves [0, n) is permuted
again until it is inside (cycle walking, ibid.). Here a = ⌈√n⌉ and b = ⌈n/a⌉, so fewer than a of the
a·b are outside. A network on the bits of an index has up to 4n values, and would walk four times as
far.
"""

import math

import numpy as np

# Four rounds of random functions give a pseudorandom permutation of a large set (Luby and Rackoff,
# 1988). Twelve also make the pairs of images of ten windows equally frequent; eight don't.
_ROUNDS = 12  # even: the halves end where they began
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio, the increment of SplitMix64
_INCREMENTS = np.array([i * _GOLDEN & _MASK for i in range(1, _ROUNDS + 1)], np.uint64)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of SplitMix64
_30, _27, _31, _32 = (np.uint64(bits) for bits in (30, 27, 31, 32))


def find_windows(numbers: np.ndarray, windows: int, seed: int) -> np.ndarray:
    """Returns the window that each sample of a source is, int64 [samples].

    Samples [e·windows, (e + 1)·windows) are epoch e: each window once, in an order of its own.

    Args:
        numbers: of the samples among those of the source, from 0.
        windows: of the source.
        seed: of all orders of the source.
    """
    epochs, indices = np.divmod(np.asarray(numbers, np.int64), windows)
    return permute(indices, windows, seed, epochs)


def permute(indices: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Returns the image of each index in the permutation of [0, n) of its epoch, int64.

    n, the seed and the epoch determine a permutation.

    Args:
        indices: in [0, n), with one axis.
        n: at most 2⁶².
        seed: at least 0; seeds that are equal modulo 2⁶⁴ are one.
        epochs: of the indices.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    key = splitmix64(np.array([seed & _MASK], np.uint64))
    keys = splitmix64(key + epochs.astype(np.uint64) * np.uint64(_GOLDEN))
    images = _encrypt(indices.astype(np.uint64), keys, a, b)
    while (outside := np.flatnonzero(images >= n)).size:
        images[outside] = _encrypt(images[outside], keys[outside], a, b)
    return images.astype(np.int64)


def _encrypt(values: np.ndarray, keys: np.ndarray, a: int, b: int) -> np.ndarray:
    """Returns the images of values in [0, a·b), uint64."""
    size, other_size = np.uint64(a), np.uint64(b)
    changed, other = np.divmod(values, other_size)
    for round_keys in keys + _INCREMENTS[:, None]:
        x = splitmix64(round_keys + other)
        x >>= _32
        x *= size
        x >>= _32  # x · size / 2³²: no division, and no value is preferred by more than size / 2³²
        x += changed
        changed = np.minimum(x, x - size)  # modulo size: a number below 0 is above 2⁶³
        changed, other, size, other_size = other, changed, other_size, size
    changed *= other_size
    changed += other
    return changed


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's hash of each number, uint64: a bijection.

    Every bit of a hash depends on all bits of the number. Source: the finalizer of Steele, Lea and
    Flood, 'Fast splittable pseudorandom number generators', OOPSLA 2014.
    """
    x = x ^ (x >> _30)
    x *= _FACTORS[0]
    x ^= x >> _27
    x *= _FACTORS[1]
    x ^= x >> _31
    return x
