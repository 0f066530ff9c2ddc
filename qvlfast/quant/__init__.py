"""Weight formats with fewer bits, which linears get them, and the files they come in."""

from .plan import FORMATS, Quantization
from .weights import Fp8BlockWeight, Fp8Weight, Int4Weight, Int8Weight, QuantisedWeight, quantise

__all__ = [
    "FORMATS",
    "Fp8BlockWeight",
    "Fp8Weight",
    "Int4Weight",
    "Int8Weight",
    "QuantisedWeight",
    "Quantization",
    "quantise",
]
