"""Concept probes hold what they were given, refuse what could not be measured, and survive a file unchanged."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_t5
from torch import Tensor, nn

from peft_gradproj import fit_concept_basis
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.probes import (
    PROBES_FILE_NAME,
    ConceptProbes,
    adapters_disabled,
    broadcast_weights,
    collect_concept_probes,
    evaluation_mode,
    model_output,
)


def _probes(n: int = 5, **options: Any) -> ConceptProbes:
    inputs = {
        "sample": torch.randn(n, 3, 4, 4),
        "timestep": torch.arange(995, 995 + n),
        "added_cond_kwargs": {"text_embeds": torch.randn(n, 6)},
    }
    weights = torch.zeros(n, 1, 4, 4)
    weights[:, :, 1:3, 1:3] = 1.0
    known = {"targets": torch.randn(n, 3, 4, 4), "weights": weights, "concept": "logo", "base_model": "org/base"}
    return ConceptProbes(inputs, **(known | options))


class Noisy(nn.Module):
    """A model with dropout, whose base and adapted outputs can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, extra: dict[str, Tensor] | None = None) -> SimpleNamespace:
        shift = 0.0 if extra is None else extra["shift"]
        return SimpleNamespace(sample=self.linear(self.dropout(x)) + shift)


def _adapted() -> nn.Module:
    model = Noisy()
    get_peft_model(model, LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    return model


# Construction


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {}}, "without inputs"),
        ({"inputs": {"x": torch.randn(0, 3)}, "targets": None, "weights": None}, "empty"),
        ({"inputs": {"x": torch.randn(5, 3), "y": torch.randn(4, 3)}}, "unequal number"),
        ({"inputs": {"x": 3.0}}, "expected a tensor"),
        ({"inputs": {"x": torch.tensor(3.0)}}, "first dimension counts"),
        ({"targets": torch.randn(4, 3, 4, 4)}, "unequal number"),
        ({"targets": torch.full((5, 3, 4, 4), torch.nan)}, "targets has values that are not finite"),
        ({"weights": torch.full((5, 1, 4, 4), torch.inf)}, "weights has values that are not finite"),
        ({"weights": -torch.ones(5, 1, 4, 4)}, "negative"),
        ({"weights": torch.zeros(5, 1, 4, 4)}, "all zero"),
        ({"weights": torch.ones(4, 1, 4, 4)}, "number of probes, or 1"),
        ({"weights": torch.ones(5, 1, 3, 4)}, "do not broadcast"),
        ({"weights": torch.ones(5, 3, 4, 4, 2)}, "do not broadcast"),
        ({"loss_targets": torch.randn(5, 3, 4, 2)}, "must have its shape"),
    ],
)
def test_probes_that_could_not_be_measured_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = change.pop("inputs", None)
    with pytest.raises(ConceptDataError, match=message):
        _probes(**change) if inputs is None else ConceptProbes(inputs, **change)


def test_probes_keep_their_own_copy_in_float32() -> None:
    given_input, given_weights = torch.randn(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)
    probes = ConceptProbes({"x": given_input}, None, given_weights)
    given_input.zero_()

    assert probes.inputs["x"].dtype == probes.weights.dtype == torch.float32
    assert probes.inputs["x"].abs().sum() > 0
    assert "n=2" in repr(probes)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    given_dims=st.integers(1, 4),
    ones=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_weights_broadcast_from_the_left(shape: list[int], given_dims: int, ones: list[bool]) -> None:
    dims = min(given_dims, len(shape))
    weights = torch.rand([1 if one else size for size, one in zip(shape[:dims], ones[:dims], strict=True)])
    outputs = torch.zeros(shape)

    aligned = broadcast_weights(weights, outputs)

    expanded = aligned.expand(shape)
    index = tuple(0 if one else size - 1 for size, one in zip(shape[:dims], ones[:dims], strict=True))
    last = tuple(size - 1 for size in shape)
    assert expanded[last] == weights[index]


# Batches


