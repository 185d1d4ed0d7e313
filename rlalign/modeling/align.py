"""``align(model)``: a Hugging Face causal LM onto our operators, in place.

Norms and rotary embeddings are recognised by what they compute, not by their name alone: each replacement is compared
with the module it replaces on random input before it is kept. A linear is one whose forward is ``nn.Linear``'s, so it
is with ``nn.LayerNorm``; an activation is one of PyTorch's or transformers'. What is not recognised stays as it was,
and ``audit`` refuses it. Then what MLPs and, on a GPU, attentions compute between these is fused (gates.py,
rotation.py), where forward has the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlalign.config import Numerics
from rlalign.modeling import layers
from rlalign.modeling.attention import ATTENTION_NAME
from rlalign.modeling.gates import align_gates
from rlalign.modeling.inner_attention import InnerAttention, default_attention, refuse_contradiction
from rlalign.modeling.rotation import align_rotation

_GELU_APPROXIMATION = {
    "GELU": None,  # torch.nn.GELU: its own attribute says
    "GELUActivation": "none",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "NewGELUActivation": "tanh",
}
_BARE_EPS = 1e-5  # OLMo's
# what a refusal says of the other numerics: recipes and the library have a setting of that name
HOW_NATIVE = "(rlalign-verify: --numerics native; bisect: --a native --b native,decode)"
# Some models call dropout by function: no module shows it, but a field of config.json named like these does ...
_DROPOUT = ("dropout", "pdrop", "layerdrop")
# ... unless it is of a head that a decoder has not
_OTHER_HEADS = ("classifier_", "summary_")
_NO_DROPOUT = "dropout is not supported: 0 in config.json, or load_policy(..., without_dropout=True), switches it off"


def backend_for(numerics: Numerics, device: torch.device | str) -> str:
    """The operators' backend that serves ``numerics`` on ``device``."""
    if numerics == "native":
        return "native"
    return "triton" if torch.device(device).type == "cuda" else "reference"


