"""Random numbers that depend on a seed and a position alone.

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): any position costs the same, and no state is carried from one to the next. So a reply
that is stopped and continued goes on as if it had not been stopped. Knows nothing about tokens.
"""

TOKEN, CHANCE = range(2)  # which of the numbers of a position: for the draw, for XTC


def uniform(seed: int, position: int, which: int = TOKEN) -> float:
    """A number in [0, 1), one of four for this `seed` (0..2**64-1) and `position` (0 or more).

    The bits are Philox4x64-10's with the seed as key and the position as counter, of which NumPy
    promises that they stay; the upper 53 are the fraction.
    """
    from numpy.random import Philox

    bits = Philox(key=seed, counter=position).random_raw(which + 1)[which]
    return float(int(bits) >> 11) * 2.0**-53