def test_a_batch_nests_the_inputs_and_casts_all_but_numbers_per_probe() -> None:
    probes = _probes(loss_targets=torch.randn(5, 3, 4, 4))
    probes.inputs["timestep"] = probes.inputs["timestep"].float()

    batch = probes.batch([3, 0], dtype=torch.bfloat16)

    assert batch.inputs["sample"].dtype == batch.inputs["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
    assert batch.inputs["timestep"].tolist() == [998.0, 995.0]
    assert torch.equal(batch.targets, probes.targets[[3, 0]])
    assert torch.equal(batch.weights, probes.weights[[3, 0]])
    assert torch.equal(batch.loss_targets, probes.loss_targets[[3, 0]])


def test_shared_weights_stay_shared() -> None:
    shared = torch.ones(1, 1, 4, 4)
    probes = _probes(weights=shared)

    assert torch.equal(probes.batch([1, 2]).weights, shared)
    assert torch.equal(probes.select([1, 2]).weights, shared)
    assert probes.weighted_indices().tolist() == [0, 1, 2, 3, 4]


def test_probes_without_weight_cannot_be_drawn() -> None:
    weights = torch.ones(5, 1, 4, 4)
    weights[[1, 4]] = 0.0

    assert _probes(weights=weights).weighted_indices().tolist() == [0, 2, 3]
    assert ConceptProbes({"x": torch.ones(3, 1)}, None, torch.tensor([0.0, 1, 0])).weighted_indices().tolist() == [1]


@given(cut=st.integers(1, 4))
def test_concat_undoes_select(cut: int) -> None:
    probes = _probes(loss_targets=torch.randn(5, 3, 4, 4))

    joined = probes.select(range(cut)).concat(probes.select(range(cut, 5)))

    assert joined == probes
    assert probes.select([0]).concat() != probes


def test_a_boolean_mask_selects_where_it_is_true() -> None:
    probes, mask = _probes(), [False, True, True, False, True]

    assert probes.select(mask) == probes.select(torch.tensor(mask)) == probes.select([1, 2, 4])
    assert torch.equal(probes.batch(torch.tensor(mask)).targets, probes.batch([1, 2, 4]).targets)
    with pytest.raises(ConceptDataError, match="a mask of probes has shape"):
        probes.select([True, False])
    with pytest.raises(ConceptDataError, match="empty"):
        probes.select([False] * 5)


def test_concat_gives_unweighted_probes_the_weight_one() -> None:
    joined = _probes(2).concat(_probes(3, weights=None))

    assert joined.weights.shape == (5, 1, 4, 4)
    assert bool((joined.weights[2:] == 1).all())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"targets": None}, "expected equal shapes"),
        ({"weights": torch.ones(5)}, "weights of shapes"),
        ({"run_model": model_output}, "different run_model"),
        ({"base_model": "org/other"}, "different base models cannot be joined: org/base, org/other"),
        ({"revision": "def"}, "different revisions"),
        ({"widths": {"a": (3, 4)}}, r"layer 'a' has widths \(3, 5\) and \(3, 4\)"),
        ({"widths": {"a": (3, 5), "b": (3, 4)}}, r"layer 'b' has widths None and \(3, 4\)"),
    ],
)
def test_concat_refuses_other_probes(other: dict[str, Any], message: str) -> None:
    known = {"revision": "abc", "widths": {"a": (3, 5)}}
    with pytest.raises(ConceptDataError, match=message):
        _probes(base_model=None).concat(_probes(**known), _probes(**(known | other)))


def test_concat_keeps_what_any_part_knows_of_the_model_and_all_concepts() -> None:
    known: dict[str, Any] = {"revision": "abc", "widths": {"a": (3, 5)}}
    joined = _probes(base_model=None).concat(_probes(concept="face", **known), _probes(concept=""), _probes())

    assert (joined.concept, joined.base_model) == ("logo + face", "org/base")
    assert {"revision": joined.revision, "widths": joined.widths} == known


# Files


