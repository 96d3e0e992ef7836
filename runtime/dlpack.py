"""`DeviceArray`: an array in device memory, which PyTorch, CuPy, JAX and others take by DLPack without a copy.

Source: DLPack 0.8, dlpack.h, https://github.com/dmlc/dlpack; the Python protocol is that of the array API standard.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CPU, CUDA = 1, 2  # DLDeviceType
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode by the kind of a numpy dtype
_NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# Address of each struct that a consumer may hold -> what it needs: the struct, its shape and the owner of the memory.
_held: dict[int, Any] = {}


def _delete(address: int) -> None:
    """The deleter of all structs, which a consumer calls once."""
    _held.pop(address, None)


def _forget(capsule: int) -> None:
    """The destructor of all capsules: free what no consumer has taken. A consumer gives a capsule another name."""
    if _is_valid(capsule, _NAME):
        _held.pop(_pointer(capsule, _NAME), None)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_deleter, _destructor = _callback(_delete), _callback(_forget)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# The capsule is an address here: its destructor must not add a reference to it.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class DeviceArray:
    """A contiguous array in device memory.

    Attributes:
        address: of its first element.
        shape, dtype: as of a numpy array.
        device: DLPack's device type and number.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: Any
    ) -> None:
        """Wrap memory that `owner` keeps, and that must hold the numbers already."""
        self.address, self.shape, self.dtype, self.device = address, shape, dtype, device
        self._owner = owner

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """Return a capsule that shares the memory. Nothing is pending on it, so `stream` has nothing to wait for."""
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = _ManagedTensor(
            _Tensor(
                self.address,
                _Device(*self.device),
                len(self.shape),
                _DataType(_CODES[self.dtype.kind], 8 * self.dtype.itemsize, 1),
                shape,
                None,  # contiguous
                0,
            ),
            None,
            ctypes.cast(_deleter, ctypes.c_void_p),
        )
        address = ctypes.addressof(managed)
        _held[address] = (managed, shape, self._owner)
        return _new_capsule(address, _NAME, ctypes.cast(_destructor, ctypes.c_void_p))

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and number."""
        return self.device
