"""The engines under a training loop: diffusers, transformers, several processes, checkpointing, compilation, EMA."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SmallNet
from distributed_case import PROBE_OPTIONS, adapted_net, small_probes, train_alone
from helpers import LAYERS, saved_leakage, small_net_basis, train, trainable
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny_models import (
    FLOORS,
    LLAMA_TARGETS,
    UNET_TARGETS,
    basis_for,
    folder_leakage,
    tensors_leakage,
    tiny_llama,
    tiny_unet,
    unet_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from peft_gradproj import (
    ConceptProbes,
    GradProjConfig,
    collect_concept_probes,
    fit_concept_basis,
    online_projections,
    refresh_concept_basis,
    save_sidecars,
    verify_adapter,
)
from peft_gradproj.layers import projected_weights

TESTS = Path(__file__).parent


def run_python(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def fit_noise(unet, steps: int = 8, dtype: torch.dtype = torch.float32, eps: float = 1e-8) -> list[float]:
    """Train a UNet on fixed inputs; returns the losses."""
    optimizer = torch.optim.AdamW(trainable(unet), lr=1e-2, eps=eps)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in unet_inputs(4).items()}
    target = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = (unet(**inputs).sample.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fit_tokens(model, steps: int = 8) -> list[float]:
    """Train a causal language model on fixed tokens; returns the losses."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted_unet(**options):
    unet = tiny_unet()
    unet.requires_grad_(False)
    basis = basis_for(unet, UNET_TARGETS)
    # The options of diffusers' training scripts.
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", "target_modules": UNET_TARGETS}
    unet.add_adapter(GradProjConfig(**{**config, "concept_basis": basis, **options}))
    return unet, basis


def unet_probes():
    inputs = unet_inputs(4, seed=7)
    return ConceptProbes(inputs, targets=torch.zeros_like(inputs["sample"]))


def adapted_llama():
    model = tiny_llama()
    basis = basis_for(model, LLAMA_TARGETS)
    model.add_adapter(GradProjConfig(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS, concept_basis=basis))
    return model, basis


def test_gpt_2_whose_layers_are_transposed_is_fitted_trained_and_loaded_as_any(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes))
    tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    with_it, without = {"input_ids": tokens}, {"input_ids": tokens.flip(0)}
    targets = ["c_attn", "c_fc", "c_proj"]
    basis = fit_concept_basis(base, [with_it], [without], target_modules=targets, rank=2, progress=False)
    layer = basis["transformer.h.0.attn.c_attn"]
    assert (layer.input.shape, layer.output.shape) == ((16, 2), (48, 2))
    probes = collect_concept_probes(base, [(with_it, None)])
    config = GradProjConfig(
        r=4, lora_alpha=8, target_modules=targets, concept_basis=basis, concept_probes=probes, probe_every=2
    )
    stock = copy.deepcopy(base)
    model = get_peft_model(base, config)
    losses = fit_tokens(model)
    assert losses[-1] < losses[0]
    assert online_projections(model)["default"].last.removed_share > 0
    model.save_pretrained(tmp_path)
    assert folder_leakage(tmp_path, basis) <= FLOORS[torch.float32]
    assert verify_adapter(tmp_path).ok
    loaded = PeftModel.from_pretrained(stock, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**with_it).logits, model.eval()(**with_it).logits)


# diffusers

STOCK_DIFFUSERS = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
inputs, *folders = sys.argv[1:]
for folder in folders:
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=UNet2DConditionModel.from_pretrained(f"{folder}/base"),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.load_lora_weights(f"{folder}/adapter")
    with torch.no_grad():
        output = pipeline.unet.eval()(**load_file(inputs)).sample
    save_file({"output": output}, f"{folder}/output.safetensors")
