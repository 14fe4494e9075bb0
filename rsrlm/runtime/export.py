"""What a training leaves: model folders, and the files that engines take the weights from."""

import errno
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsrlm.jobs import TrainJob
from rsrlm.model import load_tokenizer
from rsrlm.runtime.gloo import broadcast, group_of_sender
from rsrlm.runtime.lora import FOLDER as ADAPTER
from rsrlm.runtime.lora import write_adapter
from rsrlm.runtime.mailbox import BroadcastJob, Listening
from rsrlm.runtime.weights import bytes_of
from rsrlm.settings.machine import ModelConfig
from rsrlm.store.atomic import sync_files

SHARD = "5GB"  # the largest file of an exported model
FULL_BYTES = 64 << 20  # less free space than this explains a failed write


def export(
    model: Any,
    state: dict[str, Any],
    job: TrainJob,
    config: ModelConfig,
    output: Path,
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """A Hugging Face folder with tokenizer and chat template, and where there are adapters, a folder of peft with them;
    it appears under its name only when it is whole."""
    from transformers import AutoConfig

    scratch = output.with_name(output.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, state_dict=state, max_shard_size=SHARD)
    # The model's own config has what this stage's training set, dropout and no cache: that is no other stage's.
    source = AutoConfig.from_pretrained(job.model, trust_remote_code=config.trust_remote_code)
    source.architectures, source.dtype = model.config.architectures, model.dtype
    source.save_pretrained(scratch)
    load_tokenizer(Path(job.model), config.trust_remote_code).save_pretrained(scratch)
    generation = Path(job.model) / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, scratch)
    if adapters and job.train.lora:
        source_folder = Path(job.model)
        base = source_folder.name if source_folder.parent == Path(job.run) / "models" else "M0"
        write_adapter(scratch / ADAPTER, adapters, job.train.lora, base, job.model)
    sync_files(scratch)
    shutil.rmtree(output, ignore_errors=True)
    scratch.rename(output)


def send(job: BroadcastJob, address: str, say: Callable[[Listening], None]) -> None:
    """Broadcast the files over a gloo group of this process and the hosts of replicas, at this host's address; `say`
    tells where it listens."""
    with socket.create_server((address, 0)) as server:
        say(Listening(address=address, port=server.getsockname()[1]))
        group = group_of_sender(server, address, job.world_size, job.deadline_s)
        for path in job.paths:
            broadcast(group, bytes_of(path))


def disk_is_full(error: Exception, folder: str | Path) -> bool:
    """Whether a write failed for want of space, so that a rebuilt group would fail in the same way.

    safetensors raises an error of its own with the system's words, and takes away what it has written. torch says
    nothing of the reason, and leaves the disk full.
    """
    said = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return said or (isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(folder).free <= FULL_BYTES)
