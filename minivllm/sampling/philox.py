"""Philox4x32-10: random numbers as a function, not a stream.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A 128-bit counter and a 64-bit key give
128 random bits by ten rounds of multiplying and mixing; there is no state, so any number can be computed by anybody, in any
order, on any device, bit for bit. Here the key is a request's seed and the counter says what the number is for.

Words are kept in int64 tensors: the product of two 32-bit words then wraps into the sign, and both its halves are still right.
"""

from torch import Tensor

_MUL = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10

# What a number is for: the last word of the counter, so that no two uses ever share one.
PURPOSE_SAMPLE = 0


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per counter. All tensors int64 with values in [0, 2^32), of shapes that broadcast together.

    A word of the counter is cheap as long as it has not been mixed with the others: give it its own smaller shape.
    """
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = a * _MUL[0], c * _MUL[1]
        # b and d come in with their upper halves uncleared: the masks at the end of each line clear them.
        a = ((product1 >> 32) ^ (b ^ key0)).bitwise_and_(_LOW)
        c = ((product0 >> 32) ^ (d ^ key1)).bitwise_and_(_LOW)
        b, d = product1, product0
        key0, key1 = (key0 + _KEY_STEP[0]) & _LOW, (key1 + _KEY_STEP[1]) & _LOW
    return a, b & _LOW, c, d & _LOW