def align(
    model: PreTrainedModel, *, backend: str | None = None, attention: InnerAttention | None = None
) -> PreTrainedModel:
    """Move ``model`` onto our operators, in place; parameter names, ``state_dict`` and module graph stay.

    backend: "reference" (invariant, any device), "triton" (invariant, CUDA) or "native": PyTorch's own operators,
    with only the attention function replaced, so that packed and paged rows work. None takes the invariant one of the
    model's device: move the model there first.
    attention: another inner attention than the backend's own (modeling/inner_attention.py).
    Returns the same model. Raises TypeError for anything else, ValueError naming the module where something can't be
    made invariant, or the attention that can't run there, or isn't invariant beside operators that are. Nothing has
    been changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={model!r:.80}, a {type(model).__name__}: need a Hugging Face causal LM")
    if isinstance(getattr(model, "rlalign_backend", None), str):
        raise ValueError(f"model is already aligned (backend={model.rlalign_backend!r}): load it anew")
    backend = backend_for("invariant", model.device) if backend is None else backend
    attention = default_attention(backend) if attention is None else attention
    refuse_contradiction(attention, "native" if backend == "native" else "invariant")
    attention.check(model.device, model.dtype)
    _refuse_dropout(model)
    if backend != "native":
        _refuse_batch_dependent_rope(model)
    model.set_attn_implementation(ATTENTION_NAME)
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx"):
            module.rlalign_backend = backend
            module.rlalign_attention = attention
        if backend != "native":
            _align_module(name, module, backend)
    if backend != "native":
        align_gates(model, backend)
    if backend == "triton":  # elsewhere forward is the same element-wise calls, and some views more
        align_rotation(model, backend)
    _align_storage(model)
    model.rlalign_backend = backend
    return model


def _align_module(name: str, module: nn.Module, backend: str) -> None:
    kind = type(module).__name__
    # a subclass with a forward of its own (an adapter's, a quantised weight's) computes something else
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        layers.become(module, layers.AlignedLinear, backend)
    elif isinstance(module, nn.LayerNorm):
        if type(module).forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:
            layers.become(module, layers.AlignedLayerNorm, backend, eps=module.eps)
    elif kind.endswith("RMSNorm") and hasattr(module, "weight"):
        _align_norm(module, backend)
    elif kind.endswith("LayerNorm") and next(module.parameters(), None) is None:
        _align_bare_layer_norm(module, backend)
    elif kind.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
        _align_rotary(module, backend)
    elif kind in ("SiLU", "SiLUActivation"):
        layers.become(module, layers.AlignedSiLU, backend)
    elif kind in _GELU_APPROXIMATION:
        approximate = _GELU_APPROXIMATION[kind] or module.approximate
        layers.become(module, layers.AlignedGELU, backend, approximate=approximate)


def _align_storage(model: PreTrainedModel) -> None:
    """Weights onto 64-byte boundaries, where a checkpoint's mapped file need not have put them.

    Our products ask for that, and would copy an unaligned weight at every call. Tied weights stay one parameter.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _refuse_dropout(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(f"dropout p={module.p} in {name}: {_NO_DROPOUT}")
    for field, value in dropout_fields(model.config.get_text_config()).items():
        raise ValueError(f"config.{field}={value}: {_NO_DROPOUT}")


def dropout_fields(config: PreTrainedConfig) -> dict[str, float]:
    """Fields of a config that give a decoder a dropout, which is not 0."""
    return {
        field: value
        for field, value in config.to_dict().items()
        if any(name in field for name in _DROPOUT) and not field.startswith(_OTHER_HEADS) and value
    }


def _refuse_batch_dependent_rope(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rope_type = getattr(module, "rope_type", None)
        if hasattr(module, "inv_freq") and isinstance(rope_type, str) and "dynamic" in rope_type:
            raise ValueError(
                f"{name}: rope_type={rope_type!r} makes a token's frequencies depend on the longest sequence beside "
                "it, so it cannot be invariant; supported: default, linear, llama3, proportional, yarn, and longrope "
                f"up to its original_max_position_embeddings. Try numerics=native {HOW_NATIVE}"
            )


def _align_norm(module: nn.Module, backend: str) -> None:
    """Find the form of RMSNorm (weight or 1 + weight; rounded before or after it) that this module computes."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        return  # not one that we know: audit names what it computes
    probe = _with_random_weight(module)
    x = _random_like_weight(module, rows=8)
    expected = probe(x)
    for offset, cast_before in product((0.0, 1.0), (True, False)):
        candidate = copy.deepcopy(probe)
        settings = {"eps": eps, "weight_offset": offset, "cast_before_weight": cast_before}
        layers.become(candidate, layers.AlignedRMSNorm, "native", **settings)
        if _agree(candidate(x), expected):
            layers.become(module, layers.AlignedRMSNorm, backend, **settings)
            return


def _align_bare_layer_norm(module: nn.Module, backend: str) -> None:
    """A LayerNorm without weight and bias that is none of PyTorch's: OLMo's, whose eps is written in its forward."""
    shape = getattr(module, "normalized_shape", ())
    if not isinstance(shape, Sized) or len(shape) != 1:
        return
    # rows so small that eps is most of what they are divided by, beside ordinary ones
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    x[::2] *= 1e-3
    candidate = copy.deepcopy(module)
    layers.become(candidate, layers.AlignedLayerNorm, "native", eps=_BARE_EPS)
    if all(_agree(candidate(x.to(dtype)), module(x.to(dtype))) for dtype in (torch.float32, torch.bfloat16)):
        layers.become(module, layers.AlignedLayerNorm, backend, eps=_BARE_EPS)


def _with_random_weight(module: nn.Module) -> nn.Module:
    """A copy whose weight is random: a weight of ones would hide the order of rounding."""
    probe = copy.deepcopy(module).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator))
    return probe


def _random_like_weight(module: nn.Module, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, module.weight.shape[-1], generator=generator)
    return x.to(device=module.weight.device, dtype=module.weight.dtype)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Same function up to summation order: nearly every element has the same bits in bf16, or is close in float32."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    return (ours == theirs).float().mean().item() > 0.9


def _align_rotary(module: nn.Module, backend: str) -> None:
    if not isinstance(getattr(module, "rope_type", "default"), str):
        return  # several frequency sets in one module (Gemma-3): not ours yet, audit names it
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=module.inv_freq.device)
    longest = _longest_rope(module)
    positions = torch.arange(0, min(64, longest or 64), 7, device=module.inv_freq.device).unsqueeze(0)
    tables = module(x, positions)  # of a longrope, this leaves the frequencies of short sequences in inv_freq
    if not isinstance(tables, tuple):
        return  # complex numbers instead of cos and sin (DeepSeek-V2): audit names what comes of them
    expected, _ = tables
    candidate = copy.deepcopy(module)
    cast = expected.dtype == torch.bfloat16
    layers.become(candidate, layers.AlignedRotary, "native", cast=cast, longest=longest)
    if _agree(candidate(x, positions)[0], expected):
        layers.become(module, layers.AlignedRotary, backend, cast=cast, longest=longest)


def _longest_rope(module: nn.Module) -> int | None:
    """The longest sequence that frequencies of our own are right for; None for any.

    A longrope takes others once one of the batch is longer than the model was first trained at: up to there they are
    constants, and a policy's sequences end there.
    """
    if getattr(module, "rope_type", None) != "longrope":
        return None
    return module.config.rope_parameters["original_max_position_embeddings"]