def test_a_file_gives_back_the_same_probes(tmp_path: Path) -> None:
    probes = _probes(loss_targets=torch.randn(5, 3, 4, 4), revision="abc")

    for path in (tmp_path / "deep" / "probes.safetensors", tmp_path):
        loaded = ConceptProbes.load(probes.save(path))
        assert loaded == probes
        assert (loaded.concept, loaded.base_model, loaded.revision) == ("logo", "org/base", "abc")
    assert ConceptProbes.load(tmp_path) == probes
    assert (tmp_path / PROBES_FILE_NAME).is_file()


def test_half_size_keeps_timesteps_exact(tmp_path: Path) -> None:
    probes = _probes()
    small = ConceptProbes.load(probes.save(tmp_path / "small.safetensors", dtype="float16"))

    assert torch.equal(small.inputs["timestep"], probes.inputs["timestep"])
    assert torch.allclose(small.targets, probes.targets, atol=2e-3)
    assert small.digest() != probes.digest()
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        assert file.get_tensor("targets").dtype == torch.float16
    with pytest.raises(ConceptDataError, match="beyond"):
        _probes(targets=torch.full((5, 3, 4, 4), 1e6)).save(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="float16"):
        probes.save(tmp_path, dtype="int8")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _probes().save(tmp_path / "probes.safetensors")
    content = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _probes(2).save(path)

    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["probes.safetensors"]


def test_a_custom_run_model_is_given_again_on_loading(tmp_path: Path) -> None:
    path = _probes(run_model=lambda model, inputs: inputs["sample"]).save(tmp_path)

    assert ConceptProbes.load(path).run_model is None
    assert ConceptProbes.load(path, run_model=print).run_model is print


