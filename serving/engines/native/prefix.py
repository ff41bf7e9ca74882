"""Names of cache blocks by what is in them, so that a later prompt finds them again.

Takes tokens; gives a key for each full block, which depends on all tokens up to its end and on a
salt. It does not know where blocks lie or who holds them.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_KEY_BYTES = 16  # Collisions would show one prompt another's keys and values: 2^64 work to find.


def salt(tenant: str, adapter: str | None) -> bytes:
    """Return what keeps the blocks of tenants and of adapters apart."""
    return blake2b(repr((tenant, adapter)).encode(), digest_size=_KEY_BYTES).digest()


def extend_keys(
    keys: list[bytes], tokens: Sequence[int], block_size: int, first_salt: bytes
) -> None:
    """Append the keys of all full blocks of `tokens` that `keys` lacks."""
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[start : start + block_size])
        before = keys[-1] if keys else first_salt
        keys.append(blake2b(before + block.tobytes(), digest_size=_KEY_BYTES).digest())
