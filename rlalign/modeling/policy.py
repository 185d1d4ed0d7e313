"""The policy: one aligned model, called in the same way by engine and trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from rlalign_kernels import LogprobOutput, SampleOutput, SamplingRows, linear_logprob, linear_sample, probe, sweep
from rlalign_kernels.claims import AttentionShape, Shapes
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.modeling.context import AttentionCall, AttentionContext, PackedContext
from rlalign.modeling.fused import fuse_projections
from rlalign.modeling.inner_attention import Invariant
from rlalign.modeling.layers import AlignedLayerNorm, AlignedLinear, AlignedRMSNorm, AlignedRotary

# mean share of a logit that rounding to 16 bits may move it by, several times
_ROUNDED = 0.01


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer caches per token."""

    num_kv_heads: int
    head_dim: int
    value_dim: int


class Policy:
    """A Hugging Face causal LM that ``align`` has prepared, with the two things that RL asks of it.

    Rows are tokens. ``hidden`` runs the decoder over packed or paged rows; ``logprobs`` and ``sample`` turn selected
    rows into log-probs or tokens without holding logits for all of them. The same hidden row gives the same bits in
    both. Legend: T rows, N selected rows, H hidden size, V vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError if the model was not aligned, has layers whose tokens meet elsewhere than in attention, or
        transforms its logits in a way we don't know."""
        if not isinstance(getattr(model, "rlalign_backend", None), str):
            raise ValueError(f"{type(model).__name__} is not aligned: call rlalign.modeling.align(model) first")
        self.model = model
        self.backend: str = model.rlalign_backend
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embedding: a causal LM is needed")
        if model.base_model is model:
            raise ValueError(
                f"{type(model).__name__} has no decoder of its own under {model.base_model_prefix!r}: not supported, "
                "with any numerics"
            )
        self.head: nn.Linear = head
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        tables = [m for m in model.modules() if isinstance(m, AlignedRotary)]
        self._rope_lengths = [m.rlalign_longest for m in tables if m.rlalign_longest is not None]
        self._layers = self._see_layers()
        self.kv_layout: list[KVShape] = self._layers.kv_layout(model.config.get_text_config().num_hidden_layers)
        self._probe_operators()
        self._check_head()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model's config allows, and its rotary tables with it."""
        return min([self.model.config.max_position_embeddings, *self._rope_lengths])

    @property
    def length_note(self) -> str:
        """Why ``max_positions`` is less than the config's, as the end of a sentence; empty where it isn't."""
        whole = self.model.config.max_position_embeddings
        if self.max_positions == whole:
            return ""
        return f" ({whole} with numerics=native: beyond {self.max_positions} its longrope takes other frequencies)"

    def why_not_captured(self) -> str | None:
        """Why ``hidden`` over pages and ``sample`` can't be captured in a CUDA graph; None if they can."""
        if self.device.type != "cuda":
            return f"there are no CUDA graphs on device {self.device}"
        if self.backend != "triton":
            return f"the operators of backend {self.backend!r} read batches on the host, which a CUDA graph can't"
        others = {type(a).__name__ for m in self.model.modules() if (a := getattr(m, "rlalign_attention", None))}
        others.discard(Invariant.__name__)
        return f"attention {sorted(others)[0]} can't be captured in a CUDA graph" if others else None

    def hidden(self, token_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        """Last hidden states. token_ids, position_ids: int64 [T] → [T, H] in the model's dtype.

        No sequence may be longer than ``max_positions``: the values of positions on the device are not looked at.
        """
        output = self.model.base_model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_context=context,
            use_cache=False,
        )
        return output.last_hidden_state.squeeze(0)

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        rows: SamplingRows | None = None,
        *,
        support: Tensor | None = None,
        banned: Tensor | None = None,
        return_support: bool = False,
    ) -> LogprobOutput:
        """Log-prob of ``targets`` int64 [N] from hidden [N, H], under each row's sampling distribution.

        ``support`` bool [N, V] holds the kept ids constant instead of recomputing them; ``banned`` bool [N, V] removes
        ids before every transform, as in ``sample``. Float32 results [N].
        """
        return linear_logprob(
            hidden,
            self.head.weight,
            targets,
            rows=rows,
            support=support,
            banned=banned,
            bias=self.head.bias,
            softcap=self.softcap,
            return_support=return_support,
            backend=self.backend,
        )

    def sample(
        self,
        hidden: Tensor,
        rows: SamplingRows,
        seeds: Tensor,
        positions: Tensor,
        *,
        banned: Tensor | None = None,
        raw_logprobs: bool = False,
    ) -> SampleOutput:
        """Draw one token per row of hidden [N, H]. seeds, positions (response index): int64 [N].

        ``banned`` bool [N, V] removes ids before every transform.
        """
        return linear_sample(
            hidden,
            self.head.weight,
            rows=rows,
            seeds=seeds,
            positions=positions,
            bias=self.head.bias,
            softcap=self.softcap,
            banned=banned,
            raw_logprobs=raw_logprobs,
            backend=self.backend,
        )

    def named_weights(self) -> dict[str, Tensor]:
        """Parameters in compute dtype by name, sorted, tied ones once. Views, not copies."""
        return dict(sorted((name, p.detach()) for name, p in self.model.named_parameters()))

    def weights_hash(self) -> str:
        """SHA-256 of the weights: name, dtype, shape and bytes, in order of name."""
        return hash_tensors(self.named_weights())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy ``weights`` in place. Names, shapes and dtypes must be exactly ours: ValueError otherwise."""
        ours = self.named_weights()
        if odd := sorted(ours.keys() ^ weights.keys()):
            raise ValueError(f"weights differ from the model's in {len(odd)} names, first {odd[0]!r}")
        for name, mine in ours.items():
            theirs = weights[name]
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(
                    f"weight {name!r}: got {theirs.dtype} {tuple(theirs.shape)}, need {mine.dtype} {tuple(mine.shape)}"
                )
            mine.copy_(theirs)

    def size(self) -> dict[str, int]:
        """What the FLOPs of a token follow from: numbers of the decoder's matrices (of all experts), which every row is
        multiplied with; of the output layer's; and, summed over the layers, query heads times (key dim + value dim)."""
        embeddings = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        matrices = [p for p in self.model.base_model.parameters() if p.dim() > 1 and id(p) not in embeddings]
        heads = self._layers.attention.values()
        return {
            "weights": sum(matrix.numel() for matrix in matrices),
            "head": self.head.weight.numel(),
            "attention": sum(count * (dim + value_dim) for count, _, dim, value_dim in heads),
        }

    @torch.no_grad()
    def _see_layers(self) -> _KVRecorder:
        """Each layer's attention shapes, seen rather than derived from config fields whose names differ by model."""
        recorder = _KVRecorder(PackedContext(torch.tensor([0, 2], dtype=torch.int32, device=self.device)))
        self.hidden(*self._probe_rows(), recorder)
        return recorder

    def fuse_projections(self) -> None:
        """Compute q, k and v, and gate and up, as one product where no gradient is wanted, with the bits they had.

        On the triton backend only: others promise a column's bits for a weight of that shape.
        """
        if self.backend == "triton" and fuse_projections(self.model, self.backend):
            self._probe_operators()

    def _probe_operators(self) -> None:
        """Every operator is measured on this model's shapes before the first token, where its bits rest on observation.

        On a CPU the reference backend's schedules follow from it; on a GPU the triton backend's are only checked.
        """
        if (self.backend, self.device.type) not in (("reference", "cpu"), ("triton", "cuda")):
            return
        layers, modules = self._layers, list(self.model.modules())
        aligned = [m for m in modules if isinstance(m, AlignedLinear) and m is not self.head]
        linears = {tuple(m.weight.shape) for m in aligned}
        norms = {m.weight.shape[0] for m in modules if isinstance(m, AlignedRMSNorm)}
        norms |= {m.normalized_shape[0] for m in modules if isinstance(m, AlignedLayerNorm)}
        head = tuple(self.head.weight.shape)
        if self.backend == "triton":
            attention = tuple(AttentionShape(*heads) for heads in sorted(set(layers.attention.values())))
            widest = max((width for width, _ in linears), default=head[1])
            linears |= {m.rlalign_fused[0].shape for m in aligned if m.rlalign_fused is not None}
            shapes = Shapes(tuple(sorted(linears)), head, attention, tuple(sorted(norms)) or head[1:], widest)
            sweep(shapes, backend="triton", dtype=self.dtype, device=self.device)
            return
        groups = sorted({(dim, value_dim, heads // keys) for heads, keys, dim, value_dim in layers.attention.values()})
        probe(  # a layer_norm's means are the products of an rms_norm
            [
                *(("attention", group) for group in groups),
                *(("linear", shape) for shape in sorted(linears)),
                *(("rms_norm", (size,)) for size in sorted(norms)),
                ("linear_logprob", head),
            ]
        )

    def _probe_rows(self) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([0, 1], device=self.device)
        return tokens, torch.arange(2, device=self.device)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Log-probs come from hidden states and output embedding: the model's own logits must be no more than that."""
        context = PackedContext(torch.tensor([0, 2], dtype=torch.int32, device=self.device))
        tokens, positions = self._probe_rows()
        logits = self.model(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_context=context,
            use_cache=False,
        ).logits[0]
        hidden = self.hidden(tokens, positions, context)
        plain = nn.functional.linear(hidden, self.head.weight, self.head.bias)
        if self.softcap is not None:
            plain = torch.tanh(plain / self.softcap) * self.softcap
        theirs, ours = (each.float() - each.float().mean(-1, keepdim=True) for each in (logits, plain))
        if not torch.isfinite(theirs).all():
            return  # NaN weights are reported where they are loaded, with the parameter's name
        if (off := (theirs - ours).abs().mean() / ours.abs().mean()) > _ROUNDED:
            raise ValueError(
                f"{type(self.model).__name__} transforms its logits in a way that is not supported: they are {off:.0%} "
                "off from what hidden states, output embedding and a soft cap give"
            )


@dataclass(slots=True)
class _KVRecorder:
    """A context that remembers what shape each layer's keys and values have.

    attention: (query heads, key heads, head_dim, value_dim) of each layer.
    """

    inner: PackedContext
    shapes: dict[int, KVShape] = field(default_factory=dict)
    attention: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)

    def kv_layout(self, num_layers: int) -> list[KVShape]:
        layers = sorted(self.shapes)
        if layers != list(range(num_layers)):
            raise ValueError(
                f"{len(layers)} of {num_layers} layers call the attention that we replace (layer_idx {layers}); others "
                "(state space, linear attention, attention of their own) would carry one packed sequence into the "
                "next: not supported, with any numerics"
            )
        return [self.shapes[layer] for layer in layers]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.shapes[call.layer] = KVShape(key.shape[1], key.shape[2], value.shape[2])
        self.attention[call.layer] = (query.shape[1], key.shape[1], key.shape[2], value.shape[2])
        return self.inner.attend(query, key, value, call)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy())
    return digest.hexdigest()
