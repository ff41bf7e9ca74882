"""Which sequences a step trains on, as a pure function of seed and step.

Takes a seed, a step and sizes; gives sequence indices. It keeps no state and does not know the
world size, so a resumed run, also on more or fewer workers, sees exactly the same batches.

Each epoch visits every sequence once in an order of its own. The order is a keyed permutation (a
Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002), so any position is computed directly: nothing is stored and nothing is replayed on resume.
"""

import numpy as np

_NUM_ROUNDS = 6
_MASK_64 = 2**64 - 1


def batch_indices(seed: int, step: int, batch_size: int, num_sequences: int) -> np.ndarray:
    """Return the int64 indices [batch_size] of the sequences of one optimizer step.

    `step` counts from 0. A batch may reach from the end of one epoch into the next.
    """
    if step < 0 or batch_size < 1 or num_sequences < 1:
        raise ValueError(
            f"need step >= 0, batch_size >= 1 and num_sequences >= 1, found {step}, "
            f"{batch_size}, {num_sequences}"
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_sequences)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        indices[chosen] = _permute(offsets[chosen], num_sequences, _round_keys(seed, epoch))
    return indices


def _permute(positions: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """Map positions in [0, size) one to one onto [0, size)."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[int]) -> np.ndarray:
    """Permute [0, 4 ** half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: int) -> list[int]:
    sequence = np.random.SeedSequence([seed & _MASK_64, epoch])
    # One bit is left free so that adding a half to a key cannot overflow.
    return [int(key) >> 1 for key in sequence.generate_state(_NUM_ROUNDS, np.uint64)]


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