def test_files_that_hold_no_probes_are_refused(tmp_path: Path) -> None:
    version = {"format_version": "1"}
    one = torch.ones(2, 1)
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04 not a safetensors file")
    save_file({"inputs.x": one}, tmp_path / "none.safetensors")
    save_file({"inputs.x": one}, tmp_path / "newer.safetensors", {"format_version": "2"})
    save_file({"inputs.x": one, "weight": one.clone()}, tmp_path / "unknown.safetensors", version)
    save_file({"targets": one}, tmp_path / "empty.safetensors", version)

    expected = {
        "junk": "a pickle",
        "none": "None",
        "newer": "'2'",
        "unknown": r"\['weight'\]",
        "empty": "without inputs",
        "missing": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(ConceptDataError, match=message):
            ConceptProbes.load(tmp_path / f"{name}.safetensors")


def test_what_is_no_path_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path, asked = _probes().save(tmp_path), []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert ConceptProbes.load("user/logo-probes", revision="v1") == ConceptProbes.load(path)
    assert asked == [(("user/logo-probes", PROBES_FILE_NAME), {"revision": "v1"})]

    def refuse(*args: Any, **options: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ConceptDataError, match="neither a path, nor a repository"):
        ConceptProbes.load("user/logo-probes")


def test_the_digest_sees_every_value_and_name() -> None:
    probes = ConceptProbes({"x": torch.zeros(2, 2)})
    changed = torch.zeros(2, 2)
    changed[1, 1] = 1e-6

    others = [
        ConceptProbes({"x": changed}),
        ConceptProbes({"y": torch.zeros(2, 2)}),
        ConceptProbes({"x": torch.zeros(2, 2, 1)}),
        ConceptProbes({"x": torch.zeros(2, 2, dtype=torch.int32)}),
        ConceptProbes({"x": torch.zeros(2, 2)}, torch.zeros(2, 2)),
    ]
    assert len({probes.digest(), *(other.digest() for other in others)}) == 6
    assert probes.digest() == ConceptProbes({"x": torch.zeros(2, 2)}).digest()


# Running the model


def test_the_output_is_found_where_models_put_it() -> None:
    x = torch.ones(2)
    for result in (x, (x, 1), [x], SimpleNamespace(sample=x), SimpleNamespace(logits=x)):
        assert model_output(result) is x
    for nothing in (None, (), SimpleNamespace(loss=x), ("text",)):
        with pytest.raises(ConceptDataError, match="run_model"):
            model_output(nothing)


def test_collected_targets_are_the_base_models_in_evaluation_mode() -> None:
    model = _adapted().train()
    x, weights = torch.randn(6, 6), torch.rand(6, 4)
    batches = [({"x": x[:4], "extra": {"shift": torch.ones(4, 4)}}, weights[:4], torch.zeros(4, 4))]
    batches += [({"x": x[4:], "extra": {"shift": torch.ones(2, 4)}}, weights[4:], torch.zeros(2, 4))]

    probes = collect_concept_probes(model, iter(batches), concept="logo", base_model="org/base")

    base = model.linear.base_layer
    assert torch.allclose(probes.targets, base(x) + 1.0, atol=1e-6)
    assert not probes.targets.requires_grad
    assert not torch.allclose(model.eval()(x).sample, base(x), atol=1e-3)
    assert torch.equal(probes.weights, weights)
    assert probes.loss_targets.shape == (6, 4)
    assert (probes.concept, probes.base_model, len(probes)) == ("logo", "org/base", 6)


def test_collecting_without_targets_runs_no_model() -> None:
    probes = collect_concept_probes(_adapted(), [{"x": torch.randn(2, 6)}], store_targets=False, run_model=print)

    assert probes.targets is None
    assert probes.run_model is print


@pytest.mark.parametrize("store_targets", [True, False])
def test_padding_has_no_weight_in_probes_of_sequences(store_targets: bool) -> None:
    class Sequences(nn.Linear):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    class Pooled(Sequences):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x, attention_mask).sum(1)

    x, mask = torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    options: Any = {"store_targets": store_targets}
    whole = {"x": x, "attention_mask": torch.ones_like(mask)}
    padded = {"x": x, "attention_mask": mask}
    assert collect_concept_probes(Sequences(4, 2), [whole], **options).weights is None
    # Given weights stay, and outputs that are not those of positions have none.
    given = torch.full((3, 5), 2.0)
    assert torch.equal(collect_concept_probes(Sequences(4, 2), [(padded, given)], **options).weights, given)
    assert collect_concept_probes(Pooled(4, 2), [padded], **options).weights is None
    probes = collect_concept_probes(Sequences(4, 2), [whole, padded], **options)
    assert torch.equal(probes.weights, torch.cat([torch.ones(3, 5), mask.float()]))


def test_the_padding_of_a_question_is_not_that_of_the_answer() -> None:
    tokens, mask = torch.randint(2, 30, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[:, 3:] = 0
    question = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens.flip(1)}
    assert collect_concept_probes(tiny_t5(), [question]).weights is None
    probes = collect_concept_probes(tiny_t5(), [{**question, "decoder_attention_mask": mask.flip(1)}])
    assert torch.equal(probes.weights, mask.flip(1).float())


def test_a_batch_without_the_concept_may_be_collected_if_others_show_it() -> None:
    model, x, weights = nn.Linear(4, 2), torch.randn(4, 4), torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    run = {"run_model": lambda model, inputs: model(inputs["x"])}
    whole = collect_concept_probes(model, [({"x": x}, weights)], **run)
    each = collect_concept_probes(model, [({"x": x[i : i + 1]}, weights[i : i + 1]) for i in range(4)], **run)
    assert each == whole
    with pytest.raises(ConceptDataError, match="weights are all zero"):
        collect_concept_probes(model, [({"x": x}, 0 * weights)] * 2, **run)


