"""The TensorRT backend: runs plans of TensorRT and TensorRT-RTX on an NVIDIA GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfx.errors import ArtifactError, InputError, LfxError, PluginError, require
from lfx.runtime import plugin as plugins
from lfx.runtime.backends.cuda_memory import PinnedPool
from lfx.runtime.backends.device_tensors import DevicePool, DeviceTensor
from lfx.runtime.backends.tensorrt_worker import Worker
from lfx.runtime.device import check, cudart, require_gpu
from lfx.runtime.dlpack import CUDA
from lfx.runtime.flavor import FLAVORS
from lfx.runtime.plan import PlanManifest, decoder_path
from lfx.runtime.profile import DecoderProfile, Profile, choose_profile
from lfx.signature import PAST

Arrays = dict[str, NDArray[Any]]
DEVICE = 0
DLPACK_DEVICE = (CUDA, DEVICE)


class TensorRt:
    """A plan on the first GPU. Each thread that runs it has its own execution context, stream and buffers."""

    # TensorRT takes two axes of one name for equal.
    broadcasts = False

    def __init__(self, plan: Path, manifest: PlanManifest) -> None:
        """Load a plan that was compared with its manifest."""
        self._profiles: Sequence[Profile | DecoderProfile] = manifest.profiles
        self._load(plan, manifest, has_plugins=manifest.plugin_layers > 0)

    def _load(self, plan: Path, manifest: PlanManifest, *, has_plugins: bool) -> None:
        flavor = FLAVORS.get(manifest.flavor)
        if flavor is None:
            raise ArtifactError(
                f"{plan} is of flavor {manifest.flavor!r}, which this lfx does not know; build it again"
            )
        trt = require(flavor.module, flavor.extra)
        if trt.__version__ != manifest.tensorrt_version and not manifest.has_host_code:
            raise ArtifactError(
                f"{plan} was built by {manifest.flavor} {manifest.tensorrt_version}, and {trt.__version__} is "
                "installed; install that version, or build the plan again with: lfx build-engine"
            )
        library = plugins.library() if has_plugins else None
        capability = require_gpu()
        if capability != manifest.target:
            raise ArtifactError(
                f"{plan} was built for {manifest.target}, and this GPU is {capability}; build it again here with: "
                "lfx build-engine"
            )
        self._cuda = cudart()
        check(self._cuda.cudaSetDevice(DEVICE))
        self._trt = trt
        self._log = _Log()
        logger = self._log.logger(trt)
        if library is not None:
            _load_plugins(trt, library)
        self._runtime = trt.Runtime(logger)
        if manifest.has_host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{plan} cannot be loaded by {manifest.flavor}: {self._log.last()}; build it again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.input_names = [name for name in names if is_input[name]]
        self.output_names = [name for name in names if not is_input[name]]
        self.name = f"{manifest.flavor} {trt.__version__} {capability}"
        self._pool = PinnedPool(self._cuda)
        self._device_pool = DevicePool(self._cuda)
        self._workers = threading.local()

    def supports_shape(self, batch: int, seqlen: int) -> bool:
        """Whether a profile of the plan takes a batch of this shape."""
        return choose_profile(self._profiles, batch, seqlen) is not None

    def infer(self, feeds: Arrays, outputs: Sequence[str] | None = None, *, on_device: bool = False) -> Arrays:
        """Run one batch on this thread's own context and stream; see `lfx.runtime.backends.interface.Backend`.

        A large output is an array in pinned memory, up to a limit of pinned memory; others are in pageable memory.

        Raises:
            InputError: no profile of the plan takes this shape.
            LfxError: CUDA or TensorRT failed.
        """
        profile = self._profile_of({name: array.shape for name, array in feeds.items()})
        names = self.output_names if outputs is None else list(outputs)
        return self._worker().run(feeds, profile, names, on_device)

    def tensor(self, array: NDArray[Any]) -> DeviceTensor:
        """A tensor in device memory with the array's content."""
        return self._worker().copies.upload(array)

    def array(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A copy of a tensor."""
        return self._worker().copies.download(tensor)

    def take(self, tensor: DeviceTensor, rows: NDArray[np.int64]) -> DeviceTensor:
        """A copy of these rows on the device."""
        return self._worker().copies.take(tensor, rows)

    def infer_tensors(self, tensors: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Run one batch of tensors; the outputs stay on the device, and nothing is copied."""
        profile = self._profile_of({name: tensor.shape for name, tensor in tensors.items()})
        return self._worker().run_tensors(tensors, profile, self.output_names)

    def _worker(self) -> Worker:
        """The worker of this thread."""
        worker: Worker | None = getattr(self._workers, "worker", None)
        if worker is None:
            check(self._cuda.cudaSetDevice(DEVICE))  # CUDA's current device is per thread
            context = self._engine.create_execution_context()
            if context is None:
                raise LfxError(f"TensorRT could not create an execution context: {self._log.last()}")
            worker = self._workers.worker = Worker(
                self._cuda,
                self._trt,
                self._engine,
                context,
                (self._pool, self._device_pool),
                self._log.last,
                DLPACK_DEVICE,
            )
        return worker

    def _profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Index of the profile for these shapes of the inputs.

        Raises:
            InputError: no profile takes them.
        """
        shape = next(iter(shapes.values()))
        profile = choose_profile(self._profiles, shape[0], shape[-1])
        if profile is None:
            ranges = " or ".join(map(str, self._profiles))
            raise InputError(
                f"batch {shape[0]}, seqlen {shape[-1]} is outside what the plan was built for ({ranges}); split the "
                "batch, or rebuild with other ranges: lfx build-engine --batch MIN:OPT:MAX --seqlen MIN:OPT:MAX"
            )
        return profile


class TensorRtDecoder(TensorRt):
    """The decoder's plan of a model that writes texts."""

    def __init__(self, plan: Path, manifest: PlanManifest) -> None:
        """Load the decoder's plan beside the encoder's `plan`."""
        assert manifest.decoder_plan is not None
        self._profiles = self._decoder_profiles = manifest.decoder_plan.profiles
        self._load(decoder_path(plan), manifest, has_plugins=False)

    def _profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        (rows, tokens), seqlen = shapes["input_ids"], shapes["encoder_attention_mask"][1]
        past = next((shape[2] for name, shape in shapes.items() if name.startswith(PAST) and ".decoder." in name), 0)
        fitting = [i for i, profile in enumerate(self._decoder_profiles) if profile.supports_step(tokens, past)]
        profile = choose_profile([self._decoder_profiles[i] for i in fitting], rows, seqlen)
        if profile is None:
            ranges = " or ".join(map(str, self._profiles))
            raise InputError(
                f"rows {rows}, tokens {tokens}, cached {past}, seqlen {seqlen} is outside what the decoder's plan was "
                f"built for ({ranges}); give fewer sequences or beams, or rebuild with other ranges: lfx build-engine "
                "--batch MIN:OPT:MAX --num-beams N --max-new-tokens N --seqlen MIN:OPT:MAX"
            )
        return fitting[profile]


def _load_plugins(trt: Any, library: Path) -> None:
    """Register the lfx plugins with TensorRT, once in a process."""
    registry = trt.get_plugin_registry()
    is_loaded = any(creator.plugin_namespace == plugins.NAMESPACE for creator in registry.all_creators)
    if not is_loaded and registry.load_library(str(library)) is None:
        raise PluginError(f"{trt.__name__} {trt.__version__} could not load {library}; install lfx again")


class _Log:
    """Collects TensorRT's errors, whose text is needed when a call fails."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def last(self) -> str:
        """The text of the newest error."""
        return self._lines[-1] if self._lines else "it gave no reason"

    def logger(self, trt: Any) -> Any:
        """Make an ILogger that appends errors to this log."""
        lines = self._lines

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    lines.append(" ".join(message.split()))

        return Logger()