assert "peft_gradproj" not in sys.modules
"""


def save_with_pipeline(unet, folder):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def save_with_metadata(unet, folder):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), **_collate_lora_metadata({"unet": unet})
    )


def test_what_diffusers_saves_does_not_leak_verifies_and_is_loaded_by_stock_diffusers(tmp_path):
    save_file(unet_inputs(2, seed=9), tmp_path / "inputs.safetensors")
    expected = {}
    for save in (save_with_pipeline, save_with_metadata):
        unet, basis = adapted_unet(lora_alpha=4)
        folder = tmp_path / save.__name__
        tiny = tiny_unet()
        tiny.load_state_dict({k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if "lora" not in k})
        tiny.save_pretrained(folder / "base")
        losses = fit_noise(unet)
        assert losses[-1] < losses[0]
        save(unet, folder / "adapter")
        save_sidecars(unet, folder / "adapter")
        assert folder_leakage(folder / "adapter", basis) <= FLOORS[torch.float32]
        assert verify_adapter(folder / "adapter").ok
        with torch.no_grad():
            expected[folder] = unet.eval()(**unet_inputs(2, seed=9)).sample
    run_python("-c", STOCK_DIFFUSERS, str(tmp_path / "inputs.safetensors"), *map(str, expected))
    for folder, output in expected.items():
        torch.testing.assert_close(load_file(folder / "output.safetensors")["output"], output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}},
        {"alpha_pattern": {"to_q": 2}},
    ],
    ids=str,
)
def test_weights_that_do_not_say_their_scale_are_saved_with_a_warning_since_diffusers_loads_another(options, tmp_path):
    unet, _ = adapted_unet(**options)
    fit_noise(unet)
    expected = unet.eval()(**unet_inputs(2)).sample
    save_with_pipeline(unet, tmp_path / "silent")
    with pytest.warns(UserWarning, match="does not say with which alpha"):
        save_sidecars(unet, tmp_path / "silent")
    save_with_metadata(unet, tmp_path / "told")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sidecars(unet, tmp_path / "told")
    assert scales_of(unet) == scales_of(reloaded(unet, tmp_path / "told"))
    torch.testing.assert_close(unet(**unet_inputs(2)).sample, expected, atol=1e-5, rtol=1e-4)
    assert set(scales_of(reloaded(unet, tmp_path / "silent"))) == {1.0}


def test_weights_at_scale_one_in_every_layer_need_not_say_it(tmp_path):
    unet, _ = adapted_unet(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    fit_noise(unet)
    expected = unet.eval()(**unet_inputs(2)).sample
    save_with_pipeline(unet, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sidecars(unet, tmp_path)
    torch.testing.assert_close(reloaded(unet, tmp_path)(**unet_inputs(2)).sample, expected, atol=1e-5, rtol=1e-4)


def reloaded(unet, folder):
    """The same model with the adapter of `folder` in place of its own, as stock diffusers loads it."""
    unet.delete_adapters("default")
    unet.load_lora_adapter(
        folder, prefix="unet", adapter_name="default", weight_name="pytorch_lora_weights.safetensors"
    )
    return unet


def scales_of(unet) -> list[float]:
    return [s for module in unet.modules() if isinstance(module, LoraLayer) for s in module.scaling.values()]


def test_save_lora_adapter_of_diffusers_verifies_and_reloads(tmp_path):
    unet, basis = adapted_unet()
    fit_noise(unet)
    unet.save_lora_adapter(tmp_path)
    save_sidecars(unet, tmp_path)
    assert folder_leakage(tmp_path, basis) <= FLOORS[torch.float32]
    assert verify_adapter(tmp_path).ok
    expected = unet.eval()(**unet_inputs(2)).sample
    unet.delete_adapters("default")
    unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(unet.eval()(**unet_inputs(2)).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_unet_cast_before_the_adapter_is_added_leaks_no_more_than_its_rounding(dtype, tmp_path):
    # As the scripts do with --mixed_precision: the base is cast first, and the adapter follows its dtype.
    unet = tiny_unet().to(dtype)
    unet.requires_grad_(False)
    basis = basis_for(unet, UNET_TARGETS)
    probes = collect_concept_probes(unet, [(unet_inputs(4, seed=7), None)])
    options = {"concept_basis": basis, "concept_probes": probes, "probe_every": 2, "probe_batch_size": 2}
    unet.add_adapter(GradProjConfig(r=4, target_modules=UNET_TARGETS, **options))
    assert {p.dtype for p in trainable(unet)} == {dtype}
    losses = fit_noise(unet, dtype=dtype, eps=1e-3)
    assert losses[-1] < losses[0]
    assert online_projections(unet)["default"].last.step == 6
    unet.save_lora_adapter(tmp_path)
    assert folder_leakage(tmp_path, basis) <= FLOORS[dtype]


# transformers


def test_transformers_saves_an_added_adapter_with_its_sidecars_and_again_after_more_training(tmp_path):
    model, basis = adapted_llama()
    for _ in range(2):
        losses = fit_tokens(model)
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        assert folder_leakage(tmp_path, basis) <= FLOORS[torch.float32]
        report = verify_adapter(tmp_path)
        assert report.ok, report.to_json()


def test_transformers_deletes_switches_and_reloads_adapters(tmp_path):
    model, basis = adapted_llama()
    fit_tokens(model)
    model.save_pretrained(tmp_path)
    assert folder_leakage(tmp_path, basis) <= FLOORS[torch.float32]
    tokens = torch.randint(3, 32, (1, 6))
    expected = model.eval()(tokens).logits
    model.add_adapter(
        GradProjConfig(r=4, lora_alpha=8, target_modules=LLAMA_TARGETS, concept_basis=basis), adapter_name="other"
    )
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-4)
    model.set_adapter("default")
    torch.testing.assert_close(model(tokens).logits, expected)
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_modules())
    model.load_adapter(str(tmp_path), adapter_name="plain")
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spaces", [("input", "output"), ("rank",), ("gradient",)], ids=", ".join)
def test_what_transformers_loads_to_train_on_is_where_training_goes_on(tmp_path, spaces):
    base = tiny_llama()
    fresh, basis = copy.deepcopy(base), basis_for(base, LLAMA_TARGETS, spaces=spaces)
    base.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis))
    fit_tokens(base)
    base.save_pretrained(tmp_path)
    tokens = torch.randint(3, 32, (1, 6))
    expected = base.eval()(tokens).logits
    fresh.load_adapter(str(tmp_path), peft_config=GradProjConfig.from_pretrained(tmp_path), is_trainable=True)
    optimizer = torch.optim.SGD(trainable(fresh), lr=0.0)
    fresh(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    torch.testing.assert_close(fresh.eval()(tokens).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:B is not zero along the new rank basis")
def test_what_transformers_loads_after_its_rank_basis_was_refreshed_is_what_was_saved(tmp_path):
    base = tiny_llama()
    fresh, basis = copy.deepcopy(base), basis_for(base, LLAMA_TARGETS, spaces=("input", "rank"))
    base.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis))
    fit_tokens(base)
    refresh_concept_basis(base, basis_for(base, LLAMA_TARGETS, spaces=("rank",), seed=1))
    base.save_pretrained(tmp_path)
    tokens = torch.randint(3, 32, (1, 6))
    fresh.load_adapter(str(tmp_path), peft_config=GradProjConfig.from_pretrained(tmp_path), is_trainable=True)
    torch.testing.assert_close(fresh.eval()(tokens).logits, base.eval()(tokens).logits)


def test_a_model_without_our_adapter_is_saved_as_ever(tmp_path):
    from peft import LoraConfig

    model, _ = adapted_llama()  # registers us
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=4, target_modules=LLAMA_TARGETS))
    model.save_pretrained(tmp_path / "plain")
    for folder in ("base", "plain"):
        assert not (tmp_path / folder / "gradproj.json").exists()


# Several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    run_python(str(TESTS / "scripts" / "two_processes.py"), str(folder))
    return folder


def raw(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_ddp_with_probes_ends_alike_on_both_ranks_and_as_one_process_with_the_joined_batch(two_processes):
    first, second = (load_file(two_processes / f"ddp-{rank}.safetensors") for rank in (0, 1))
    alone = adapted_net(concept_probes=small_probes(), **PROBE_OPTIONS)
    start = {name: p.clone() for name, p in raw(alone).items()}
    train_alone(alone)
    for name, parameter in raw(alone).items():
        assert torch.equal(first[name], second[name])
        assert (parameter - start[name]).norm() > 1e-3, f"{name} was not trained"
        torch.testing.assert_close(first[name], parameter, atol=2e-5, rtol=1e-4)
    assert saved_leakage(two_processes / "ddp", small_net_basis()) <= FLOORS[torch.float32]


@pytest.mark.parametrize("run", ["apart", "unsent"])
def test_ddp_of_processes_that_were_seeded_apart_ends_alike_in_every_space_and_without_sending_bases(
    two_processes, run
):
    first, second = (load_file(two_processes / f"{run}-{rank}.safetensors") for rank in (0, 1))
    starts = [load_file(two_processes / f"{run}-start-{rank}.safetensors") for rank in (0, 1)]
    assert any(not torch.equal(starts[0][name], starts[1][name]) for name in first), "they were seeded alike"
    for name in first:
        assert torch.equal(first[name], second[name])
        assert (first[name] - starts[0][name]).norm() > 1e-3, f"{name} was not trained"


def test_the_probes_matter_in_the_ddp_comparison():
    # Otherwise the test above would not notice if the ranks corrected nothing.
    ends = []
    for options in ({}, {"concept_probes": small_probes(), **PROBE_OPTIONS}):
        model = adapted_net(**options)
        train_alone(model)
        ends.append(torch.cat([p.flatten() for p in raw(model).values()]))
    assert (ends[0] - ends[1]).norm() > 1e-2 * ends[0].norm()


def test_fsdp2_retracts_its_shards_and_ends_as_one_process(two_processes):
    spaces = ("input", "output", "rank")
    ended = load_file(two_processes / "fsdp-raw.safetensors")
    alone = adapted_net(spaces)
    train_alone(alone)
    for name, parameter in raw(alone).items():
        torch.testing.assert_close(ended[name], parameter, atol=2e-5, rtol=1e-4)
    plain = {name.replace(".default", ""): tensor for name, tensor in ended.items()}
    # The raw weights: it is the retraction that is tested here, not the projection of what is saved.
    assert tensors_leakage(plain, small_net_basis(spaces)) <= FLOORS[torch.float32]
    saved = load_file(two_processes / "fsdp-saved.safetensors")
    assert tensors_leakage(saved, small_net_basis(spaces)) <= FLOORS[torch.float32]


def test_probes_with_fsdp2_are_refused_on_every_rank(two_processes):
    for rank in (0, 1):
        assert "Train with DDP" in (two_processes / f"refusal-{rank}.txt").read_text()


# Going on


@pytest.mark.parametrize(
    ("make", "targets", "probes", "fit"),
    [
        (tiny_unet, UNET_TARGETS, ConceptProbes(unet_inputs(4, seed=7)), fit_noise),
        (tiny_llama, LLAMA_TARGETS, ConceptProbes({"input_ids": torch.arange(3, 11)[None]}), fit_tokens),
    ],
    ids=["diffusers", "transformers"],
)
def test_an_adapter_that_is_added_anew_from_its_folder_goes_on_with_its_probes(make, targets, probes, fit, tmp_path):
    base = make()
    config = GradProjConfig(r=4, target_modules=targets, concept_probes=probes, uncovered="ignore")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    config = GradProjConfig.from_pretrained(tmp_path, concept_probes=probes)
    assert config.inference_mode, "PEFT saves it so, and add_adapter makes the adapter trainable all the same"

    base.requires_grad_(False)
    base.add_adapter(config)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    set_peft_model_state_dict(base, {key.removeprefix("base_model.model."): value for key, value in saved.items()})
    fit(base, 9)
    report = online_projections(base)["default"].last
    assert report.step == 8
    assert report.removed_share > 0


# One process


def test_gradient_checkpointing_changes_nothing(tmp_path):
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet, basis = adapted_unet(concept_probes=unet_probes(), probe_every=2, probe_batch_size=2)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            assert any(getattr(m, "gradient_checkpointing", False) for m in unet.modules())
        unet.train()
        losses = fit_noise(unet, 4)
        assert losses[-1] < losses[0]
        ends.append(get_peft_model_state_dict(unet))
        assert tensors_leakage(ends[-1], basis) <= FLOORS[torch.float32]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, atol=1e-5, rtol=1e-4)


def kept_for_backward(run):
    """Bytes that autograd keeps of what `run` computes."""
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept)


def dropping_opt():
    """A language model whose layers ask for dropout by their own training flag."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    return OPTForCausalLM(
        OPTConfig(vocab_size=32, num_hidden_layers=4, max_position_embeddings=64, dropout=0.5, **sizes)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_probes_of_transformers_models_are_checkpointed_as_training_is_and_tell_the_same(reentrant):
    tokens = torch.randint(3, 32, (4, 32), generator=torch.Generator().manual_seed(1))
    kept, ends = {}, {}
    for checkpointing in (False, True):
        base = dropping_opt()
        probes = collect_concept_probes(base, [({"input_ids": tokens}, None)])
        options = {"concept_probes": probes, "probe_every": 1, "probe_batch_size": 4, "uncovered": "ignore"}
        model = get_peft_model(base, GradProjConfig(r=2, target_modules=["q_proj", "fc1"], **options))
        if checkpointing:
            how = {"use_reentrant": reentrant}
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            base.enable_input_require_grads()
        model.train()
        flags = {name: module.training for name, module in model.named_modules()}
        optimizer = torch.optim.SGD(trainable(model), lr=1.0)
        losses = []
        for _ in range(4):
            kept["training", checkpointing] = kept_for_backward(
                lambda model=model, losses=losses: losses.append(model(input_ids=tokens, labels=tokens).loss)
            )
            losses[-1].backward()
            kept["probes", checkpointing] = kept_for_backward(optimizer.step)
            optimizer.zero_grad()
        assert {name: module.training for name, module in model.named_modules()} == flags
        ends[checkpointing] = [torch.tensor(online_projections(model)["default"].last.drift), *raw(model).values()]
    assert kept["training", True] < 0.5 * kept["training", False]
    assert kept["probes", True] <= kept["training", True]
    assert ends[True][0] > 1e-6
    for checkpointed, plain in zip(ends[True], ends[False], strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_a_compiled_model_trains_as_an_eager_one():
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        basis = small_net_basis(("input", "output", "rank"), layers=("conv", "query"))
        base = SmallNet()
        probes = collect_concept_probes(base, [({"sample": torch.randn(4, 3, 8, 8)}, None)])
        config = GradProjConfig(
            r=4, target_modules=list(basis), concept_basis=basis, concept_probes=probes, **PROBE_OPTIONS
        )
        model = get_peft_model(base, config)
        # `aot_eager` traces forward and backward as `inductor` does, without a C++ compiler.
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses = train(called, torch.optim.AdamW(trainable(model), lr=1e-2), 10)
        assert losses[-1] < losses[0]
        ends.append(get_peft_model_state_dict(model))
        assert tensors_leakage(ends[-1], basis) <= FLOORS[torch.float32]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, atol=1e-5, rtol=1e-4)


