"""A Parquet column has an extension type whose values are unpickled, such as Ray registers where it is imported."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lfx.runtime.documents.formats import read_documents
from tests.attacks import refused


class _Object(pyarrow.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pyarrow.large_binary(), "lfx.tests.object")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> _Object:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type:
        return _Scalar


class _Scalar(pyarrow.ExtensionScalar):
    def as_py(self, **options: Any) -> Any:
        return pickle.loads(self.value.as_py())


class _Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def attack(folder: Path) -> str:
    """The stored bytes are read, which are no document; inside another type they are refused."""
    values = pyarrow.ExtensionArray.from_storage(
        _Object(), pyarrow.array([pickle.dumps(_Program())], pyarrow.large_binary())
    )
    lists = pyarrow.ListArray.from_arrays([0, 1], values)
    plain, nested = folder / "plain.parquet", folder / "nested.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": values, "text": ["the fox"], "pair": values}), plain)
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": lists}), nested)
    pyarrow.register_extension_type(_Object())
    try:
        [(_, document)] = read_documents(plain)
        assert isinstance(document["id"], bytes)
        refusal = refused(lambda: list(read_documents(nested)))
        if hasattr(pyarrow, "opaque"):  # since pyarrow 19
            struct = pyarrow.StructArray.from_arrays([values], ["a"])
            hidden = pyarrow.ExtensionArray.from_storage(pyarrow.opaque(struct.type, "x", "y"), struct)
            pyarrow.parquet.write_table(pyarrow.table({"text": hidden}), nested)
            refused(lambda: list(read_documents(nested)))
    finally:
        pyarrow.unregister_extension_type("lfx.tests.object")
    assert not Path("ran").exists(), "the program was run"
    return refusal
