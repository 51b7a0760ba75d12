"""Keys of full blocks: equal key, equal tokens from the sequence's first one on.

The key of a block is SHA-256 over the key of the block before it and its own token ids as 4-byte integers, so it names the
whole prefix and no two different splits of numbers can look alike. The chain starts from the salt and the adapter: sequences of
other tenants or adapters never meet. A cryptographic hash and not Python's ``hash``: with the latter, collisions can be
constructed and one user would be answered from another's prompt (CVE-2025-25183).
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256


class PrefixKeys:
    """The keys of one sequence's full blocks, in order. Written by ``Allocator`` alone; each block is hashed once."""

    def __init__(self, block_size: int, salt: str, adapter: str) -> None:
        self._block_size = block_size
        root = sha256()
        for part in (salt.encode(), adapter.encode()):
            root.update(len(part).to_bytes(8, "little"))
            root.update(part)
        self._root = root.digest()
        self.keys: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """Make sure the first ``num_blocks`` keys are there (``token_ids`` is the sequence so far) and return all keys."""
        keys, size = self.keys, self._block_size
        if (missing := num_blocks - len(keys)) > 0:
            ids = array("I", token_ids[len(keys) * size : num_blocks * size])
            if len(ids) != missing * size:
                raise ValueError("only a full block has a key")
            data, width = ids.tobytes(), size * ids.itemsize
            key = keys[-1] if keys else self._root
            for at in range(0, len(data), width):
                key = sha256(key + data[at : at + width]).digest()
                keys.append(key)
        return keys
