"""Reads and writes safetensors files, and the low-precision formats they hold. numpy only.

A tensor is a `Stored(dtype, shape, data)`: the bytes as they are in the file. `to_float64` decodes
them exactly. Written from the format's description, on purpose not the code the server uses.
"""

import json
import math
import os
import struct

import numpy as np

NUMPY_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "U8": np.uint8, "I8": np.int8, "BOOL": np.bool_,
}
BYTES_PER_ELEMENT = {name: np.dtype(kind).itemsize for name, kind in NUMPY_TYPES.items()}
BYTES_PER_ELEMENT |= {"BF16": 2, "F8_E4M3": 1}

E4M3_MAX = 448.0


def bfloat16_bits(x):
    """float32 -> the upper 16 bits, rounded to nearest even; NaN stays a quiet NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def float32_of_bfloat16_bits(bits):
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def _e4m3_values():
    """The value of each of the 256 codes of E4M3FN: no infinity, 0x7f and 0xff are NaN."""
    values = np.empty(256, np.float64)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values[code] = np.nan
        elif exponent == 0:
            values[code] = sign * mantissa * 2.0**-9
        else:
            values[code] = sign * (8 + mantissa) * 2.0 ** (exponent - 10)
    return values


E4M3_VALUES = _e4m3_values()


def e4m3_codes(x):
    """float -> code, rounded to nearest even, saturating at +-448."""
    x = np.asarray(x, np.float64)
    magnitude = np.minimum(np.abs(x), E4M3_MAX)
    values = E4M3_VALUES[:127]  # 0 .. 448, increasing
    upper = np.minimum(np.searchsorted(values, magnitude, side="left"), 126)
    lower = np.maximum(upper - 1, 0)
    to_upper, to_lower = values[upper] - magnitude, magnitude - values[lower]
    nearest_is_lower = (to_lower < to_upper) | ((to_lower == to_upper) & (lower % 2 == 0))
    code = np.where(values[upper] == magnitude, upper, np.where(nearest_is_lower, lower, upper))
    code = code.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)
    return np.where(np.isnan(x), np.uint8(0x7F), code).astype(np.uint8)


def e4m3_decode(codes):
    return E4M3_VALUES[np.asarray(codes, np.uint8)]


class Stored:
    """A tensor as a file holds it."""

    def __init__(self, dtype, shape, data):
        self.dtype = dtype
        self.shape = tuple(int(size) for size in shape)
        self.data = bytes(data)
        expected = math.prod(self.shape) * BYTES_PER_ELEMENT[dtype]
        if expected != len(self.data):
            raise ValueError(f"{dtype} {self.shape} has {len(self.data)} bytes, expected {expected}")

    @staticmethod
    def bfloat16(x):
        return Stored("BF16", np.shape(x), bfloat16_bits(x).tobytes())

    @staticmethod
    def e4m3(codes):
        return Stored("F8_E4M3", codes.shape, np.ascontiguousarray(codes, np.uint8).tobytes())

    @staticmethod
    def of(array):
        """In the array's own type."""
        array = np.ascontiguousarray(array)
        for name, kind in NUMPY_TYPES.items():
            if array.dtype == kind:
                return Stored(name, array.shape, array.tobytes())
        raise TypeError(f"safetensors has no type for {array.dtype}")

    def numpy(self):
        """As stored: BF16 as uint16 bits, F8_E4M3 as uint8 codes."""
        kind = {"BF16": np.uint16, "F8_E4M3": np.uint8}.get(self.dtype) or NUMPY_TYPES[self.dtype]
        return np.frombuffer(self.data, kind).reshape(self.shape)

    def to_float64(self):
        array = self.numpy()
        if self.dtype == "BF16":
            return float32_of_bfloat16_bits(array).reshape(self.shape).astype(np.float64)
        if self.dtype == "F8_E4M3":
            return e4m3_decode(array)
        return array.astype(np.float64)


def save(path, tensors, metadata=None):
    """Writes {name: Stored} in that order, the header padded with spaces to 8 bytes."""
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = {str(key): str(value) for key, value in metadata.items()}
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.data)


def load(path):
    """{name: Stored} of one file."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        body = file.read()
    header.pop("__metadata__", None)
    return {name: Stored(entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()}


def load_checkpoint(folder):
    """{name: Stored} of a model folder, single file or sharded with an index."""
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
    tensors = {}
    for name in files:
        tensors.update(load(os.path.join(folder, name)))
    return tensors
