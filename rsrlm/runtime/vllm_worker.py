"""What runs inside vLLM's worker processes: receive one version of the weights, check it, load it.

Registered with vLLM's own weight-transfer API under the name `rsrlm`. vLLM imports this module in its workers through
`worker_extension_cls`. Nothing of the model is touched before all bytes have arrived and their
checksum is right, so a refused update leaves the engine as it was.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rsrlm.runtime.weights import WeightFile, bytes_of, tensors_in, verified

BACKEND = "rsrlm"


def repair_tied_head(model: torch.nn.Module) -> None:
    """Repack the LM head from the embedding that it is tied to.

    On CPUs vLLM keeps a oneDNN-packed copy of the head, and layerwise reload processes tied parameters for one parent
    only, so the copy stays stale without a word (vLLM 0.32). Remove when an update repacks both.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Empty: files need no preparation."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    files: list[dict[str, Any]] = field(default_factory=list)


class FileEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Reads the files of a version from this host's shared memory or disk."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    seconds: dict[str, float]

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.seconds = {}

    def receive_weights(self, update_info: UpdateInfo) -> None:
        started = time.perf_counter()
        files = [WeightFile(**entry) for entry in update_info.files]
        arrived = [verified(bytes_of(file.path), file, f"worker {self.parallel_config.rank}") for file in files]
        received = time.perf_counter()
        initialize_layerwise_reload(self.model)
        for data in arrived:
            self.model.load_weights(tensors_in(data))
        self.seconds = {"transfer": received - started, "load": time.perf_counter() - received}

    def finish_weight_update(self) -> None:
        started = time.perf_counter()
        finalize_layerwise_reload(self.model, self.model_config)
        repair_tied_head(self.model)
        self.seconds["repack"] = time.perf_counter() - started

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Mixed into vLLM's worker; the names must not collide with its own."""

    def rsrlm_seconds(self) -> dict[str, float]:
        """How long the last update took in this worker: transfer (arrival and checksum), load, repack."""
        return dict(self.weight_transfer_engine.seconds)  # type: ignore[attr-defined]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)
