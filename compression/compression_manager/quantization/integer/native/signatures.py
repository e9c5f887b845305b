"""The types of the C++ functions, which a compiled library does not tell."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_pointer, _integer, _size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_float, _bool = ctypes.c_float, ctypes.c_bool

# Function -> the type of its result and those of its arguments; see the C++ files.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "quantize_elements": (
        None,
        [_pointer, _size, _float, _float, _float, _float, _bool, _pointer, _pointer],
    ),
    "quantize_finite_elements": (
        _bool,
        [_pointer, _size, _float, _float, _float, _float, _bool, _pointer],
    ),
    "dequantize_elements": (None, [_pointer, _size, _bool, _float, _integer, _bool, _pointer]),
    "add_dequantized_elements": (
        None,
        [_pointer, _pointer, _size, _bool, _float, _integer, _pointer],
    ),
    "clear_marked": (None, [_pointer, _size, _pointer]),
    "find_ends": (None, [_pointer, _size, _pointer]),
    "relu_elements": (None, [_pointer, _size, _pointer, _pointer, _pointer]),
    "keep_marked": (None, [_pointer, _size, _pointer, _pointer]),
    "quantize_rows": (None, [_pointer, _size, _size, _pointer, _pointer, _pointer]),
    "dequantize_rows": (None, [_pointer, _size, _size, _size, _pointer, _bool, _pointer]),
    "most_pieces": (_integer, []),
    "multiply_codes": (
        ctypes.c_char_p,
        [
            *[_pointer, _bool, _pointer, _float, _pointer, _bool, _integer],
            *[_size, _size, _size, _integer, _pointer],
        ],
    ),
    "integer_instructions": (ctypes.c_char_p, []),
    "multiply_integers": (
        ctypes.c_char_p,
        [_pointer, _pointer, _integer, _pointer, _pointer, _size, _size, _size, _pointer],
    ),
    "channels_unit": (_size, []),
    "convolve_integers": (
        ctypes.c_char_p,
        [
            *[_pointer, _bool, _pointer, _integer, _pointer, _pointer],
            *[_size, _size, _size, ctypes.POINTER(_size), _pointer],
        ],
    ),
    "has_convolution_gradients": (_bool, []),
    "convolution_input_gradient": (
        ctypes.c_char_p,
        [
            *[_pointer, _pointer, _pointer],
            *[_size, _size, _size, ctypes.POINTER(_size), _bool, _pointer],
        ],
    ),
    "convolution_weight_gradient": (
        ctypes.c_char_p,
        [
            *[_pointer, _pointer, _bool, _bool, _integer, _float],
            *[_size, _size, _size, ctypes.POINTER(_size), _pointer],
        ],
    ),
}


@functools.cache
def declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library, whose functions then check their arguments' number and convert them."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype = result
        function.argtypes = arguments
    return functions
