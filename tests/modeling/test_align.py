"""align(): the same function as before, on our operators, without touching names, and invariant."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import MIXTURES, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlalign.modeling import AuditError, PackedContext, Policy, align, audit

LENGTHS = (5, 23, 1, 40, 12)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def packed(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, PackedContext]:
    lengths = torch.tensor([len(s) for s in sequences])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return torch.cat(sequences), torch.cat([torch.arange(int(n)) for n in lengths]), PackedContext(starts)


def random_sequences(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def reference_logprobs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The untouched Hugging Face model's next-token log-probs of one sequence."""
    logits = model(tokens.unsqueeze(0)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def policy_logprobs(policy: Policy, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    tokens, positions, context = packed(sequences)
    hidden = policy.hidden(tokens, positions, context)
    pieces = hidden.split([len(s) for s in sequences])
    return [policy.logprobs(piece[:-1], s[1:]).logprob for piece, s in zip(pieces, sequences, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_computes_the_function_of_the_original(family: str, dtype: torch.dtype, backend: str) -> None:
    original = tiny_model(family, dtype)
    policy = Policy(align(copy.deepcopy(original), backend=backend))
    sequences = random_sequences(policy.vocab_size)
    atol = 1e-4 if dtype == torch.float32 else 0.15
    for ours, tokens in zip(policy_logprobs(policy, sequences), sequences, strict=True):
        torch.testing.assert_close(ours, reference_logprobs(original, tokens), rtol=0, atol=atol)


@torch.no_grad()
def test_float16_runs_on_native_operators_alone(family: str) -> None:
    original = tiny_model(family, torch.float16)
    policy = Policy(align(copy.deepcopy(original), backend="native"))
    sequences = random_sequences(policy.vocab_size)
    for ours, tokens in zip(policy_logprobs(policy, sequences), sequences, strict=True):
        torch.testing.assert_close(ours, reference_logprobs(original, tokens), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match=r"dtype=torch.float16 is not supported; use float32 or bfloat16"):
        Policy(align(original, backend="reference"))


@torch.no_grad()
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("router_logits", [False, True])
def test_a_mixture_of_experts_computes_its_function_on_native_operators(mixture: str, router_logits: bool) -> None:
    original = tiny_model(mixture)
    original.config.output_router_logits = router_logits  # attention is told, and has nothing to do with it
    policy = Policy(align(copy.deepcopy(original), backend="native"))
    sequences = random_sequences(policy.vocab_size)
    for ours, tokens in zip(policy_logprobs(policy, sequences), sequences, strict=True):
        torch.testing.assert_close(ours, reference_logprobs(original, tokens), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_sequence_alone_has_the_bits_it_has_among_others(family: str, dtype: torch.dtype) -> None:
    policy = Policy(align(tiny_model(family, dtype), backend="reference"))
    sequences = random_sequences(policy.vocab_size)
    together = policy_logprobs(policy, sequences)
    reordered = policy_logprobs(policy, sequences[::-1])[::-1]
    for index, sequence in enumerate(sequences):
        (alone,) = policy_logprobs(policy, [sequence])
        assert torch.equal(bits(alone), bits(together[index]))
        assert torch.equal(bits(alone), bits(reordered[index]))


def test_leaves_names_and_state_dict_alone(family: str) -> None:
    original = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    modules = [name for name, _ in original.named_modules()]
    aligned = align(original, backend="reference")
    assert [name for name, _ in aligned.named_modules()] == modules
    after = aligned.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(isinstance(m, torch.nn.Linear) for n, m in aligned.named_modules() if n.endswith("_proj"))


def test_saved_checkpoint_loads_in_plain_transformers(family: str, tmp_path) -> None:
    aligned = align(tiny_model(family), backend="reference")
    aligned.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Aligned" not in type(plain).__name__
    assert plain.config._attn_implementation != "rlalign"
    for name, tensor in aligned.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_gradients_match_the_original(family: str) -> None:
    original = tiny_model(family)
    policy = Policy(align(copy.deepcopy(original), backend="reference"))
    (tokens,) = random_sequences(policy.vocab_size, (24,))
    cotangent = torch.randn(len(tokens) - 1, generator=torch.Generator().manual_seed(5))
    (reference_logprobs(original, tokens) * cotangent).sum().backward()
    (policy_logprobs(policy, [tokens])[0] * cotangent).sum().backward()
    for (name, theirs), (_, ours) in zip(original.named_parameters(), policy.model.named_parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-12)
        assert error < 1e-3, f"{name}: relative error {error:.2e}"


def test_gradient_checkpointing_keeps_the_bits(family: str) -> None:
    sequences = random_sequences(97)
    results = []
    for checkpointing in (False, True):
        policy = Policy(align(tiny_model(family), backend="reference"))
        policy.model.train()
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        logprobs = torch.cat(policy_logprobs(policy, sequences))
        logprobs.sum().backward()
        results.append((logprobs.detach(), [p.grad for p in policy.model.parameters()]))
    (plain, plain_grads), (replayed, replayed_grads) = results
    assert torch.equal(bits(plain), bits(replayed))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain_grads, replayed_grads, strict=True))


def test_audit_passes_every_family(family: str) -> None:
    report = audit(align(tiny_model(family), backend="reference"))
    assert report.exact
    assert report.aligned["AlignedLinear"] >= 9


def test_audit_refuses_what_was_not_aligned(family: str) -> None:
    model = align(tiny_model(family), backend="native")
    with pytest.raises(AuditError, match=r"aten\.\w+ in \w+"):
        audit(model)


class _MeanPooling(torch.nn.Module):
    """A reduction that align() knows nothing of."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y - y.mean(-1, keepdim=True)


def test_audit_names_the_operator_and_the_module() -> None:
    model = align(tiny_model("llama"), backend="reference")
    model.model.layers[1].mlp = _MeanPooling(model.model.layers[1].mlp)
    with pytest.raises(AuditError, match=r"aten\.mean in model\.layers\.1\.mlp"):
        audit(model)


def test_refuses_what_cannot_be_invariant() -> None:
    with pytest.raises(TypeError, match="a Linear: need a Hugging Face causal LM"):
        align(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already aligned"):
        align(align(tiny_model("llama"), backend="reference"), backend="reference")
    dropping = tiny_model("llama")
    dropping.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        align(dropping, backend="reference")


class Doubled(torch.nn.Linear):
    """As adapters and quantised layers do it: a linear by name, with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_that_computes_something_else_is_left_to_the_audit() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Doubled
    align(model, backend="reference")
    with pytest.raises(AuditError, match=r"aten\.\w+ in model\.layers\.1\.mlp\.up_proj"):
        audit(model)


def test_refuses_calls_it_would_have_to_guess_at() -> None:
    model = align(tiny_model("llama"), backend="reference")
    with pytest.raises(ValueError, match="attention_context"):
        model(torch.tensor([[1, 2, 3]]))
    context = PackedContext(torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="batch dimension"):
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), attention_context=context)


def large_logits(family: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Rounded to bfloat16, such logits are off by more than small ones are apart."""
    model = tiny_model(family, dtype, seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(16)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_model, large_logits])
@pytest.mark.parametrize("scale", [1.02, 0.25])
def test_refuses_a_model_that_scales_its_logits(scale, make, dtype) -> None:
    model = align(make("llama", dtype), backend="reference")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output * scale)
    with pytest.raises(ValueError, match="transforms its logits"):
        Policy(model)


def test_takes_a_model_whose_own_logits_are_rounded() -> None:
    model = large_logits("gemma2", torch.bfloat16, seed=9)  # a log-prob of -6.46 by its own logits, -6.56 unrounded
    model.config.final_logit_softcapping = 30.0
    Policy(align(model, backend="reference"))


def test_weights_round_trip_with_their_hash(family: str) -> None:
    sender = Policy(align(tiny_model(family, seed=0), backend="reference"))
    receiver = Policy(align(tiny_model(family, seed=1), backend="reference"))
    assert sender.weights_hash() != receiver.weights_hash()
    receiver.load_weights(sender.named_weights())
    assert sender.weights_hash() == receiver.weights_hash()
    weights = sender.named_weights()
    name, tensor = weights.popitem()
    with pytest.raises(ValueError, match="differ"):
        receiver.load_weights(weights)
    with pytest.raises(ValueError, match="need"):
        receiver.load_weights({**weights, name: tensor.double()})


def test_weights_are_moved_to_aligned_storage():
    model = tiny_model("llama")
    parameter = next(model.parameters())
    before = parameter.detach().clone()
    parameter.data = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape).copy_(before)
    align(model, backend="reference")
    assert next(model.parameters()) is parameter
    assert torch.equal(parameter, before)
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_size_is_what_a_token_is_multiplied_with(family: str) -> None:
    model = tiny_model(family)
    config = model.config
    hidden, heads, keys = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    a_layer = 2 * hidden * heads * dim + 2 * hidden * keys * dim + 3 * hidden * config.intermediate_size
    layers = config.num_hidden_layers
    assert Policy(align(model, backend="reference")).size() == {
        "weights": layers * a_layer, "head": config.vocab_size * hidden, "attention": layers * heads * 2 * dim,
    }  # fmt: skip