def test_an_exponential_average_of_the_weights_keeps_the_constraint(tmp_path):
    from diffusers.training_utils import EMAModel

    basis = small_net_basis()
    model = adapted_net(concept_probes=small_probes(), **PROBE_OPTIONS)
    average = EMAModel(trainable(model), decay=0.8)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for seed in range(10):
        train(model, optimizer, 1, seed=seed)
        average.step(trainable(model))
    last = {name: p.clone() for name, p in raw(model).items()}
    average.copy_to(trainable(model))
    averaged = {name.replace(".default", ""): p for name, p in raw(model).items()}
    assert any(not torch.equal(p, last[name]) for name, p in raw(model).items())
    # Of the raw weights: an average of weights on the constraint is on it.
    assert tensors_leakage(averaged, basis) <= FLOORS[torch.float32]
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert verify_adapter(tmp_path).ok


class CoarseProducts(TorchDispatchMode):
    """Multiplies float32 matrices as a GPU with TF32 does: of each factor's mantissa, ten bits are read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            args = [(x.view(torch.int32) & -8192).view(torch.float32) for x in map(torch.Tensor.contiguous, args)]
        return func(*args, **(kwargs or {}))


def test_what_is_saved_does_not_leak_where_float32_products_are_coarse():
    basis = small_net_basis()
    model = get_peft_model(SmallNet(), GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
    with CoarseProducts(), torch.no_grad():
        assert not torch.equal(torch.eye(2) * (1 + 2**-20) @ torch.ones(2, 2), torch.ones(2, 2) * (1 + 2**-20))
        for _, module in projected_weights(model, "default"):
            module.weight.normal_()
            module.retract()
        saved = get_peft_model_state_dict(model)
    assert tensors_leakage(saved, basis) <= FLOORS[torch.float32]


# Loading into a model that already has our adapter


def saved_net(tmp_path) -> SimpleNamespace:
    basis = small_net_basis()
    base = SmallNet()
    state = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 10)
    model.save_pretrained(tmp_path)
    return SimpleNamespace(model=model, state=state, basis=basis, folder=tmp_path)


def test_a_saved_adapter_is_loaded_beside_another_by_its_own_config(tmp_path):
    saved = saved_net(tmp_path)
    pictures = torch.randn(4, 3, 8, 8)
    expected = saved.model.eval()(pictures)
    with pytest.raises(ValueError, match="different peft types"):  # PEFT's refusal: the folder says LORA
        saved.model.load_adapter(saved.folder, "again")
    saved.model.add_adapter("again", GradProjConfig.from_pretrained(saved.folder))
    saved.model.load_adapter(saved.folder, "again")
    saved.model.set_adapter("again")
    torch.testing.assert_close(saved.model.eval()(pictures), expected, atol=1e-6, rtol=1e-5)


def test_hot_swapping_is_refused_into_our_adapter_and_works_into_a_plain_one(tmp_path):
    saved = saved_net(tmp_path)
    assert saved_leakage(saved.folder, saved.basis) <= FLOORS[torch.float32]
    pictures = torch.randn(4, 3, 8, 8)
    expected = saved.model.eval()(pictures)
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap_adapter(saved.model, str(saved.folder), adapter_name="default")
    base = SmallNet()
    base.load_state_dict(saved.state)
    plain = PeftModel.from_pretrained(base, saved.folder)
    with torch.no_grad():
        for parameter in (p for n, p in plain.named_parameters() if "lora_" in n):
            parameter.zero_()
    hotswap_adapter(plain, str(saved.folder), adapter_name="default")
    torch.testing.assert_close(plain.eval()(pictures), expected, atol=1e-6, rtol=1e-5)


def test_a_mixed_model_is_refused():
    config = GradProjConfig(r=4, target_modules=["query"], concept_basis=small_net_basis())
    with pytest.raises(ValueError, match="GRADPROJ"):
        get_peft_model(SmallNet(), config, mixed=True)


def test_a_pickled_adapter_gets_no_manifest_and_says_so(tmp_path):
    model = adapted_net()
    with pytest.warns(UserWarning, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "gradproj.json").exists()


def test_an_adapter_in_several_files_gets_no_manifest_and_says_so(tmp_path):
    model = tiny_llama()
    model.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis_for(model, LLAMA_TARGETS)))
    with pytest.warns(UserWarning, match="max_shard_size"):
        model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("adapter_model-*.safetensors"))) > 1
    assert not (tmp_path / "gradproj.json").exists()