def test_collecting_uses_run_model() -> None:
    def run_model(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return 2.0 * model(**inputs).sample

    model, x = Noisy(), torch.randn(3, 6)
    probes = collect_concept_probes(model, [({"x": x}, None)], run_model=run_model)

    assert torch.allclose(probes.targets, 2.0 * model.linear(x))


@pytest.mark.parametrize("batches", [[], [({"x": torch.ones(2, 6)},)], [torch.ones(2, 6)], [(torch.ones(2), None)]])
def test_batches_of_another_form_are_refused(batches: list[Any]) -> None:
    with pytest.raises(ConceptDataError, match="batch"):
        collect_concept_probes(_adapted(), batches)


def test_switching_adapters_off_restores_every_flag() -> None:
    model = _adapted()
    model.linear.lora_A["default"].weight.requires_grad_(False)
    x = torch.randn(3, 6)
    model.eval()
    adapted = model(x).sample

    with adapters_disabled(model):
        assert torch.equal(model(x).sample, model.linear.base_layer(x))

    assert torch.equal(model(x).sample, adapted)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not flags["linear.lora_A.default.weight"]
    assert flags["linear.lora_B.default.weight"]


@pytest.mark.parametrize("beside", [["style"], ["style", "default"], ["default"]], ids=str)
def test_switching_one_adapter_off_leaves_those_beside_it(beside: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for adapter, targets in (("style", ["0", "1"]), ("default", ["1"])):
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter)
    x = torch.randn(3, 4)
    others = [name for name in beside if name != "default"]
    with torch.no_grad(), nullcontext() if others else adapters_disabled(model):
        for layer in model:
            layer.set_adapter(others or beside)
        expected = model(x)
    for layer in model:
        layer.set_adapter(beside)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    flags, before = [p.requires_grad for p in model.parameters()], model(x)

    with adapters_disabled(model, only="default"):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [layer.active_adapters for layer in model] == [beside, beside]


def test_another_adapter_that_is_merged_and_active_stays_in_the_weights() -> None:
    model = _adapted().eval()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), model, "other")
    model.linear.set_adapter(["default", "other"])
    model.linear.merge(adapter_names=["other"])
    merged = model.linear.get_base_layer().weight.clone()
    with adapters_disabled(model, only="default"):
        model(torch.randn(3, 6))
    assert torch.equal(model.linear.get_base_layer().weight, merged)
    with pytest.raises(ConceptDataError, match="'other' is merged"), adapters_disabled(model):
        pass


def test_adapters_that_were_off_stay_off() -> None:
    model = _adapted().eval()
    model.linear.enable_adapters(False)

    with adapters_disabled(model):
        pass

    assert model.linear.disable_adapters


def test_a_fused_adapter_is_not_taken_out_of_the_weights_and_once_it_is_the_bases_counts_as_such() -> None:
    """`unload_lora` then keeps the base model as fused, and what was unfused silently would be lost."""
    from tiny_models import UNET_TARGETS, tiny_unet, unet_inputs

    unet, inputs = tiny_unet(), unet_inputs()
    unet.add_adapter(LoraConfig(r=4, target_modules=UNET_TARGETS, init_lora_weights=False), "style")
    unet.fuse_lora()
    with torch.no_grad():
        fused = unet(**inputs).sample
    with pytest.raises(ConceptDataError, match="adapter 'style' is merged into a layer"):
        collect_concept_probes(unet, [inputs])
    with pytest.raises(ConceptDataError, match="adapter 'style' is merged into a layer"):
        fit_concept_basis(unet, [inputs], [unet_inputs(seed=1)], target_modules=["conv1"], progress=False)
    unet.unload_lora()
    targets = collect_concept_probes(unet, [inputs]).targets
    assert targets is not None
    torch.testing.assert_close(targets, fused)


def test_evaluation_mode_restores_every_module_by_itself() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]

    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())

    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("fast", [True, False])
def test_evaluation_mode_runs_the_adapters_of_pytorchs_encoder_which_has_a_fast_path_past_them(fast: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    config = LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.TransformerEncoder(layer, 2))
    x, padding = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) > 3
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad(), evaluation_mode(model):
            adapted, padded = model(x), model(x, src_key_padding_mask=padding)
            with adapters_disabled(model):
                base = model(x)
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert not torch.allclose(adapted, base, atol=1e-2)
    # Of a mask, the fast path makes nested tensors, which hooks and adapters cannot take.
    assert padded.shape == adapted.shape
