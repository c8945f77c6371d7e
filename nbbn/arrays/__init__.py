"""Arrays of every kind behind one face: where they lie, and what can be done with them there."""

from nbbn.arrays.host import HOST, Array, numbers_of
from nbbn.arrays.libraries import giver, view
from nbbn.arrays.place import Place, as_array, as_numpy, beside, found_on_gpu, place_of

__all__ = [
    "HOST",
    "Array",
    "Place",
    "as_array",
    "as_numpy",
    "beside",
    "found_on_gpu",
    "giver",
    "numbers_of",
    "place_of",
    "view",
]
