"""Checkpoints in Hugging Face's format: loading onto our operators, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlalign.config import Numerics, ScoringDtype
from rlalign.modeling.align import align, backend_for, dropout_fields
from rlalign.modeling.audit import audit
from rlalign.modeling.inner_attention import InnerAttention
from rlalign.modeling.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_policy(
    path: Path | str,
    *,
    dtype: ScoringDtype = "float32",
    numerics: Numerics = "invariant",
    device: torch.device | str = "cpu",
    attention: InnerAttention | None = None,
    without_dropout: bool = False,
) -> Policy:
    """An aligned and audited policy from a checkpoint folder. Nothing is fetched from a hub.

    attention: None is the operators' own (``align``).
    without_dropout: that of config.json counts as 0, as when scoring and sampling; else a model that has it is refused.
    Raises FileNotFoundError for a missing folder or file, ValueError for weights that are missing or not finite or a
    dtype that these operators don't take, AuditError for a model that can't be made exact.
    """
    if dtype == "float16" and backend_for(numerics, device) == "reference":
        raise ValueError("dtype=float16: on a CPU only numerics=native computes in it")
    model = load_model(path, dtype=dtype, device=device, without_dropout=without_dropout)
    align(model, backend=backend_for(numerics, device), attention=attention)
    if numerics == "invariant":
        audit(model)
    return Policy(model)


def as_policy(model: Policy | PreTrainedModel) -> Policy:
    """A policy of what people have at hand: one already, or a Hugging Face decoder, aligned or not.

    A decoder that was aligned keeps its backend; a plain one is aligned in place to the invariant operators of its
    device. Both are audited, unless the backend is "native".
    Raises TypeError for anything else, and what ``align``, ``audit`` and ``Policy`` raise.
    """
    if isinstance(model, Policy):
        return model
    if not isinstance(model, PreTrainedModel):
        given = f"{model!r:.80}, a {type(model).__name__}"
        raise TypeError(f"model={given}: need a Policy (as load_policy gives), or a Hugging Face causal LM")
    if not isinstance(getattr(model, "rlalign_backend", None), str):
        align(model)
    if model.rlalign_backend != "native":
        audit(model)  # also when aligned before: a model that was refused once must not pass the second time
    return Policy(model)


def load_model(
    path: Path | str, *, dtype: ScoringDtype, device: torch.device | str, without_dropout: bool = False
) -> PreTrainedModel:
    """The checkpoint's causal LM, in evaluation mode, with all of its weights, which are finite.

    Weights of the checkpoint that this model doesn't have, such as those of a head for several tokens, are left out.
    """
    folder = _checkpoint_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if without_dropout:
            for one in (config, config.get_text_config()):
                for name in dropout_fields(one):
                    setattr(one, name, 0.0)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: weights can't be read ({_first_line(error)})") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers fills them with random numbers
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: the checkpoint lacks weights of {type(model).__name__}: {missing[0]}{more}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{folder}: weight {name!r} holds NaN or infinite values")
    return model.to(device).eval()


def load_tokenizer(path: Path | str, *, extra_ids: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises ValueError if it has more ids than the model, or can't be read.

    extra_ids: take one with more ids too, for whoever reads ids that are there already: a padding token that was added
    is common. Special tokens of such ids are dropped, so that nobody pads or stops with what the model has no row for.
    """
    folder = _checkpoint_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make one up from the model's type, with ids of its own.
        raise FileNotFoundError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no usable tokenizer ({_first_line(error)})") from error
    vocab_size = AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if extra_ids:
        _drop_special_tokens(tokenizer, vocab_size)
    elif largest >= vocab_size:
        raise ValueError(
            f"{folder}: wrong tokenizer: its largest id is {largest}, but the model's vocabulary has {vocab_size}"
        )
    return tokenizer


def _drop_special_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    for name in ("bos_token", "eos_token", "pad_token"):
        if (found := getattr(tokenizer, f"{name}_id", None)) is not None and found >= vocab_size:
            setattr(tokenizer, name, None)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path | str) -> None:
    """Write ``model`` (aligned or not) and its tokenizer as an ordinary Hugging Face checkpoint."""
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _checkpoint_folder(path: Path | str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"model folder {folder} {what}")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
