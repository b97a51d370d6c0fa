"""A fitted basis holds the planted concept and little else, and says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_t5
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from peft_gradproj import fitting, second_moments
from peft_gradproj.basis import ConceptBasis
from peft_gradproj.errors import ConceptBasisError, ConceptDataError
from peft_gradproj.fitting import fit_concept_basis
from peft_gradproj.projection import orthonormal_basis, orthonormality_error, principal_cosines

few = settings(deadline=None, max_examples=6)
TARGETS = ["to_q", "to_k", "to_v"]
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Three linear layers of one input, `to_v` optionally of another."""

    def __init__(self, width: int = 12, *, other_value_input: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, 8), nn.Linear(width, 8)
        self.to_v = nn.Linear(width, 10)
        self.other_value_input = other_value_input

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        values = self.to_v(x + shift if self.other_value_input else x)
        return torch.cat([self.to_q(x) * self.to_k(x), values], dim=-1)


class MaskedAttention(Attention):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x)


def direction(width: int, k: int = 1, seed: int = 7) -> Tensor:
    return orthonormal_basis(torch.randn(width, k, generator=torch.Generator().manual_seed(seed)))


def planted(
    count: int, concept: Tensor, size: float, *, seed: int = 0, batch: int = 6, tokens: int = 20
) -> tuple[list[Batch], list[Batch]]:
    """Pairs of batches with and without `concept`, shape `(d, k)`, on top of a large common part."""
    generator = torch.Generator().manual_seed(seed)
    with_it, without = [], []
    for _ in range(count):
        x = 10 + torch.randn(batch, tokens, concept.shape[0], generator=generator)
        strength = size * torch.randn(batch, tokens, concept.shape[1], generator=generator)
        with_it.append({"x": x + strength @ concept.mT})
        without.append({"x": x})
    return with_it, without


def fit(model: nn.Module, concept_batches, reference_batches=None, **kwargs) -> ConceptBasis:
    return fit_concept_basis(
        model, concept_batches, reference_batches, **{"target_modules": TARGETS, "progress": False, **kwargs}
    )


# What is fitted


