"""A basis or probes of another model are refused: by names of layers, by widths, and by the model's own name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from conftest import SmallNet
from tiny_models import LLAMA_TARGETS, UNET_TARGETS, basis_for, tiny_llama, tiny_unet, unet_inputs
from torch import nn

from peft_gradproj import ConceptBasis, ConceptProbes, GradProjConfig, collect_concept_probes, fit_concept_basis
from peft_gradproj.base_models import BaseModel, identify, layer_widths, names_conflict
from peft_gradproj.errors import ConceptBasisError, ConceptDataError, GradProjConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def named(model: nn.Module, name: str) -> nn.Module:
    model.register_to_config(_name_or_path=name)
    return model


def probes_of(unet: nn.Module, **options: object) -> ConceptProbes:
    return collect_concept_probes(unet, [(unet_inputs(2), None)], **options)


def config(**given: object) -> GradProjConfig:
    return GradProjConfig(r=4, target_modules=UNET_TARGETS, **given)


def refused(unet: nn.Module, error: type[Exception], message: str, **given: object) -> None:
    with pytest.raises(error, match=message):
        unet.add_adapter(config(**given))
    assert not any("lora" in name for name, _ in unet.named_parameters())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("/data/sd15/unet", ("/data/sd15/unet", None)),
        (f"/cache/hub/models--org--my-name/snapshots/{COMMIT}/unet", ("org/my-name", COMMIT)),
        ("", (None, None)),
    ],
)
def test_the_name_of_a_model_from_the_hubs_cache_is_its_id(path, expected):
    assert identify(named(tiny_unet(), path)) == BaseModel(*expected)


def test_transformers_models_are_named_as_well():
    model = tiny_llama()
    model.name_or_path = "org/llama"
    assert identify(model).name == "org/llama"


def test_only_two_different_hub_ids_conflict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "folder").mkdir(parents=True)
    model = named(tiny_unet(), "org/name")
    assert names_conflict("org/other", model) == "org/name"
    for name in ("org/name", None, "/data/other", "other", "./other", "local/folder"):
        assert names_conflict(name, model) is None, name
    assert names_conflict("org/other", named(tiny_unet(), "/data/sd")) is None


def test_widths_are_those_of_the_base_whatever_is_injected():
    from peft import LoraConfig, get_peft_model

    unet = tiny_unet()
    widths = layer_widths(unet)
    assert widths["conv_in"] == (4 * 9, 8)
    assert widths["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == (12, 16)
    unet.add_adapter(LoraConfig(r=2, target_modules=UNET_TARGETS))
    assert layer_widths(unet) == widths
    llama = tiny_llama()
    bare = layer_widths(llama)
    assert layer_widths(get_peft_model(llama, LoraConfig(r=2, target_modules=LLAMA_TARGETS))) == bare


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_basis_and_probes_that_were_made_on_a_wrapped_model_are_those_of_the_model(wrap, adapted):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with_it = [{"sample": torch.randn(2, 3, 8, 8)} for _ in range(3)]
    without = [{"sample": batch["sample"] * torch.tensor([0.0, 1, 1])[:, None, None]} for batch in with_it]
    base, layers = SmallNet(), ["conv", "query"]
    if adapted:
        get_peft_model(base, LoraConfig(r=2, target_modules=["key"]))
    made = []
    for model in (base, wrap(base)):
        fitted = fit_concept_basis(model, with_it, without, target_modules=layers, rank=1, progress=False)
        made.append((fitted, collect_concept_probes(model, [(with_it[0], None)])))
    (basis, probes), (of_wrapped, probes_of_wrapped) = made
    assert list(of_wrapped) == layers
    assert (of_wrapped, of_wrapped.fit) == (basis, basis.fit)
    assert (probes_of_wrapped, probes_of_wrapped.widths) == (probes, probes.widths)
    given = {"concept_basis": of_wrapped, "concept_probes": probes_of_wrapped}
    model = SmallNet()
    with pytest.raises(GradProjConfigError, match="has the wrapper's names"):
        get_peft_model(wrap(model), GradProjConfig(r=2, target_modules=layers, **given))
    assert not any("lora" in name for name, _ in model.named_parameters())
    get_peft_model(model, GradProjConfig(r=2, target_modules=layers, **given))


def test_probes_know_the_widths_and_keep_them_in_their_file(tmp_path):
    unet = named(tiny_unet(), f"/hub/models--org--name/snapshots/{COMMIT}/unet")
    probes = probes_of(unet)
    assert (probes.base_model, probes.revision, probes.widths) == ("org/name", COMMIT, layer_widths(unet))
    loaded = ConceptProbes.load(probes.save(tmp_path / "probes.safetensors"))
    assert loaded.widths == probes.widths
    assert loaded.select([0]).widths == probes.widths
    assert ConceptProbes(probes.inputs).widths is None


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ("no json", "not valid JSON"),
        ("[1]", "not pairs"),
        ('{"a": 3}', "not pairs"),
        ('{"a": [1, "2"]}', "not pairs"),
        ('{"a": [1]}', "not pairs"),
        ("[" * 100_000, "nests more than"),
    ],
)
def test_malformed_widths_in_a_file_are_refused(tmp_path, widths, message):
    from safetensors.torch import save_file

    file = tmp_path / "probes.safetensors"
    save_file({"inputs.sample": torch.zeros(1, 2)}, file, metadata={"format_version": "1", "widths": widths})
    with pytest.raises(ConceptDataError, match=f"widths .*{message}"):
        ConceptProbes.load(file)


def test_probes_of_another_architecture_are_refused_before_anything_is_injected():
    from diffusers import UNet2DConditionModel

    wide = UNet2DConditionModel.from_config({**tiny_unet().config, "block_out_channels": (8, 24)})
    alien = collect_concept_probes(nn.Sequential(nn.Linear(4, 4)), [({"input": torch.zeros(1, 4)}, None)])
    cases = [
        (probes_of(wide), "maps 16 to 16, and in the model of the concept probes 24 to 24"),
        (alien, "has none of the adapted layers"),
        (ConceptProbes({"pixels": torch.zeros(1, 4)}), "takes no pixels"),
    ]
    for probes, message in cases:
        refused(tiny_unet(), ConceptDataError, message, concept_probes=probes)
    tiny_unet().add_adapter(config(concept_probes=probes_of(tiny_unet())))


def test_a_basis_of_other_widths_is_refused_before_anything_is_injected():
    from diffusers import UNet2DConditionModel

    wide = UNet2DConditionModel.from_config({**tiny_unet().config, "block_out_channels": (8, 24)})
    for space in ("input", "output"):
        basis = basis_for(wide, UNET_TARGETS, spaces=(space,))
        message = f"{space} basis has width 24, but the layer needs 16"
        refused(tiny_unet(), ConceptBasisError, message, concept_basis=basis)


@pytest.mark.parametrize("kind", ["basis", "probes"])
def test_a_basis_or_probes_of_another_repository_are_refused_or_recorded(kind):
    def made(unet: nn.Module, name: str) -> dict[str, object]:
        if kind == "probes":
            return {"concept_probes": probes_of(unet, base_model=name)}
        return {"concept_basis": ConceptBasis(basis_for(unet, UNET_TARGETS), base_model=name)}

    error = ConceptDataError if kind == "probes" else ConceptBasisError
    unet = named(tiny_unet(), "org/name")
    message = f"concept {kind} is of the base model org/other, and this one is org/name"
    refused(unet, error, message, **made(unet, "org/other"))
    unet = named(tiny_unet(), "org/name")
    lenient = config(**made(unet, "org/other"), uncovered="warn")
    with pytest.warns(UserWarning, match=r"the whole adapter \(the concept .* is of org/other"):
        unet.add_adapter(lenient)
    assert any("org/other" in part for part in unet.peft_config["default"].uncovered_parts)
    assert json.dumps(unet.peft_config["default"].uncovered_parts)
    same = named(tiny_unet(), f"/hub/models--org--name/snapshots/{COMMIT}/unet")
    same.add_adapter(config(**made(same, "org/name")))
