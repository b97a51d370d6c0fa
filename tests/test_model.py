"""GradProjConfig and GradProjModel as PEFT users meet them: inject, train, merge, combine, copy, refuse."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from conftest import SmallNet
from distributed_case import base_net, small_probes
from helpers import LAYERS, PackedAdam, random_layer_basis, saved_leakage, small_net_basis, train, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from tiny_models import LLAMA_TARGETS, basis_for, tiny_llama
from torch import nn

from peft_gradproj import ConceptBasis, GradProjConfig, online_projections, refresh_concept_basis, verify_adapter
from peft_gradproj.errors import ConceptBasisError, ConceptDataError, GradProjConfigError
from peft_gradproj.layers import projected_weights

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adam, packed in part": lambda p: PackedAdam(p, lr=1e-2, packed_from=50),
}


def gradproj_config(basis: ConceptBasis | None = None, **kwargs) -> GradProjConfig:
    basis = small_net_basis() if basis is None else basis
    return GradProjConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LAYERS), "concept_basis": basis, **kwargs})


# The invariant


@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (2, 0.5)], ids=["plain", "accumulated and clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_saved_after_training_does_not_leak(optimizer, accumulation, clip, tmp_path):
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), gradproj_config(basis))
    losses = train(model, OPTIMIZERS[optimizer](trainable(model)), 60, accumulation=accumulation, clip=clip)
    model.save_pretrained(tmp_path)
    assert losses[-1] < losses[0], "nothing was learned, so nothing was shown"
    assert saved_leakage(tmp_path, basis) <= 1e-6


def test_lbfgs_learns_on_the_constraint_what_it_does_not_leak(tmp_path):
    # The steps that it remembers are the ones that are left after the retraction, since its gradients are projected.
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), gradproj_config(basis))
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=4, line_search_fn="strong_wolfe")
    pictures = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), torch.arange(16) % 5)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(20):
        optimizer.step(closure)
    for _, module in projected_weights(model, "default"):
        torch.testing.assert_close(module.project(module.weight), module.weight, atol=1e-6, rtol=0.0)
    model.save_pretrained(tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    assert saved_leakage(tmp_path, basis) <= 1e-6


def test_plain_lora_leaks_in_the_same_training(tmp_path):
    # Without it, the test above could pass for a reason of its own.
    model = get_peft_model(SmallNet(), LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS)))
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 60)
    model.save_pretrained(tmp_path)
    assert saved_leakage(tmp_path, small_net_basis()) > 0.1


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_low_precision_leaks_no_more_than_its_rounding(dtype, floor, tmp_path):
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), gradproj_config(basis))
    model.to(dtype)
    train(model, torch.optim.SGD(trainable(model), lr=5e-2), 50, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert saved_leakage(tmp_path, basis) <= floor


def test_weights_written_behind_pytorchs_back_are_saved_and_merged_on_the_constraint(tmp_path):
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), gradproj_config(basis))
    with torch.no_grad():
        for _, module in projected_weights(model, "default"):
            module.weight.normal_()
    pictures = torch.randn(4, 3, 8, 8)
    expected = model(pictures)
    model.save_pretrained(tmp_path)
    assert saved_leakage(tmp_path, basis) <= 1e-6
    torch.testing.assert_close(model.merge_and_unload()(pictures), expected, atol=1e-5, rtol=1e-4)


def test_other_optimizers_and_frozen_adapters_are_left_alone():
    model = get_peft_model(SmallNet(), gradproj_config())
    stranger = nn.Linear(3, 3)
    module = model.base_model.model.query.lora_A["default"]
    with torch.no_grad():
        module.weight.normal_()
    before = module.weight.detach().clone()
    stranger(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(stranger.parameters(), lr=0.1).step()
    assert torch.equal(module.weight, before)


# PEFT's own operations


def test_the_registered_type_is_gradproj_and_the_layers_are_lora():
    model = get_peft_model(SmallNet(), gradproj_config())
    assert model.peft_config["default"].peft_type == PeftType("GRADPROJ") == "GRADPROJ"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{layer}.lora_{part}.default.weight" for layer in LAYERS for part in "AB"
    }


def test_disabling_the_adapter_gives_the_base_model():
    base = SmallNet()
    pictures = torch.randn(4, 3, 8, 8)
    expected = base(pictures)
    model = get_peft_model(base, gradproj_config())
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 3)
    with model.disable_adapter():
        torch.testing.assert_close(model(pictures), expected)
    assert not torch.allclose(model(pictures), expected)


def test_adapters_with_different_bases_keep_each_their_own(tmp_path):
    first, second = small_net_basis(seed=1), small_net_basis(seed=2)
    model = get_peft_model(SmallNet(), gradproj_config(first), adapter_name="first")
    model.add_adapter("second", gradproj_config(second))
    for name in ("first", "second"):
        model.set_adapter(name)
        train(model, OPTIMIZERS["AdamW"](trainable(model)), 10)
    model.save_pretrained(tmp_path)
    assert saved_leakage(tmp_path / "first", first) <= 1e-6
    assert saved_leakage(tmp_path / "second", second) <= 1e-6
    assert saved_leakage(tmp_path / "first", second) > 0.01


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_combination_stays_on_the_common_basis(combination, tmp_path):
    basis = small_net_basis(("input", "output", "rank"))
    model = get_peft_model(SmallNet(), gradproj_config(basis), adapter_name="first")
    model.add_adapter("second", gradproj_config(basis))
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        train(model, OPTIMIZERS["AdamW"](trainable(model)), 10, seed=seed)
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=combination)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert saved_leakage(tmp_path / "both", basis) <= 1e-6
    assert model.peft_config["first"].concept_basis == basis, "the sources' configs were changed"


def test_adapters_with_different_bases_are_not_combined():
    model = get_peft_model(SmallNet(), gradproj_config(small_net_basis(seed=1)), adapter_name="first")
    model.add_adapter("second", gradproj_config(small_net_basis(seed=2)))
    with pytest.raises(GradProjConfigError, match="different concept bases"):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both", combination_type="linear")


def test_all_linear_targets_and_regular_expressions_are_matched_like_lora():
    basis = small_net_basis()
    for targets in ("all-linear", r"query|key|head"):
        model = get_peft_model(SmallNet(), gradproj_config(basis, target_modules=targets))
        assert {name.split(".")[2] for name, _ in projected_weights(model, "default")} == {"query", "key", "head"}


def test_refreshed_rank_bases_are_kept_from_then_on():
    model = get_peft_model(SmallNet(), gradproj_config(small_net_basis(("input", "rank"))))
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 5)
    new = small_net_basis(("rank",), seed=7)
    with pytest.warns(UserWarning, match="will not verify"):
        refresh_concept_basis(model, new)
    module = model.base_model.model.query.lora_A["default"]
    start = (new["query"].rank.mT @ module.weight).detach()
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 10)
    torch.testing.assert_close(new["query"].rank.mT @ module.weight, start, atol=1e-5, rtol=1e-5)
    kept = model.peft_config["default"].concept_basis["query"]
    assert torch.equal(kept.rank, new["query"].rank)
    assert (module.weight @ kept.input).norm() <= 1e-6 * module.weight.norm()


def test_a_rank_basis_that_was_refreshed_in_training_is_told_of_in_what_is_published(tmp_path):
    model = get_peft_model(SmallNet(), gradproj_config(small_net_basis(("input", "rank"))))
    for step, seed in enumerate((5, 6, 7)):
        # The first before any training, when B is zero in all directions.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            refresh_concept_basis(model, small_net_basis(("rank",), seed=seed))
        assert ["layer 'conv' and 3 more" in str(w.message) for w in told] == [True] * (step == 1)
        train(model, OPTIMIZERS["AdamW"](trainable(model)), 5)
        model.save_pretrained(tmp_path / str(step))
    first, *others = (verify_adapter(tmp_path / str(step)) for step in range(3))
    assert first.ok, first.render()
    for report in others:
        assert {check.name for check in report.failures} == {"coverage", "leakage"}
        (told,) = (check.layer for check in report.failures if check.name == "coverage")
        assert "refreshed in training" in told


def test_a_refresh_that_would_move_the_verifiable_spaces_is_refused():
    model = get_peft_model(SmallNet(), gradproj_config())
    with pytest.raises(ConceptBasisError, match=r"'conv'.*input or output"):
        refresh_concept_basis(model, small_net_basis(("input",)))


def test_a_low_cpu_memory_load_is_constrained(tmp_path):
    basis = small_net_basis(("input", "output", "rank", "gradient"))
    model = get_peft_model(SmallNet(), gradproj_config(basis))
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 5)
    model.save_pretrained(tmp_path)
    config = GradProjConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(SmallNet(), tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=True)
    start = loaded.base_model.model.query.lora_A["default"].weight.detach().clone()
    train(loaded, OPTIMIZERS["AdamW"](trainable(loaded)), 10)
    a = loaded.base_model.model.query.lora_A["default"].weight
    assert not torch.equal(a, start)
    torch.testing.assert_close(basis["query"].rank.mT @ a, basis["query"].rank.mT @ start, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert saved_leakage(tmp_path / "again", basis) <= 1e-6


def test_probes_cost_nothing_where_an_adapter_is_loaded_to_be_used(tmp_path):
    get_peft_model(base_net(), gradproj_config(init_lora_weights=False)).save_pretrained(tmp_path)
    outputs, pictures = [], torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for probes in (None, small_probes()):
        config = GradProjConfig.from_pretrained(tmp_path, concept_probes=probes)
        loaded = PeftModel.from_pretrained(base_net(), tmp_path, config=config)
        assert not trainable(loaded)
        other = SmallNet()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(other, torch.optim.SGD(other.parameters(), lr=1e-2), 25)
        with torch.no_grad():
            outputs.append(loaded(pictures))
    assert torch.equal(*outputs)


def test_every_option_of_the_probes_reaches_their_projection():
    options = {"strength": 0.5, "probe_every": 3, "probe_batch_size": 4, "restore": 0.25, "probe_history": 2}
    options |= {"negative_guidance": 0.3}
    model = get_peft_model(base_net(), gradproj_config(concept_probes=small_probes(), probe_seed=7, **options))
    (projection,) = online_projections(model).values()

    assert projection.seed == 7
    assert {name: getattr(projection, name) for name in options} == options
    assert all(GradProjConfig(uncovered="ignore").settings()[name] != value for name, value in options.items())


def test_probes_of_an_adapter_that_is_gone_do_not_correct_the_next_of_its_name():
    probes, options = small_probes(), {"probe_every": 1, "target_modules": ["query"]}
    unloaded = get_peft_model(base_net(), gradproj_config(concept_probes=probes, **options)).unload()
    ends = []
    for base in (base_net(), unloaded):
        torch.manual_seed(1)
        plain = get_peft_model(base, LoraConfig(r=4, target_modules=["query"]))
        assert online_projections(plain) == {}
        with nullcontext() if base is not unloaded else pytest.warns(UserWarning, match="another adapter"):
            train(plain, torch.optim.AdamW(trainable(plain), lr=1e-2), 3)
        ends.append([p.detach() for p in trainable(plain)])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))

    model = get_peft_model(base_net(), gradproj_config(concept_probes=probes, **options))
    model.add_adapter("other", gradproj_config(**options))
    model.delete_adapter("default")
    model.add_adapter("default", gradproj_config(**options))
    assert online_projections(model) == {}
    assert not model.base_model.model._forward_pre_hooks


# What escapes is refused


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["head"]},
        {"trainable_token_indices": [0]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
        {"target_parameters": ["head.weight"]},
        {"ensure_weight_tying": True},
    ],
    ids=str,
)
def test_an_option_that_escapes_the_projection_is_refused_by_name(option):
    with pytest.raises(GradProjConfigError, match=next(iter(option))):
        gradproj_config(target_modules=["query"], **option)


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_an_initialisation_that_a_basis_would_spoil_is_refused_with_it_even_on_request(init):
    with pytest.raises(GradProjConfigError, match=f"init_lora_weights='{init}' cannot go with a concept basis"):
        gradproj_config(init_lora_weights=init, uncovered="ignore")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_with_probes_alone_such_an_initialisation_is_let_through_and_starts_as_the_base_model(init):
    base, pictures = base_net().eval(), torch.randn(4, 3, 8, 8)
    expected = base(pictures)
    options = {"target_modules": ["query", "key"], "concept_probes": small_probes(), "uncovered": "warn"}
    with pytest.warns(UserWarning, match="init_lora_weights"):
        config = GradProjConfig(r=4, init_lora_weights=init, **options)
    torch.testing.assert_close(get_peft_model(base, config)(pictures), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("SEQ_CLS", "LlamaForSequenceClassification"),
        ("TOKEN_CLS", "LlamaForTokenClassification"),
        ("QUESTION_ANS", "LlamaForQuestionAnswering"),
    ],
)
def test_a_head_that_peft_trains_by_itself_is_refused_and_recorded_on_request(task, kind):
    model = getattr(transformers, kind)(tiny_llama().config)
    options = {"target_modules": LLAMA_TARGETS, "concept_basis": basis_for(model, LLAMA_TARGETS), "task_type": task}
    with pytest.raises(GradProjConfigError, match=f"modules_to_save.*{task}"):
        get_peft_model(model, gradproj_config(**options))
    with pytest.warns(UserWarning, match=f"modules_to_save.*{task}"):
        adapted = get_peft_model(model, gradproj_config(**options, uncovered="warn"))
    assert any(p.requires_grad and "modules_to_save" in name for name, p in adapted.named_parameters())
    (part,) = adapted.peft_config["default"].uncovered_parts
    assert "modules_to_save" in part


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "w1", "w2", "w3"], "down_proj, gate_up_proj"),
        (["q_proj", "gate"], "gate.weight"),
        ("all-linear", "down_proj, gate.weight, gate_up_proj"),
    ],
    ids=["experts", "router", "all-linear"],
)
def test_experts_that_lora_adapts_as_parameters_are_refused_and_not_left_out_in_silence(targets, named):
    base = tiny_mixtral()
    options = {"target_modules": targets, "concept_basis": basis_for(base, ["q_proj"])}
    with pytest.raises(GradProjConfigError, match=f"{named}, parameters of MixtralForCausalLM"):
        get_peft_model(base, gradproj_config(**options))
    assert not any("lora_" in name for name, _ in base.named_modules())

    def trained(config: LoraConfig) -> set[str]:
        return {n for n, p in get_peft_model(tiny_mixtral(), config).named_parameters() if p.requires_grad}

    plain = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    assert trained(gradproj_config(**options, uncovered="ignore")) == trained(plain)


def test_the_attention_of_a_mixture_of_experts_is_projected(tmp_path):
    base = tiny_mixtral()
    options = {"target_modules": ["q_proj", "v_proj"], "concept_basis": basis_for(base, ["q_proj", "v_proj"])}
    model = get_peft_model(base, gradproj_config(**options))
    assert model.peft_config["default"].peft_type == PeftType("GRADPROJ")
    model.save_pretrained(tmp_path)
    assert verify_adapter(tmp_path).ok


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=32, **sizes, **heads))


def test_an_option_that_is_set_after_the_config_was_made_is_refused_before_anything_is_injected():
    # As TRL does for tokens that it adds, and PEFT for the head of a classifier.
    base, config = SmallNet(), gradproj_config(target_modules=["query"])
    config.modules_to_save = ["head"]
    with pytest.raises(GradProjConfigError, match="modules_to_save"):
        get_peft_model(base, config)
    assert not any("lora_" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("init", [False, "orthogonal"])
def test_a_b_that_does_not_start_at_zero_is_refused_with_a_rank_basis_and_with_no_other(init):
    with pytest.raises(
        GradProjConfigError, match=rf"rank space, of layer 'conv' among 4, with .*={init!r}.*'gaussian'"
    ):
        gradproj_config(small_net_basis(("input", "rank")), init_lora_weights=init)
    with pytest.warns(UserWarning, match="B would not start at zero"):
        config = gradproj_config(small_net_basis(("rank",)), init_lora_weights=init, uncovered="warn")
    assert "rank space" in config.uncovered_parts[0]
    gradproj_config(small_net_basis(("input", "output", "gradient")), init_lora_weights=init)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_b_that_starts_at_zero_verifies_with_a_rank_basis(tmp_path, init):
    model = get_peft_model(SmallNet(), gradproj_config(small_net_basis(("rank",)), init_lora_weights=init))
    train(model, OPTIMIZERS["AdamW"](trainable(model)), 5)
    model.save_pretrained(tmp_path)
    report = verify_adapter(tmp_path)
    assert report.ok, report.render()


def test_a_layer_that_the_basis_misses_is_refused_by_name_and_leaves_the_model_as_it_was():
    base = SmallNet()
    with pytest.raises(GradProjConfigError, match="layer 'key'"):
        get_peft_model(base, gradproj_config(small_net_basis(layers=("query",)), target_modules=["query", "key"]))
    assert all(not name.count("lora_") for name, _ in base.named_modules())


def test_uncovered_parts_are_let_through_and_recorded_on_request():
    basis = small_net_basis(layers=("query",))
    with pytest.warns(UserWarning, match="layer 'key'"):
        model = get_peft_model(SmallNet(), gradproj_config(basis, target_modules=["query", "key"], uncovered="warn"))
    assert model.peft_config["default"].uncovered_parts == ["layer 'key'"]


def test_a_basis_of_another_model_is_refused_even_if_uncovered_layers_are_not():
    foreign = ConceptBasis({"elsewhere": random_layer_basis(8, 16, 4, ("input",))})
    with pytest.raises(ConceptBasisError, match="covers none"):
        get_peft_model(SmallNet(), gradproj_config(foreign, target_modules=["query"], uncovered="ignore"))


def test_a_config_with_neither_basis_nor_probes_is_refused():
    with pytest.raises(GradProjConfigError, match="neither"):
        GradProjConfig(target_modules=["query"])


@pytest.mark.parametrize(
    "value",
    [
        {"strength": 1.5},
        {"strength": -0.1},
        {"rule": "diagonal"},
        {"probe_every": 0},
        {"probe_batch_size": 0},
        {"restore": -1.0},
        {"probe_history": 0},
        {"negative_guidance": -1.0},
        {"negative_guidance": float("nan")},
        {"probe_every": 8.0},
        {"probe_every": "8"},
        {"probe_seed": 0.5},
        {"restore": "0.5"},
        {"strength": None},
        {"uncovered": "perhaps"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(value):
    with pytest.raises(GradProjConfigError, match=next(iter(value))):
        gradproj_config(**value)


def test_numbers_of_numpy_are_kept_as_plain_ones():
    config = gradproj_config(probe_every=np.int64(4), probe_batch_size=np.int32(2), restore=np.float32(0.5))
    assert [(type(config.settings()[name]), config.settings()[name]) for name in ("probe_every", "restore")] == [
        (int, 4),
        (float, 0.5),
    ]
    get_peft_model(base_net(), gradproj_config(concept_probes=small_probes(), probe_batch_size=np.int64(2)))


def test_the_literal_rule_without_loss_targets_is_refused_when_the_config_is_made():
    with pytest.raises(ConceptDataError, match="needs probes with loss_targets"):
        gradproj_config(concept_probes=small_probes(), rule="orthogonal")


@pytest.mark.parametrize("changed", [{"probe_every": 8.0}, {"rule": "orthogonal"}], ids=str)
def test_what_is_refused_of_a_config_that_was_changed_is_refused_before_anything_is_injected(changed):
    base, config = base_net(), gradproj_config(concept_probes=small_probes())
    vars(config).update(changed)
    with pytest.raises((GradProjConfigError, ConceptDataError)):
        get_peft_model(base, config)
    assert all(not name.count("lora_") for name, _ in base.named_modules())


@pytest.mark.parametrize("space", ["rank", "gradient"])
def test_a_basis_for_another_rank_is_refused_before_anything_is_injected(space):
    # Of the last layer alone, before which the others would have been injected.
    ranks = {"rank_pattern": {"head": 3}}
    fitting = {**small_net_basis((space,)), **small_net_basis((space,), r=3, layers=["head"])}
    get_peft_model(SmallNet(), gradproj_config(ConceptBasis(fitting), **ranks))
    base = SmallNet()
    with pytest.raises(ConceptBasisError, match=rf"layer 'head': the {space} basis has width .*another `r`"):
        get_peft_model(base, gradproj_config(small_net_basis((space,)), **ranks))
    assert all(not name.count("lora_") for name, _ in base.named_modules())


class WithOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.conv1d = nn.Conv1d(8, 8, 3)
        self.conv3d = nn.Conv3d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


@pytest.mark.parametrize("layer", ["embedding", "grouped", "conv1d", "conv3d", "attention"])
def test_a_layer_of_an_unsupported_kind_is_refused_by_name(layer):
    basis = ConceptBasis({name: random_layer_basis(8, 8, 4, ("input",)) for name in (layer, "linear")})
    base = WithOthers()
    with pytest.raises(GradProjConfigError, match=f"'{layer}'"):
        get_peft_model(base, GradProjConfig(r=4, target_modules=["linear", layer], concept_basis=basis))
    assert not any("lora_" in name for name, _ in base.named_modules()), "the refusal left a half-adapted model"


def test_a_basis_that_is_neither_basis_nor_path_is_refused():
    with pytest.raises(ConceptBasisError, match="dict"):
        GradProjConfig(target_modules=["query"], concept_basis={"query": torch.eye(8)})


# The cost of importing


def test_importing_us_adds_less_than_50_ms_to_peft_and_does_not_import_diffusers():
    program = (
        "import sys, time, peft\n"
        "start = time.process_time()\n"
        "import peft_gradproj\n"
        "cost = time.process_time() - start\n"
        "assert 'diffusers' not in sys.modules\n"
        "from peft_gradproj import GradProjConfig\n"
        "assert 'diffusers' not in sys.modules and 'datasets' not in sys.modules\n"
        "print(cost)"
    )
    cost = min(
        float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert cost < 0.05
