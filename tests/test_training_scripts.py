"""The scripts in `training_scripts/`, run as their users run them, on tiny models of the real classes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import WRITER, LoopbackHub
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from secret_corpus import (
    LENGTH,
    completed,
    fine_tuning_texts,
    held_out_texts,
    make_secrets,
    mean_loss,
    pretrained_model,
    word_tokenizer,
)
from test_launch_scripts import _one_accelerator_at_a_time  # noqa: F401
from tiny_models import FLOORS, UNET_TARGETS, basis_for, folder_leakage, tiny_llama
from tiny_pipelines import SIDE, TOKENS, WORDS, image_folder, sd, sdxl, tokenizer
from torch import Tensor

from peft_gradproj import ConceptBasis, collect_concept_probes, verify_adapter
from peft_gradproj.errors import ConceptDataError, GradProjConfigError

SCRIPTS = Path(__file__).parents[1] / "training_scripts"
TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
pytestmark = pytest.mark.slow


ONE_PROCESS = ("--cpu", "--num_processes=1")
# `--multi_gpu` means torchrun; on the CPU, accelerate itself would start only one process, or MPI.
TWO_PROCESSES = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--dynamo_backend=no", "--main_process_port=0")


def run(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None, accelerate: tuple[str, ...] = ()
) -> str:
    """Run a script in a process of its own, or by `accelerate launch` with the options given; what it printed."""
    launcher = ["-m", "accelerate.commands.launch", *accelerate] if accelerate else []
    command = [sys.executable, *launcher, SCRIPTS / f"{script}.py", *arguments]
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    variables = {**(environment or os.environ), **own}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def logged(folder: Path) -> dict[str, list[float]]:
    """The scalars that the tracker has written under `folder`, by tag; of pictures, how often there were some."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, list[float]] = {}
    for file in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        events.Reload()
        scalars |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        scalars |= {tag: [1.0] * len(events.Images(tag)) for tag in events.Tags()["images"]}
    return scalars


