"""Turns a quantised GGUF file into an ordinary model folder, which Trainer and save_pretrained accept."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

from .errors import AssetError

FILE = "model.gguf"


def require() -> None:
    """Raise before the download if the package that reads GGUF files is missing.

    Raises:
        AssetError: The package gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise AssetError("reading this model needs the package gguf; install it with: pip install gguf")


def to_safetensors(folder: Path) -> None:
    """Replace `model.gguf` in a folder with a config, a tokenizer and weights in bf16.

    Args:
        folder: contains model.gguf; afterwards it can be given to `from_pretrained`.
    """
    # Progress bars would fill a log, so they are shown only on a terminal.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        _convert(folder)
    (folder / FILE).unlink()


def _convert(folder: Path) -> None:
    """Convert the file. The loaded model is marked as quantised, so its weights are copied into a new model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rename_for_transformers_4(folder)


def _rename_for_transformers_4(folder: Path) -> None:
    """Add transformers 4's names for keys that transformers 5 renamed, so that both versions can read the files."""
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
