"""The name of a tensor or the path of a library ends its line in config.pbtxt, and goes on with settings of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from lfx.manifest import MANIFEST, sealed
from lfx.runtime.triton.config import Instances, ModelConfig
from lfx.runtime.triton.repository import Settings, write_model
from lfx.signature import TensorSpec
from tests.attacks import make_bundle, refused

INJECTED = (
    'x" }\nparameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/evil.tar.gz" } }\noutput { name: "y'
)


def attack(folder: Path) -> str:
    """Names and paths are quoted; a model's name, and a bundle whose signature is not its graph's, are refused."""
    from tritonclient.grpc import model_config_pb2

    bundle = make_bundle(folder / "bundle")
    library = folder / 'a" }\nparameters { key: "EXECUTION_ENV_PATH" value { string_value: "evil" } }\n# .so'
    settings = Settings(name="m", triton_backend="onnxruntime", custom_ops=library)
    written = write_model(bundle, folder / "repository", settings)
    config: Any = text_format.Parse((written.folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.model_operations.op_library_filename == [str(library)]
    assert not config.parameters
    config = text_format.Parse(_config_of(INJECTED), model_config_pb2.ModelConfig())
    assert ([tensor.name for tensor in config.output], len(config.parameters)) == ([INJECTED], 0)

    assert refused(Settings, name=INJECTED)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["outputs"][0]["name"] = INJECTED
    (bundle / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return refused(write_model, bundle, folder / "other", Settings())


def _config_of(name: str) -> str:
    """The config of a model with an output of this name."""
    output = TensorSpec(name, "float32", ("batch", 4))
    return ModelConfig("m", "python", [], [output], True, 8, 0, 8, Instances()).text()