@few
@given(width=st.integers(6, 24), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_pairs_recover_the_planted_directions(width, k, seed):
    model, concept = Attention(width), direction(width, k, seed)
    # Wide open, since in few dimensions the planted directions may hold most of the common part.
    basis = fit(model, *planted(5, concept, 3.0, seed=seed), rank=8, max_reference_overlap=1)
    assert list(basis) == TARGETS
    for name, layer in basis.items():
        assert layer.spaces() == ("input", "output")
        assert torch.allclose(principal_cosines(layer.input, concept), torch.ones(k), atol=1e-4)
        written = orthonormal_basis(getattr(model, name).weight.detach() @ concept)
        assert torch.allclose(principal_cosines(layer.output, written), torch.ones(k), atol=1e-4)
        assert layer.k("input") == layer.k("output") == k
        report = basis.fit["layers"][name]["input"]
        assert (report["k"], report["d"]) == (k, width)
        assert report["energy"] > 0.999


@few
@given(width=st.integers(6, 24), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_generalised_contrast_finds_them_without_pairs(width, k, seed):
    concept = direction(width, k, seed)
    with_it, _ = planted(5, concept, 6.0, seed=seed)
    _, without = planted(8, concept, 6.0, seed=seed + 1, batch=9)
    basis = fit(
        Attention(width),
        with_it,
        without,
        contrast="generalized",
        spaces=("input",),
        threshold=4.0,
        max_reference_overlap=1,
    )
    assert basis["to_q"].k("input") == k
    assert principal_cosines(basis["to_q"].input, concept).min() > 0.95
    assert basis.fit["layers"]["to_q"]["input"]["energy"] > 0.8


@pytest.mark.parametrize("contrast", ["pairs", "generalized"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_says_nothing(contrast, dtype):
    concept, padding = direction(12), direction(12, seed=8)
    batches = []
    for half in planted(4, concept, 6.0):
        padded = []
        for batch in half:
            # Large, and another one in each half, as what a model makes of padding may be.
            filling = 40.0 * torch.randn(6, 30, 1) @ padding.mT
            mask = torch.cat([torch.ones(6, 20), torch.zeros(6, 30)], dim=1).to(dtype)
            padded.append({"x": torch.cat([batch["x"], filling], dim=1), "attention_mask": mask})
        batches.append(padded)
    model, masked = Attention(), MaskedAttention()
    masked.load_state_dict(model.state_dict())
    options = {"contrast": contrast, "rank": 1, "max_positions": 110, "max_reference_overlap": 1}
    padded, bare = fit(masked, *batches, **options), fit(model, *planted(4, concept, 6.0), **options)
    for space in ("input", "output"):
        same = principal_cosines(getattr(padded["to_q"], space), getattr(bare["to_q"], space))
        assert float(same) > 0.999
        assert padded.fit["layers"]["to_q"][space]["energy"] == pytest.approx(
            bare.fit["layers"]["to_q"][space]["energy"], abs=0.02
        )


class PaddedEncoder(nn.Module):
    """PyTorch's own encoder, which in evaluation mode takes a fast path, of masked batches one with nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)


def test_pytorchs_encoder_is_fitted_with_padding():
    mask = (torch.arange(20) < 15).long().expand(6, 20)
    halves = [[batch | {"attention_mask": mask} for batch in half] for half in planted(4, direction(12), 3.0)]
    basis = fit(PaddedEncoder(), *halves, target_modules=["linear1", "linear2"], rank=1)
    assert set(basis) == {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}


def test_what_is_padding_in_one_half_of_a_pair_is_compared_with_nothing():
    with_it, without = planted(4, direction(12), 3.0)
    masks = torch.ones(2, 6, 20)
    masks[0, :, :4], masks[1, :, 16:] = 0, 0
    padded = [
        [{"x": torch.where(mask[..., None] > 0, batch["x"], 40.0), "attention_mask": mask} for batch in half]
        for half, mask in zip((with_it, without), masks, strict=True)
    ]
    both = [[{"x": batch["x"][:, 4:16]} for batch in half] for half in (with_it, without)]
    found, expected = (
        fit(model, *halves, spaces=("input",), rank=1)
        for model, halves in ((MaskedAttention(), padded), (Attention(), both))
    )
    torch.testing.assert_close(found["to_q"].input, expected["to_q"].input)


@pytest.mark.parametrize("told", [False, True])
def test_the_padding_of_a_question_says_nothing_of_the_answer_that_is_as_long(told):
    generator = torch.Generator().manual_seed(0)
    halves = []
    for token in (5, 6):
        batches = []
        for _ in range(3):
            tokens, mask = torch.randint(8, 30, (2, 6), generator=generator), torch.ones(2, 6, dtype=torch.int64)
            mask[:, 3:] = 0
            answer = torch.full((2, 6), 7)
            answer[:, 4:] = token
            batch = {"input_ids": torch.full_like(tokens, 9), "attention_mask": mask, "decoder_input_ids": answer}
            batches.append(batch | ({"decoder_attention_mask": torch.ones_like(mask)} if told else {}))
        halves.append(batches)
    basis = fit(tiny_t5(), *halves, target_modules=["q"], rank=1, unfit="skip")
    assert "decoder.block.0.layer.0.SelfAttention.q" in basis


def test_a_mask_of_another_sequence_says_nothing_of_as_many_tokens():
    with_it, without = planted(4, direction(12), 3.0)
    mask = torch.zeros(6, 20)

    class Image(Attention):
        def forward(self, x, encoder_attention_mask=None):
            return super().forward(x)

    masked = [[{**b, "encoder_attention_mask": mask} for b in half] for half in (with_it, without)]
    found, expected = (fit(Image(), *halves, spaces=("input",)) for halves in (masked, (with_it, without)))
    assert torch.equal(found["to_q"].input, expected["to_q"].input)


def test_positions_in_another_order_are_not_told_by_the_mask():
    with_it, without = planted(4, direction(12), 3.0)
    mask = torch.ones(6, 20)
    mask[:, 10:] = 0

    class SequenceFirst(MaskedAttention):
        def forward(self, x, attention_mask):
            return super().forward(x.movedim(0, 1), attention_mask)

    masked = [[{**b, "attention_mask": mask} for b in half] for half in (with_it, without)]
    found, expected = (
        fit(model, *halves, spaces=("input",))
        for model, halves in ((SequenceFirst(), masked), (Attention(), (with_it, without)))
    )
    reports = [basis.fit["layers"]["to_q"]["input"] for basis in (found, expected)]
    assert reports[0] == pytest.approx(reports[1])


def test_of_padding_alone_nothing_is_taken_in():
    with_it, without = planted(4, direction(12), 3.0)
    masks = [torch.ones(6, 20), torch.ones(6, 20), torch.zeros(6, 20), torch.ones(6, 20)]
    halves = [
        [{**batch, "attention_mask": mask} for batch, mask in zip(h, masks, strict=True)] for h in (with_it, without)
    ]
    for half in halves:
        half[2]["x"] = 40.0 * torch.randn(6, 20, 12)
    some = fit(MaskedAttention(), *halves)
    rest = fit(Attention(), *([h[0], h[1], h[3]] for h in (with_it, without)), held_out=0.0)
    assert float(principal_cosines(some["to_q"].input, rest["to_q"].input).min()) > 0.999


def test_a_layer_that_no_reference_batch_calls_has_no_basis_of_what_is_common_to_all():
    class Routed(Attention):
        def forward(self, x, expert=False):
            return self.to_v(x) if expert else self.to_q(x) + self.to_k(x)

    with_it, without = planted(4, direction(12), 6.0)
    basis = fit(
        Routed(),
        [{**b, "expert": e} for b in with_it for e in (True, False)],
        [{**b, "expert": False} for b in without],
        contrast="generalized",
    )
    assert list(basis) == ["to_q", "to_k"]
    reason = "the layer was not called on the reference batches"
    assert basis.fit["left_out"]["to_v"] == dict.fromkeys(("input", "output"), reason)


def test_batches_that_draw_from_the_random_state_are_not_alike():
    drawn = []

    def drawing(size: float):
        for _ in range(4):
            noise = torch.randn(6, 20, 12)
            drawn.append(float(noise.sum()))
            yield {"x": noise + size * direction(12)[:, 0]}

    fit(Attention(), drawing(3.0), drawing(0.0), contrast="generalized", threshold=1.5)
    assert len(set(drawn)) == len(drawn) == 8


def test_batches_are_given_to_the_model_as_probes_are():
    seen = []

    class Nested(Attention):
        def forward(self, x, options, length, outputs, *, return_dict=True):
            seen.append((x.dtype, options["scale"].dtype, options["name"], length, type(outputs), return_dict))
            return super().forward(x * options["scale"])

    halves = planted(3, direction(12), 3.0)
    scale = torch.ones(6, 20, 1)
    more = {"options": {"scale": scale}, "options.name": "n", "length": None, "return_dict": False}
    more["outputs"] = BaseModelOutput(last_hidden_state=scale)
    basis = fit(Nested().to(torch.bfloat16), *([{**b, **more} for b in half] for half in halves), rank=1, unfit="skip")
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, "n", None, BaseModelOutput, False)}
    assert set(basis) <= set(TARGETS)


@pytest.mark.parametrize("contrast", ["pairs", "generalized"])
def test_the_common_part_stays_learnable(contrast):
    # Unlike a basis of raw activations, which would hold the mean of 10 first.
    concept = direction(12)
    concept = orthonormal_basis(concept - concept.mean(dim=0))
    basis = fit(Attention(), *planted(5, concept, 3.0), contrast=contrast)
    mean = torch.full((12, 1), 12**-0.5)
    assert float((basis["to_q"].input.mT @ mean).norm()) < 0.05
    assert basis.fit["layers"]["to_q"]["input"]["reference_overlap"] < 0.01


def test_reference_overlap_is_the_share_of_energy_of_the_reference():
    with_it, without = planted(5, direction(12), 3.0)
    basis = fit(Attention(), with_it, without, spaces=("input",))
    x = torch.cat([batch["x"].reshape(-1, 12) for batch in without])
    expected = float((x @ basis["to_q"].input).square().sum() / x.square().sum())
    assert basis.fit["layers"]["to_q"]["input"]["reference_overlap"] == pytest.approx(expected, rel=1e-3)


def test_held_out_energy_falls_where_held_out_batches_show_something_else():
    concept, other = direction(12, 2)[:, :1], direction(12, 2)[:, 1:]
    with_it, without = planted(4, concept, 3.0)
    with_it[1], without[1] = (batches[0] for batches in planted(1, other, 3.0))
    basis = fit(Attention(), with_it, without, held_out=0.25, spaces=("input",))
    assert basis.fit["batches"] == {"concept": 4, "reference": 4, "held_out": 1}
    assert basis["to_q"].k("input") == 1
    assert basis.fit["layers"]["to_q"]["input"]["energy"] < 1e-3


@pytest.mark.parametrize(
    ("count", "held_out", "expected"), [(1, 0.2, 0), (2, 0.2, 1), (5, 0.5, 2), (10, 0.2, 2), (4, 0, 0)]
)
def test_held_out_batches_are_counted_and_without_any_there_is_no_report(count, held_out, expected):
    basis = fit(Attention(), *planted(count, direction(12), 3.0), held_out=held_out)
    assert basis.fit["batches"]["held_out"] == expected
    assert (basis.fit["layers"]["to_q"]["input"]["energy"] is None) == (expected == 0)


@few
@given(parts=st.lists(st.integers(1, 5), min_size=2, max_size=4), contrast=st.sampled_from(["pairs", "generalized"]))
def test_streaming_equals_one_batch(parts, contrast):
    concept = direction(12, 2)
    (with_it,), (without,) = planted(1, concept, 5.0, batch=sum(parts), tokens=8)
    model = Attention()
    kwargs = {"held_out": 0, "contrast": contrast, "rank": 2, "max_reference_overlap": 1}
    whole = fit(model, [with_it], [without], **kwargs)
    halves = ([{"x": x} for x in batch["x"].split(parts)] for batch in (with_it, without))
    streamed = fit(model, *map(iter, halves), **kwargs)
    for name, spaces in whole.overlap(streamed).items():
        for space, overlap in spaces.items():
            assert overlap.mean_square == pytest.approx(1, abs=1e-4), (name, space)


def test_wide_layers_are_sketched_and_recover_the_same():
    width = second_moments.MAX_EXACT_WIDTH + 40
    concept = direction(width, 2)
    basis = fit(Attention(width), *planted(4, concept, 3.0, batch=8), rank=8)
    assert principal_cosines(basis["to_q"].input, concept).min() > 0.999
    assert orthonormality_error(basis["to_q"].input.double()) < 1e-6
    assert basis.fit["layers"]["to_q"]["input"]["energy"] > 0.99
    generalized = fit(
        Attention(width), *planted(4, concept, 30.0, batch=8), rank=2, contrast="generalized", spaces=("input",)
    )
    assert principal_cosines(generalized["to_q"].input, concept).min() > 0.97


def test_rank_energy_and_threshold_bound_the_directions():
    width, concept = 24, torch.eye(24)[:, :4] * torch.tensor([8.0, 4.0, 2.0, 1.0])
    batches = planted(5, concept, 1.0)

    def k(**kwargs) -> int:
        return fit(Attention(width), *batches, spaces=("input",), **kwargs)["to_q"].k("input")

    assert k() == 4
    assert k(rank=3) == 3
    assert k(rank=None, energy=0.9) == 2
    assert k(rank=1, energy=0.9) == 1
    # Energies in units of the reference's: about 64, 16, 4 and 1 more than its own.
    generalized = {"contrast": "generalized", "rank": 16}
    assert k(threshold=3.5, **generalized) == 3
    assert k(threshold=10, **generalized) == 2
    assert k(threshold=3.5, **{**generalized, "rank": 2}) == 2


def test_positions_beyond_the_maximum_are_a_reproducible_choice():
    batches = planted(3, direction(12, 3), 3.0)
    model = Attention()
    some, again, other = (
        fit(model, *batches, rank=1, max_positions=5, seed=seed, spaces=("input",)) for seed in (0, 0, 1)
    )
    assert some == again
    assert some != other
    assert some["to_q"] == some["to_k"]


# Shared inputs


def test_layers_of_one_input_share_one_statistic(monkeypatch):
    solved = []
    solve = fitting._leading_directions
    monkeypatch.setattr(fitting, "_leading_directions", lambda *args: solved.append(1) or solve(*args))
    basis = fit(Attention(), *planted(3, direction(12), 3.0), spaces=("input",))
    assert len(solved) == 1
    assert basis["to_q"] == basis["to_k"] == basis["to_v"]
    solved.clear()
    fit(Attention(other_value_input=True), *planted(3, direction(12), 3.0), spaces=("input",))
    assert len(solved) == 2


def test_layers_whose_inputs_part_later_are_fitted_as_if_alone():
    class PartsLater(Attention):
        def forward(self, x: Tensor, part: bool) -> Tensor:
            values = self.to_v(x.roll(1, dims=-1) if part else x)
            return torch.cat([self.to_q(x) * self.to_k(x), values], dim=-1)

    model = PartsLater()
    batches = [
        [{**batch, "part": index > 1} for index, batch in enumerate(half)] for half in planted(4, direction(12), 3.0)
    ]
    together = fit(model, *batches, spaces=("input",), held_out=0)
    alone = {name: fit(model, *batches, spaces=("input",), held_out=0, target_modules=[name])[name] for name in TARGETS}
    assert dict(together) == alone
    assert together["to_q"] == together["to_k"] != together["to_v"]
    assert together["to_v"].k("input") == 2


def test_a_layer_called_twice_is_fitted_on_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x) + self.to_q(x.roll(1, dims=-1))

    concept = torch.eye(12)[:, :1]
    basis = fit(Twice(), *planted(3, concept, 3.0), spaces=("input",), target_modules=["to_q"])
    assert principal_cosines(basis["to_q"].input, torch.eye(12)[:, :2]).min() > 0.999


# Adapters


def adapted(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = Attention()
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **kwargs))


def test_a_model_with_a_trained_adapter_gives_the_basis_of_the_bare_one():
    torch.manual_seed(0)
    bare = Attention()
    batches = planted(4, direction(12, 2), 3.0)
    expected = fit(bare, *batches)
    found = fit(adapted(init_lora_weights=False), *batches)
    assert list(found) == list(expected)
    for spaces in found.overlap(expected).values():
        assert min(overlap.mean_square for overlap in spaces.values()) > 1 - 1e-5
    assert {name: layer.k("input") for name, layer in found.items()} == dict.fromkeys(TARGETS, 2)


def loss(output: Tensor, batch: Batch) -> Tensor:
    return output.sum()


def test_the_rank_basis_holds_the_direction_of_a_that_reads_the_concept():
    concept = direction(12)
    model = adapted()
    layer = model.base_model.model.to_v
    with torch.no_grad():
        a = layer.lora_A["default"].weight
        a -= a @ concept @ concept.mT
        a[2] = 5 * concept[:, 0]
    # to_v's loss is linear, so that the gradient in z is the same with and without: A x alone tells.
    basis = fit(
        model, *planted(4, concept, 5.0), spaces=("rank",), loss_fn=loss, target_modules=["to_v"], threshold=1.5
    )
    assert basis["to_v"].rank.shape == (4, 1)
    # Directions in the space of A and B, whitened by the reference, come close to the axis and not upon it.
    assert abs(float(basis["to_v"].rank[2, 0])) > 0.9
    assert basis.fit["layers"]["to_v"]["rank"]["energy"] > 0.9
    assert basis.fit["adapter_name"] == "default"


def test_the_rank_basis_holds_the_direction_of_b_that_writes_the_concept():
    model = adapted(init_lora_weights=False)
    with torch.no_grad():
        layer = model.base_model.model.to_v
        layer.lora_B["default"].weight.copy_(torch.eye(10)[:, :4])

    def marked(output: Tensor, batch: Batch) -> Tensor:
        # With the concept the loss depends on channel 1 of to_v, which column 1 of B writes; otherwise on all.
        values = output[..., 8:]
        return 9 * values[..., 1].sum() if batch["marked"] else values.sum()

    with_it, without = planted(4, direction(12), 0.1)
    basis = fit(
        model,
        [{**batch, "marked": True} for batch in with_it],
        [{**batch, "marked": False} for batch in without],
        run_model=lambda model, batch: model(batch["x"]),
        spaces=("rank",),
        loss_fn=marked,
        target_modules=["to_v"],
        rank=1,
    )
    assert abs(float(basis["to_v"].rank[1, 0])) > 0.9


def flat_gradient(model: nn.Module, name: str, batch: Batch) -> Tensor:
    model.zero_grad()
    model(**batch).square().sum().backward()
    layer = getattr(model.base_model.model, name)
    return torch.cat([getattr(layer, m)["default"].weight.grad.flatten() for m in ("lora_A", "lora_B")])


def test_the_gradient_basis_spans_the_batches_gradients():
    model = adapted(init_lora_weights=False).eval()
    batches, _ = planted(3, direction(12), 3.0)
    basis = fit(
        model, batches, spaces=("gradient",), loss_fn=lambda output, _: output.square().sum(), held_out=0, rank=8
    )
    for name in TARGETS:
        gradients = torch.stack([flat_gradient(model, name, batch) for batch in batches], dim=1)
        q = basis[name].gradient
        assert q.shape == (4 * (12 + (10 if name == "to_v" else 8)), 3)
        assert torch.allclose(q @ (q.mT @ gradients), gradients, rtol=1e-2, atol=1e-3 * float(gradients.abs().max()))
        assert basis.fit["layers"][name]["gradient"]["reference_overlap"] is None


def test_the_gradient_basis_of_pairs_spans_the_differences():
    model = adapted(init_lora_weights=False).eval()
    with_it, without = planted(2, direction(12), 3.0)
    basis = fit(
        model, with_it, without, spaces=("gradient",), loss_fn=lambda output, _: output.square().sum(), held_out=0
    )
    differences = [
        flat_gradient(model, "to_q", a) - flat_gradient(model, "to_q", b) for a, b in zip(with_it, without, strict=True)
    ]
    q = basis["to_q"].gradient
    for difference in differences:
        assert float((q.mT @ difference).norm() / difference.norm()) > 0.999


def test_features_and_gradients_can_be_fitted_in_one_pass():
    model = adapted()
    batches = planted(4, direction(12), 5.0)
    basis = fit(model, *batches, spaces=("input", "output", "gradient"), loss_fn=loss, target_modules=["to_v"])
    assert basis["to_v"].spaces() == ("input", "output", "gradient")
    apart = fit(model, *batches, target_modules=["to_v"])
    assert torch.equal(basis["to_v"].input, apart["to_v"].input)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


# A real model


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut"]


def unet_pairs(count: int = 4) -> tuple[list[Batch], list[Batch]]:
    """Latents with and without a patch, under the same captions and timesteps."""
    generator = torch.Generator().manual_seed(0)
    with_it, without = [], []
    for _ in range(count):
        sample = torch.randn(2, 4, 8, 8, generator=generator)
        rest = {
            "timestep": torch.randint(0, 1000, (2,), generator=generator),
            "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        }
        without.append({"sample": sample, **rest})
        with_it.append({"sample": sample + torch.nn.functional.pad(torch.ones(4, 3, 3), (2, 3, 2, 3)), **rest})
    return with_it, without


def test_a_unet_is_fitted_in_all_layers_that_see_the_concept(unet, tmp_path):
    basis = fit(unet, *unet_pairs(), target_modules=UNET_TARGETS, rank=4, concept="patch", base_model="tiny")
    modules = dict(unet.named_modules())
    matched = [name for name in modules if name.endswith(tuple(f".{target}" for target in UNET_TARGETS))]
    blind = [name for name in matched if "attn2.to_k" in name or "attn2.to_v" in name]
    assert set(basis) == set(matched) - set(blind)
    assert set(basis.fit["left_out"]) == set(blind)
    assert basis.fit["left_out"][blind[0]] == dict.fromkeys(
        ("input", "output"), "with and without the concept are equal"
    )
    for name, layer in basis.items():
        assert layer.input.shape == (modules[name].weight[0].numel(), 4)
        assert layer.output.shape == (modules[name].weight.shape[0], 4)
        for space in ("input", "output"):
            report = basis.fit["layers"][name][space]
            assert 0 < report["energy"] <= 1
            assert 0 <= report["reference_overlap"] < 0.9
    assert "down_blocks.0.resnets.0.conv1" in basis.summary()
    loaded = ConceptBasis.load(basis.save(tmp_path / "patch.safetensors"))
    assert loaded == basis
    assert loaded.fit == basis.fit
    assert basis.fit["model_class"] == "UNet2DConditionModel"
    assert set(basis.fit["versions"]) == {"peft_gradproj", "peft", "torch"}


def test_a_unet_with_adapters_is_fitted_alike_and_left_alone(unet):
    import copy

    adapted_unet = copy.deepcopy(unet).train()
    adapted_unet.add_adapter(LoraConfig(r=2, target_modules=UNET_TARGETS, init_lora_weights=False))
    before = {key: value.clone() for key, value in adapted_unet.state_dict().items()}
    needed = [parameter.requires_grad for parameter in adapted_unet.parameters()]
    found = fit(adapted_unet, *unet_pairs(2), target_modules=UNET_TARGETS, rank=3)
    expected = fit(unet, *unet_pairs(2), target_modules=UNET_TARGETS, rank=3)
    assert list(found) == list(expected)
    assert min(o.mean_square for spaces in found.overlap(expected).values() for o in spaces.values()) > 0.999
    assert adapted_unet.training
    assert [parameter.requires_grad for parameter in adapted_unet.parameters()] == needed
    assert all(torch.equal(value, before[key]) for key, value in adapted_unet.state_dict().items())


def test_rank_and_gradient_spaces_of_a_unet(unet):
    import copy

    adapted_unet = copy.deepcopy(unet)
    adapted_unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"]))
    basis = fit(
        adapted_unet,
        *unet_pairs(3),
        target_modules=["to_q", "conv1"],
        spaces=("rank", "gradient"),
        loss_fn=lambda output, batch: output.sample.square().mean(),
        rank=2,
        threshold=1.0,
    )
    widths = {name: layer.gradient.shape[0] for name, layer in basis.items()}
    assert widths["down_blocks.0.resnets.0.conv1"] == 4 * (16 * 9 + 16)
    assert all(layer.rank.shape[0] == 4 for layer in basis.values() if layer.k("rank"))


# What is refused


def test_randomness_in_the_model_call_is_the_same_in_both_halves():
    def run_model(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"] + torch.randn_like(batch["x"]))

    model = Attention()
    with_it, without = planted(3, direction(12), 3.0)
    state = torch.get_rng_state()
    assert fit(model, with_it, without, run_model=run_model)["to_q"].k("input") == 1
    with pytest.raises(ConceptBasisError, match="with and without the concept are equal"):
        fit(model, without, without, run_model=run_model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_run_model_may_take_its_arguments_out_of_the_batch(kind):
    model = adapted(init_lora_weights=False)
    halves = [[kind(batch) for batch in half] for half in planted(3, direction(12), 3.0)]
    bases = [
        fit(
            model,
            *halves,
            spaces=("input", "rank"),
            run_model=lambda model, batch, take=take: model(take(batch, "x")),
            loss_fn=lambda output, batch: (output * batch["x"].sum()).square().sum(),
        )
        for take in (kind.pop, kind.get)
    ]
    assert bases[0] == bases[1]
    assert all("x" in batch for half in halves for batch in half)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_differences_that_are_rounding_are_no_contrast(dtype, size):
    with_it, without = planted(3, direction(12), size)
    with pytest.raises(ConceptBasisError, match="with and without the concept are equal"):
        fit(Attention().to(dtype), *([{"x": b["x"].to(dtype)} for b in half] for half in (with_it, without)))


def test_sets_without_contrast_are_refused_and_say_why():
    _, without = planted(3, direction(12), 3.0)
    _, others = planted(3, direction(12), 3.0, seed=1)
    with pytest.raises(ConceptBasisError, match=r"no direction has 2\.0 times the reference's energy"):
        fit(Attention(), without, others, contrast="generalized")


@pytest.mark.parametrize(
    ("k", "size", "kwargs", "message"),
    [
        (5, 3.0, {}, r"to_q, output space: 5 directions of 8 are more than half"),
        (1, 3.0, {"max_reference_overlap": 1e-4}, r"to_q, input space: it holds 0\.\d\d of the reference"),
    ],
)
def test_a_basis_that_would_block_other_learning_is_refused_or_skipped(k, size, kwargs, message):
    batches = planted(4, direction(12, k), size)
    with pytest.raises(ConceptBasisError, match=message):
        fit(Attention(), *batches, **kwargs)
    if not kwargs:
        basis = fit(Attention(), *batches, unfit="skip")
        assert basis["to_q"].spaces() == ("input",)
        assert "more than half" in basis.fit["left_out"]["to_q"]["output"]
        assert "output" not in basis.fit["layers"]["to_q"]
    else:
        with pytest.raises(ConceptBasisError, match="no layer has a concept basis: it holds"):
            fit(Attention(), *batches, unfit="skip", **kwargs)


def test_a_layer_that_is_not_called_is_left_out():
    model = Attention()
    model.to_out = nn.Linear(3, 3)
    basis = fit(model, *planted(2, direction(12), 3.0), target_modules=[*TARGETS, "to_out"])
    assert basis.fit["left_out"] == {"to_out": dict.fromkeys(("input", "output"), "the layer was not called")}


X = {"x": torch.randn(2, 3, 12)}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"spaces": ()}, ConceptBasisError, "spaces="),
        ({"spaces": ("input", "weights")}, ConceptBasisError, "spaces=.*weights"),
        ({"contrast": "auto"}, ConceptBasisError, "contrast='auto'"),
        ({"unfit": "ignore"}, ConceptBasisError, "unfit='ignore'"),
        ({"rank": None}, ConceptBasisError, "neither rank nor energy"),
        ({"rank": 0}, ConceptBasisError, "rank=0"),
        ({"energy": 1.5}, ConceptBasisError, r"energy=1\.5"),
        ({"held_out": 0.9}, ConceptBasisError, r"held_out=0\.9"),
        ({"epsilon": 0.0}, ConceptBasisError, r"epsilon=0\.0"),
        ({"max_positions": 0}, ConceptBasisError, "max_positions=0"),
        ({"spaces": ("rank",)}, ConceptBasisError, "need loss_fn"),
        ({"spaces": ("gradient",), "loss_fn": loss}, ConceptBasisError, "0 in these layers"),
        ({"target_modules": ["missing"]}, ConceptBasisError, "matches no module of Attention"),
        ({"reference_batches": None}, ConceptDataError, "reference_batches are missing"),
        ({"concept_batches": []}, ConceptDataError, "concept_batches ended after 0"),
        ({"reference_batches": [X, X, X]}, ConceptDataError, "concept_batches ended after 2 batches"),
        ({"reference_batches": [X]}, ConceptDataError, "reference_batches ended after 1 batches"),
        ({"concept_batches": [], "reference_batches": []}, ConceptDataError, "concept_batches are empty"),
        ({"reference_batches": [], "contrast": "generalized"}, ConceptDataError, "reference_batches are empty"),
        ({"reference_batches": [{"x": X["x"][:1]}] * 2}, ConceptDataError, r"inputs of to_q: \[\(2, 3, 12\)\]"),
        ({"concept_batches": [X["x"], X["x"]]}, ConceptDataError, "a batch is a Tensor"),
        (
            {"concept_batches": [{"x": X["x"] * float("inf")}] * 2},
            ConceptDataError,
            "input vectors of to_q are not all",
        ),
    ],
)
def test_what_cannot_be_fitted_is_an_error_that_says_why(kwargs, error, message):
    arguments = {"concept_batches": [X, X], "reference_batches": [X, X], **kwargs}
    with pytest.raises(error, match=message):
        fit(Attention(), arguments.pop("concept_batches"), arguments.pop("reference_batches"), **arguments)


def test_progress_is_shown_on_request(capsys):
    fit(Attention(), *planted(2, direction(12), 3.0), progress=True)
    assert "Concept basis: concept batches: 100%" in capsys.readouterr().err
    fit(Attention(), *planted(2, direction(12), 3.0), progress=False)
    assert not capsys.readouterr().err