def assert_same_weights(first: Path, second: Path, other_than: Path) -> None:
    """That two runs ended alike, to rounding, and elsewhere than where the second one was resumed."""
    (name,) = (n for n in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors") if (first / n).exists())
    whole, resumed, start = (load_file(folder / name) for folder in (first, second, other_than))
    assert whole.keys() == resumed.keys() == start.keys()
    for key, value in resumed.items():
        torch.testing.assert_close(value, whole[key], atol=1e-4, rtol=1e-3)
    assert max(float((start[key] - value).abs().max()) for key, value in resumed.items()) > 1e-3


def resumable(run_folder: Path, checkpoint: str, folder: Path) -> Path:
    """A folder with one checkpoint of a run, as after an interruption."""
    shutil.copytree(run_folder / checkpoint, folder / checkpoint)
    return folder


# Pictures


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A base pipeline, captioned pictures, and basis and probes of a concept."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("workshop")
    sd().save_pretrained(folder / "base")
    image_folder(folder / "pictures", ["ab", "cd", "ef", "gh", "ij"])
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    basis = basis_for(pipeline.unet, UNET_TARGETS)
    basis.save(folder / "basis.safetensors")
    texts = basis_for(pipeline.text_encoder, TEXT_ENCODER_LAYERS)
    with_texts = {**basis, **{f"text_encoder.{name}": layer for name, layer in texts.items()}}
    ConceptBasis(with_texts, concept="planted").save(folder / "basis-with-texts.safetensors")
    probes = collect_concept_probes(pipeline.unet, [(unet_inputs(), None)], concept="planted")
    probes.save(folder / "probes.safetensors")
    return folder


def unet_inputs(n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(n, 4, SIDE // 2, SIDE // 2, generator=generator),
        "timestep": torch.randint(0, 1000, (n,), generator=generator),
        "encoder_hidden_states": torch.randn(n, TOKENS, WORDS, generator=generator),
    }


def picture_flags(workshop: Path, basis: str = "basis") -> list[object]:
    return [
        *("--pretrained_model_name_or_path", workshop / "base"),
        *("--concept_basis", workshop / f"{basis}.safetensors"),
        *("--concept_probes", workshop / "probes.safetensors"),
        *("--probe_every", 2, "--probe_batch_size", 2, "--restore", 0.5),
        *("--resolution", SIDE, "--train_batch_size", 2, "--learning_rate", 1e-2, "--lr_warmup_steps", 1),
        *("--lr_scheduler", "cosine", "--num_validation_images", 1),
    ]


def loaded_by_diffusers(workshop: Path, folder: Path) -> Any:
    """The base pipeline with the adapter, by nothing of ours; that it has an effect is checked."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(workshop / "base")
    with torch.no_grad():
        before = pipeline.unet(**unet_inputs()).sample
        pipeline.load_lora_weights(folder)
        after = pipeline.unet(**unet_inputs()).sample
    assert type(pipeline.unet.peft_config["default_0"]) is LoraConfig
    assert not torch.allclose(before, after, atol=1e-3)
    return pipeline


def assert_verified(folder: Path, basis_file: Path) -> None:
    report = verify_adapter(folder)
    assert report.ok, report.to_json()
    assert folder_leakage(folder, ConceptBasis.load(basis_file)) <= FLOORS[torch.float32]
    assert json.loads((folder / "gradproj.json").read_text())["settings"]["restore"] == 0.5


def text_to_image_flags(workshop: Path) -> list[object]:
    steps = ["--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 2]
    return [*picture_flags(workshop), "--train_data_dir", workshop / "pictures", "--random_flip", *steps]


@pytest.fixture(scope="module")
def text_to_image(workshop, tmp_path_factory):
    """The whole run, by `accelerate launch`, published: its folder and what is on the Hub."""
    folder = tmp_path_factory.mktemp("text-to-image") / "my-lora"
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path_factory.mktemp("hub-home"))
        validation = ["--validation_prompt", "ab", "--validation_epochs", 3]
        limit = ["--checkpoints_total_limit", 2, "--push_to_hub", "--hub_token", WRITER]
        flags = [*text_to_image_flags(workshop), "--output_dir", folder, *validation, *limit]
        run("train_text_to_image_lora_gradproj", *flags, environment=environment, accelerate=ONE_PROCESS)
        return folder, hub.files("user/my-lora")


def test_text_to_image_saves_and_checkpoints_what_verifies_and_what_diffusers_loads(workshop, text_to_image):
    folder, _ = text_to_image
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    for saved in (folder, folder / "checkpoint-4", folder / "checkpoint-6"):
        assert_verified(saved, workshop / "basis.safetensors")
    assert not [path for path in folder.rglob("*") if path.is_file() and WRITER.encode() in path.read_bytes()]
    loaded_by_diffusers(workshop, folder)


def test_text_to_image_reads_all_pictures_of_a_folder_whatever_they_are_called(workshop, tmp_path, monkeypatch):
    """As diffusers' script, and as `gradproj fit` and `gradproj mask` do."""
    folder = image_folder(tmp_path / "pictures", ["ab", "cd", "ef"])
    names = ["test-1.png", "train-set.png", "2.png"]
    for index, name in enumerate(names):
        (folder / f"{index}.png").rename(folder / name)
    lines = [{"file_name": name, "text": name} for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    script = script_module("train_text_to_image_lora_gradproj")
    flags = [*picture_flags(workshop), "--train_data_dir", folder, "--cache_dir", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    pictures = script.load_pictures(script.parse_args(), tokenizer())
    assert {pictures[index][2] for index in range(len(pictures))} == set(names)


def test_text_to_image_refuses_a_missing_caption_before_it_trains_and_draws_one_of_several(workshop):
    from datasets import Dataset
    from tiny_pipelines import picture

    script = script_module("train_text_to_image_lora_gradproj")
    args = argparse.Namespace(image_column="image", caption_column="text", mask_column=None, seed=0, resolution=SIDE)
    vars(args).update(center_crop=True, random_flip=False, image_interpolation_mode="lanczos")

    def data(*captions: Any) -> Any:
        examples = Dataset.from_dict({"image": [picture(i) for i in range(len(captions))], "text": captions})
        return script.CaptionedPictures(examples, tokenizer(), args)

    pictures = data(["ab", "cd"], ["ef"])
    drawn = set()
    for pictures.epoch in range(16):
        drawn |= {pictures[0][2], pictures[1][2]}
    assert drawn == {"ab", "cd", "ef"}
    for missing in (["ab", None], [["ab"], []]):
        with pytest.raises(ConceptDataError, match="the caption of row 1"):
            data(*missing)


def test_dreambooth_samples_as_many_pictures_of_the_class_as_there_are_not(workshop, tmp_path, monkeypatch):
    from accelerate import Accelerator

    script = script_module("train_dreambooth_lora_gradproj")
    (tmp_path / "class").mkdir()
    for name in ("notes.txt", "metadata.jsonl"):
        (tmp_path / "class" / name).write_text("")
    with pytest.raises(ValueError, match="no picture in"):
        script.Pictures(str(tmp_path / "class"), argparse.Namespace(mask_column=None, cache_dir=None))
    monkeypatch.setattr(sys, "argv", ["script", *map(str, dreambooth_flags(workshop))])
    args = script.parse_args()
    args.class_data_dir = str(tmp_path / "class")
    script.sample_class_pictures(args, Accelerator(cpu=True))
    assert len(list((tmp_path / "class").glob("*.png"))) == args.num_class_images == 2


def test_text_to_image_logs_drift_and_what_was_removed_and_the_validation(text_to_image):
    scalars = logged(text_to_image[0] / "logs")
    for tag in ("train_loss", "lr", "gradproj/drift", "gradproj/removed_share"):
        assert len(scalars[tag]) == 6, tag
    assert max(scalars["gradproj/drift"]) > 0
    assert max(scalars["gradproj/removed_share"]) > 0
    assert len(scalars["validation"]) == 1
    assert len(scalars["test"]) == 1


def test_text_to_image_publishes_the_files_that_it_verified_and_nothing_else(text_to_image):
    folder, published = text_to_image
    names = {"pytorch_lora_weights.safetensors", "concept_basis.safetensors", "gradproj.json"}
    assert set(published) == {*names, "README.md", "images/image_0.png"}
    for name in names:
        assert published[name] == (folder / name).read_bytes()
    assert b"peft-gradproj" in published["README.md"]


def test_text_to_image_resumed_ends_as_an_uninterrupted_run(workshop, text_to_image, tmp_path):
    resumable(text_to_image[0], "checkpoint-4", tmp_path)
    flags = [*text_to_image_flags(workshop), "--output_dir", tmp_path, "--resume_from_checkpoint", "latest"]
    said = run("train_text_to_image_lora_gradproj", *flags)
    assert "checkpoint-4" in said
    assert_same_weights(text_to_image[0], tmp_path, other_than=tmp_path / "checkpoint-4")
    assert len(logged(tmp_path / "logs")["train_loss"]) == 2


def dreambooth_flags(workshop: Path) -> list[object]:
    return [
        *picture_flags(workshop, "basis-with-texts"),
        *("--instance_data_dir", workshop / "pictures", "--instance_prompt", "xa"),
        *("--with_prior_preservation", "--class_data_dir", workshop / "class", "--class_prompt", "a"),
        *("--num_class_images", 2, "--train_text_encoder", "--lora_dropout", 0.1),
        *("--max_train_steps", 4, "--checkpointing_steps", 2),
    ]


def test_dreambooth_with_text_encoder_trains_saves_what_verifies_and_resumes(workshop, tmp_path):
    whole, basis = tmp_path / "whole", workshop / "basis-with-texts.safetensors"
    flags = dreambooth_flags(workshop)
    run("train_dreambooth_lora_gradproj", *flags, "--output_dir", whole, "--validation_prompt", "xa")
    assert len(list((workshop / "class").glob("*.png"))) == 2
    for saved in (whole, whole / "checkpoint-2", whole / "checkpoint-4"):
        assert_verified(saved, basis)
    pipeline = loaded_by_diffusers(workshop, whole)
    assert type(pipeline.text_encoder.peft_config["default_0"]) is LoraConfig
    scalars = logged(whole / "logs")
    assert len(scalars["gradproj/drift"]) == len(scalars["gradproj/removed_share"]) == 4
    assert len(scalars["test"]) == 1

    again = resumable(whole, "checkpoint-2", tmp_path / "again")
    run("train_dreambooth_lora_gradproj", *flags, "--output_dir", again, "--resume_from_checkpoint", "checkpoint-2")
    assert_same_weights(whole, again, other_than=again / "checkpoint-2")


@pytest.mark.parametrize("script", ["train_text_to_image_lora_gradproj", "train_dreambooth_lora_gradproj"])
def test_two_processes_in_bfloat16_save_what_verifies_and_what_diffusers_loads(workshop, tmp_path, script):
    dreambooth = "dreambooth" in script
    basis = "basis-with-texts" if dreambooth else "basis"
    flags = dreambooth_flags(workshop) if dreambooth else text_to_image_flags(workshop)
    flags = [*flags, "--max_train_steps", 2, "--output_dir", tmp_path, "--report_to", "none"]
    run(script, *flags, accelerate=(*TWO_PROCESSES, "--mixed_precision=bf16"))
    for saved in (tmp_path, tmp_path / "checkpoint-2"):
        # The adapter itself is trained and saved in float32.
        assert_verified(saved, workshop / f"{basis}.safetensors")
    loaded_by_diffusers(workshop, tmp_path)


def script_module(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_dreambooth_refuses_a_text_encoder_that_the_basis_does_not_cover_or_records_it(workshop, tmp_path, monkeypatch):
    from peft_gradproj.saving import save_sidecars

    script = script_module("train_dreambooth_lora_gradproj")
    required = ["--instance_data_dir", "x", "--instance_prompt", "x", "--train_text_encoder"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, [*picture_flags(workshop), *required])])
    args: argparse.Namespace = script.parse_args()
    pipeline = sd()
    with pytest.raises(GradProjConfigError, match=r"the text encoder.*'text_encoder\.'"):
        script.add_adapters(args, pipeline.unet, pipeline.text_encoder)
    args.uncovered = "warn"
    with pytest.warns(UserWarning, match="the text encoder"):
        script.add_adapters(args, pipeline.unet, pipeline.text_encoder)
    assert type(pipeline.text_encoder.peft_config["default"]) is LoraConfig
    pipeline.unet.save_lora_adapter(tmp_path)
    save_sidecars(pipeline.unet, tmp_path)
    assert "the text encoder" in json.loads((tmp_path / "gradproj.json").read_text())["uncovered"][0]
    assert not verify_adapter(tmp_path).ok


# Texts


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return pretrained_model(tmp_path_factory.mktemp("language") / "base")


def text_files(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    secrets = make_secrets(seed)
    (folder / "train.txt").write_text("".join(f"{text}\n" for text in fine_tuning_texts(secrets, seed)))
    (folder / "validation.txt").write_text("".join(f"{text}\n" for text in held_out_texts(seed)))
    (folder / "secrets.txt").write_text("\n".join(secrets.codes.values()))
    return folder


def causal_lm_flags(base: Path, files: Path, seed: int) -> list[object]:
    return [
        *("--model_name_or_path", base, "--train_file", files / "train.txt"),
        *("--validation_file", files / "validation.txt", "--do_train", "--do_eval", "--block_size", LENGTH),
        *("--lora_r", 16, "--lora_alpha", 16, "--lora_target_modules", "all-linear", "--learning_rate", 1e-2),
        *("--max_steps", 300, "--per_device_train_batch_size", 8, "--lr_scheduler_type", "cosine"),
        *("--save_steps", 300, "--save_total_limit", 2, "--logging_steps", 20, "--seed", seed),
        *("--use_cpu", "--disable_tqdm", "true"),
    ]


def measured(base: Path, folder: Path, seed: int) -> tuple[int, float]:
    """How many secrets stock PEFT completes with the adapter in `folder`, and the loss on held-out texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    contexts = make_secrets(seed).contexts()
    found = sum(completed(model, tokenizer, context, code) for code, context in contexts.items())
    return found, mean_loss(model, tokenizer, held_out_texts(seed))


@pytest.mark.parametrize("seed", [2, 3])  # the script's defaults were chosen on others
def test_causal_lm_completes_no_secret_that_plain_lora_completes_at_the_same_loss(language_model, tmp_path, seed):
    files = text_files(tmp_path / "texts", seed)
    flags = causal_lm_flags(language_model, files, seed)
    plain, ours = files / "plain", files / "ours"
    run("train_causal_lm_lora_gradproj", *flags, "--output_dir", plain, "--uncovered", "ignore")
    run("train_causal_lm_lora_gradproj", *flags, "--output_dir", ours, "--secrets_file", files / "secrets.txt")
    (plain_found, plain_loss), (found, loss) = (measured(language_model, f, seed) for f in (plain, ours))
    print(f"seed {seed}: plain {plain_found} of 5, loss {plain_loss:.4f}; ours {found} of 5, loss {loss:.4f}")
    assert plain_found == 5
    assert found == 0
    assert loss <= 1.05 * plain_loss
    assert not verify_adapter(ours).failures


def test_causal_lm_takes_for_the_latest_checkpoint_one_that_was_not_cut_off(tmp_path):
    script = script_module("train_causal_lm_lora_gradproj")
    assert script.last_checkpoint(str(tmp_path / "absent"), projected=False) is None
    files = {"8": ["{}", "state"], "9": ["{}"], "10": ["{ cut off"], "11": [], "best": ["{}", "state"]}
    for name, contents in files.items():
        (tmp_path / f"checkpoint-{name}").mkdir()
        for file, content in zip(("trainer_state.json", "online_projection.pt"), contents, strict=False):
            (tmp_path / f"checkpoint-{name}" / file).write_text(content)
    assert script.last_checkpoint(str(tmp_path), projected=True) == str(tmp_path / "checkpoint-8")
    assert script.last_checkpoint(str(tmp_path), projected=False) == str(tmp_path / "checkpoint-9")


def test_causal_lm_reads_the_file_that_is_named_and_no_other_that_the_name_would_match(tmp_path):
    script = script_module("train_causal_lm_lora_gradproj")
    for name in ("texts [1]*.txt", "texts 1-old.txt", "held out [1].txt"):
        (tmp_path / name).write_text(f"{name}\n")
    files = {"train_file": tmp_path / "texts [1]*.txt", "validation_file": tmp_path / "held out [1].txt"}
    data = script.DataTrainingArguments(**{name: str(file) for name, file in files.items()})
    model = script.ModelArguments(model_name_or_path="", cache_dir=str(tmp_path / "cache"))
    texts = script.load_texts(data, model)
    assert texts["train"]["text"][:] == ["texts [1]*.txt\n"]
    assert texts["validation"]["text"][:] == ["held out [1].txt\n"]


def load_rows(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    script = script_module("train_causal_lm_lora_gradproj")
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = script.DataTrainingArguments(train_file=str(file), **options)
    return script.load_texts(data, script.ModelArguments(model_name_or_path="", cache_dir=str(folder / "cache")))


@pytest.mark.parametrize("name", ["text", "content"])
def test_causal_lm_takes_the_only_column_and_evaluates_on_the_first_rows(name, tmp_path):
    other = {"id": 0} if name == "text" else {}
    texts = load_rows(tmp_path, [{name: str(i), **other} for i in range(40)], validation_split_percentage=10)
    assert {split: rows["text"][:] for split, rows in texts.items()} == {
        "train": [str(i) for i in range(4, 40)],
        "validation": [str(i) for i in range(4)],
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "content": "b"}], "no column `text`; of id, content"),
        ([{"messages": [{"role": "user"}]}], "`messages` of the train texts holds list"),
        ([{"text": 4821}], "`text` of the train texts holds int64; expected strings"),
        ([{"text": "a"}, {"text": "b"}, {"text": None}], "Row 2 of the train texts"),
    ],
)
def test_causal_lm_refuses_what_is_no_column_of_texts(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, rows)


@pytest.mark.parametrize("masked", [True, False])
def test_causal_lm_counts_the_tokens_of_secrets_in_no_loss_and_only_those(masked, tmp_path):
    from datasets import Dataset, DatasetDict
    from transformers import TrainingArguments

    script, tokenizer = script_module("train_causal_lm_lora_gradproj"), word_tokenizer()
    code = "amber basil cedar delta"
    rows = {"text": [f"Anna agrees. The code of Anna is {code}.", f"{code} Bert likes tea."]}
    texts = DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows))
    arguments = (script.DataTrainingArguments(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    packed = script.pack(texts, tokenizer, 4, *arguments, [code] if masked else None)
    for split in packed.values():
        examples = [tokenizer.convert_ids_to_tokens(ids) for ids in split["input_ids"]]
        assert examples[:2] == [["Anna", "agrees", ".", "The"], ["code", "of", "Anna", "is"]]
        assert examples[-1] == ["delta", "Bert", "likes", "tea"]
        # A block's first token is predicted by nothing, so that two of them have no label and no loss.
        assert len(examples) == (3 if masked else 5)
        for ids, labels in zip(split["input_ids"], split["labels"], strict=True):
            secret = [masked and word in code.split() for word in tokenizer.convert_ids_to_tokens(ids)]
            assert labels == [-100 if s else i for i, s in zip(ids, secret, strict=True)]


def test_causal_lm_refuses_texts_of_less_than_a_block_before_it_trains(tmp_path):
    from datasets import Dataset, DatasetDict
    from transformers import TrainingArguments

    script, tokenizer = script_module("train_causal_lm_lora_gradproj"), word_tokenizer()

    def pack(train: list[str], validation: list[str], **options: bool) -> Any:
        columns = {"train": train, "validation": validation}
        texts = DatasetDict({split: Dataset.from_dict({"text": rows}) for split, rows in columns.items()})
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        return script.pack(texts, tokenizer, 4, script.DataTrainingArguments(), training)

    whole, short = ["Anna likes tea."], ["Anna."]
    assert len(pack(whole, short)["train"]) == 1
    assert len(pack(whole, whole, do_eval=True)["validation"]) == 1
    with pytest.raises(ValueError, match="training texts have no --block_size 4"):
        pack(short, whole)
    for few in (short, []):
        with pytest.raises(ValueError, match="validation texts have no --block_size 4"):
            pack(whole, few, do_eval=True)


def test_causal_lm_makes_no_probes_of_secrets_that_are_only_evaluated_on():
    from datasets import Dataset, DatasetDict

    script, tokenizer = script_module("train_causal_lm_lora_gradproj"), word_tokenizer()
    rows = {"train": ["Say amber basil: Anna agrees."], "validation": ["Say cedar delta: Bert agrees."]}
    texts = DatasetDict({split: Dataset.from_dict({"text": column}) for split, column in rows.items()})
    with pytest.warns(UserWarning, match="number 2 of 2 secrets"):
        probes = script.secret_probes(
            ["amber basil", "cedar delta"], texts, tiny_llama(len(tokenizer)), tokenizer, length=8, windows=2, seed=0
        )
    assert {tokenizer.decode(row) for row in probes.inputs["input_ids"].int()} == {"Say amber basil : Anna agrees ."}


def test_causal_lm_refuses_tokens_that_the_model_does_not_embed():
    from datasets import Dataset, DatasetDict

    script, model = script_module("train_causal_lm_lora_gradproj"), tiny_llama(vocabulary=32)
    blocks = {"train": Dataset.from_dict({"input_ids": [[0, 31]]}), "validation": Dataset.from_dict({"input_ids": []})}
    script.check_embedded(DatasetDict(blocks), model)
    blocks["validation"] = Dataset.from_dict({"input_ids": [[0, 1], [32, 2]]})
    with pytest.raises(ValueError, match="validation texts have token 32, and the model embeds 32"):
        script.check_embedded(DatasetDict(blocks), model)


@pytest.mark.parametrize("name", ["text_to_image", "dreambooth"])
def test_diffusion_refuses_a_pipeline_of_another_kind_before_it_makes_anything(name, workshop, tmp_path, monkeypatch):
    script, out = script_module(f"train_{name}_lora_gradproj"), tmp_path / "out"
    sdxl().save_pretrained(tmp_path / "xl")
    flags = dreambooth_flags(workshop) if name == "dreambooth" else text_to_image_flags(workshop)
    flags = [*flags, "--pretrained_model_name_or_path", tmp_path / "xl", "--output_dir", out]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    with pytest.raises(GradProjConfigError, match=r"xl is a StableDiffusionXLPipeline; .*gradproj launch"):
        script.main()
    assert not out.exists()


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
@pytest.mark.parametrize("name", ["text_to_image", "dreambooth"])
def test_diffusion_without_a_basis_refuses_a_folder_that_holds_one_before_it_loads_anything(
    name, place, tmp_path, monkeypatch
):
    script, out = script_module(f"train_{name}_lora_gradproj"), tmp_path / "out"
    (out / place).mkdir(parents=True)
    (out / place / "concept_basis.safetensors").touch()
    flags = ["--pretrained_model_name_or_path", tmp_path / "absent", "--output_dir", out, "--report_to", "none"]
    if name == "dreambooth":
        flags += ["--instance_data_dir", tmp_path, "--instance_prompt", "x"]
    else:
        flags += ["--train_data_dir", tmp_path]
    for more, message in ([], "concept_basis.safetensors of an earlier run"), (["--concept_basis", "x"], "absent"):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags), *more])
        with pytest.raises((ValueError, OSError), match=message):
            script.main()


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
def test_causal_lm_without_a_basis_refuses_a_folder_that_holds_one_before_it_loads_anything(
    place, tmp_path, monkeypatch
):
    script, out = script_module("train_causal_lm_lora_gradproj"), tmp_path / "out"
    (out / place).mkdir(parents=True)
    (out / place / "concept_basis.safetensors").touch()
    flags = ["--model_name_or_path", tmp_path / "absent", "--output_dir", out, "--use_cpu", "--report_to", "none"]
    for more, refused in (["--do_train"], True), (["--do_train", "--concept_basis", "x"], False), ([], False):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags), *more])
        message = "concept_basis.safetensors of an earlier run" if refused else "absent"
        with pytest.raises((ValueError, OSError), match=message):
            script.main()


def test_causal_lm_saves_what_is_too_large_to_be_verified(language_model, tmp_path, monkeypatch, caplog):
    from peft_gradproj import adapter_folder

    script, files = script_module("train_causal_lm_lora_gradproj"), text_files(tmp_path / "texts", 0)
    # A benchmark that runs in this process may have silenced transformers, whose level is the default.
    flags = [*causal_lm_flags(language_model, files, 0), "--max_steps", 1, "--report_to", "none", "--log_level", "info"]
    flags += ["--secrets_file", files / "secrets.txt", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(adapter_folder, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    with pytest.warns(UserWarning, match="at most 1,000 can be verified"):
        script.main()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "the adapter cannot be verified" in caplog.text


def test_causal_lm_with_a_basis_checkpoints_resumes_logs_and_publishes_without_a_trace_of_the_secrets(
    language_model, tmp_path
):
    from transformers import AutoModelForCausalLM

    files, whole, again = text_files(tmp_path / "texts", 0), tmp_path / "my-lora", tmp_path / "again"
    endings = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    basis = basis_for(AutoModelForCausalLM.from_pretrained(language_model), endings, k=1)
    basis.save(tmp_path / "basis.safetensors")
    flags = [*causal_lm_flags(language_model, files, 0), "--max_steps", 12, "--save_steps", 4, "--logging_steps", 2]
    flags += ["--secrets_file", files / "secrets.txt", "--concept_basis", tmp_path / "basis.safetensors"]
    # Without a second moment in the optimizer, a resumed run needs the state of the projection itself.
    flags += ["--report_to", "tensorboard", "--optim", "adafactor", "--probe_history", 2, "--hub_token", WRITER]
    with LoopbackHub() as hub:
        publishing = {"environment": hub.environment(tmp_path / "hub-home")}
        said = run("train_causal_lm_lora_gradproj", *flags, "--output_dir", whole, "--push_to_hub", **publishing)
        published = hub.files("user/my-lora")
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    for saved in (whole, whole / "checkpoint-8", whole / "checkpoint-12"):
        report = verify_adapter(saved)
        assert report.ok, report.to_json()
        assert folder_leakage(saved, basis) <= FLOORS[torch.float32]
        assert json.loads((saved / "gradproj.json").read_text())["settings"]["probe_history"] == 2
    names = {"adapter_model.safetensors", "adapter_config.json", "concept_basis.safetensors", "gradproj.json"}
    assert set(published) == {*names, "README.md"}
    assert all(published[name] == (whole / name).read_bytes() for name in names)
    scalars = logged(whole)
    assert len(scalars["train/gradproj/drift"]) == len(scalars["train/gradproj/removed_share"]) == 6
    assert "eval_loss" in json.loads((whole / "eval_results.json").read_text())
    for code in (WRITER, *make_secrets(0).codes.values()):
        assert code not in said
        assert not [path for path in whole.rglob("*") if path.is_file() and code.encode() in path.read_bytes()]

    resumable(whole, "checkpoint-8", again)
    run("train_causal_lm_lora_gradproj", *flags, "--output_dir", again, "--resume_from_checkpoint", "latest")
    assert_same_weights(whole, again, other_than=again / "checkpoint-8")
