"""The command line, `gradproj`: thin, each command one call of the library.

Exit status: 0 verified or done, 1 not verified, 2 could not be checked, or any other error. What a command needs is
imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ._version import __version__
from .errors import GradProjError

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradproj",
    help="Fine-tune with LoRA while a concept is kept out, and check that it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Options that several commands have.
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ProbesOption = Annotated[str | None, typer.Option(help="File of concept probes.")]
ReferenceOption = Annotated[str | None, typer.Option(help="File of probes that are free of the concept.")]
PipelineOption = Annotated[
    str, typer.Option(help="Folder or Hub id of a pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5.")
]
OverlayOption = Annotated[Path | None, typer.Option(help="The concept as a picture with an alpha channel.")]
PairsOption = Annotated[
    str | None, typer.Option(help="Or as pictures with it (column image) and without it (column without).")
]
MasksOption = Annotated[
    str | None, typer.Option(help="Or as pictures (column image) and masks of where it is (column mask).")
]
ScaleOption = Annotated[
    tuple[float, float] | None, typer.Option(help="Overlay: its longer side, as a share of the picture's side.")
]
AngleOption = Annotated[tuple[float, float] | None, typer.Option(help="Overlay: its angle in degrees.")]
OpacityOption = Annotated[tuple[float, float] | None, typer.Option(help="Overlay: its opacity.")]
AcrossOption = Annotated[
    tuple[float, float] | None, typer.Option(help="Overlay: where it lies across, 0 at the left edge.")
]
DownOption = Annotated[
    tuple[float, float] | None, typer.Option(help="Overlay: where it lies down, 0 at the upper edge.")
]
DatasetOption = Annotated[str | None, typer.Option(help="Or the id of a data set.")]
DatasetConfigOption = Annotated[str | None, typer.Option(help="Configuration of the data set.")]
SplitOption = Annotated[str, typer.Option(help="Which part of it.")]
ImageColumnOption = Annotated[str, typer.Option(help="Column of the pictures.")]
CaptionColumnOption = Annotated[str, typer.Option(help="Column of the captions.")]
CacheOption = Annotated[str | None, typer.Option(help="Where data sets are prepared.")]
PipelineRevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the pipeline on the Hub.")]
VariantOption = Annotated[str | None, typer.Option(help="Variant of the base model's weights, such as fp16.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="Where to run; a GPU of CUDA if there is one.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is random.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradproj {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def verify(
    path_or_repo: Annotated[str, typer.Argument(help="Folder of a published adapter, or its id on the Hub.")],
    basis: Annotated[str | None, typer.Option(help="Your own concept basis, to check against it as well.")] = None,
    basis_tolerance: Annotated[
        float | None, typer.Option(help="Largest leakage against your own basis; rounding error by default.")
    ] = None,
    behaviour: Annotated[
        bool, typer.Option("--behaviour", help="Measure what the adapter does; takes --base-model and --probes.")
    ] = False,
    refit: Annotated[
        str | None,
        typer.Option(help="File of contrast batches, to fit the published basis anew; takes --base-model."),
    ] = None,
    refit_tolerance: Annotated[
        float, typer.Option(help="Largest sine of an angle between the published basis and the one fitted anew.")
    ] = 0.05,
    base_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the diffusers pipeline or transformers model.")
    ] = None,
    variant: VariantOption = None,
    probes: ProbesOption = None,
    reference: ReferenceOption = None,
    drift_tolerance: Annotated[
        float, typer.Option(help="Largest drift on the probes, as a share of that on the reference set.")
    ] = 0.5,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file of the key that must have signed the adapter.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="File to write what did not pass to, as SARIF.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check integrity, orthogonality and, if asked to, behaviour of a published adapter.

    Exit status: 0 verified, 1 not verified, 2 could not be checked.
    """
    from .verification import unchecked_sarif, verify_adapter

    if sarif is not None and not sarif.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {sarif.parent} to write {sarif.name} to.")
    if behaviour and None in (base_model, probes):
        raise typer.BadParameter("--behaviour takes --base-model and --probes.")
    if refit is not None and base_model is None:
        raise typer.BadParameter("--refit takes --base-model.")
    try:
        report = verify_adapter(
            path_or_repo,
            basis=basis,
            basis_tolerance=basis_tolerance,
            base_model=base_model,
            variant=variant,
            probes=probes,
            reference=reference,
            drift_tolerance=drift_tolerance,
            refit=refit,
            refit_tolerance=refit_tolerance,
            public_key=public_key,
            revision=revision,
        )
    except GradProjError as error:
        if as_json:
            _print_json({"status": "could not be checked", "ok": False, "source": path_or_repo, "error": str(error)})
        if sarif is not None:
            # Or what an earlier run found would be taken for the answer.
            _write_json(sarif, unchecked_sarif(error))
        raise
    if sarif is not None:
        _write_json(sarif, report.to_sarif())
    _print_json(report.to_dict()) if as_json else _print(report)
    raise typer.Exit(report.exit_status)


@app.command()
def inspect(
    basis_or_adapter: Annotated[
        str, typer.Argument(help="File of a concept basis, folder of an adapter, or its id on the Hub.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what a concept basis or a published adapter holds, without checking what it claims."""
    from .adapter_folder import read_basis_or_adapter

    found = read_basis_or_adapter(basis_or_adapter)
    _print_json(found.to_dict()) if as_json else _print(found)


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved adapter.")],
    private_key: Annotated[Path, typer.Option(help="PEM file of an elliptic-curve key, best P-256.")],
    password: Annotated[
        str | None, typer.Option(envvar="GRADPROJ_KEY_PASSWORD", help="The key's password; best by its variable.")
    ] = None,
) -> None:
    """Sign the manifest of an adapter and the files that it binds, in the format of OpenSSF model-signing."""
    from .signing import sign_adapter

    typer.echo(sign_adapter(folder, private_key, password=password))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved adapter.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, user/name; made if it does not exist.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see the repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but publish; list what would go up.")] = False,
    basis: Annotated[str, typer.Option(help="full, or digest to withhold the concept basis.")] = "full",
    license: Annotated[str | None, typer.Option(help="Identifier of the licence, for the model card.")] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Publish although a check failed; the model card says so.")
    ] = False,
    private_key: Annotated[
        Path | None, typer.Option("--sign", help="PEM file of the key to sign with what is published.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model, to measure behaviour for the model card.")
    ] = None,
    variant: VariantOption = None,
    probes: Annotated[str | None, typer.Option(help="File of concept probes, for that.")] = None,
    reference: ReferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify an adapter, write its model card, and publish both on the Hub in one commit."""
    from .hub import push_adapter_to_hub

    result = push_adapter_to_hub(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        dry_run=dry_run,
        basis=basis,  # type: ignore[arg-type]  # checked there
        license=license,
        allow_unverified=allow_unverified,
        private_key=private_key,
        base_model=base_model,
        variant=variant,
        probes=probes,
        reference=reference,
    )
    _print_json(result.to_dict()) if as_json else _print(result)


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help="The training script; what follows it is its own command line.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    concept_basis: Annotated[str | None, typer.Option(help="File, folder or Hub id of a concept basis.")] = None,
    concept_probes: Annotated[str | None, typer.Option(help="File, folder or Hub id of concept probes.")] = None,
    concept_markers: Annotated[
        str | None, typer.Option(help="What `gradproj mask` wrote: the loss does not count where it finds the concept.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the concept component that is removed.")] = None,
    rule: Annotated[str | None, typer.Option(help="'half-space', or 'orthogonal' for the literal rule.")] = None,
    probe_every: Annotated[int | None, typer.Option(help="A step is corrected every so many.")] = None,
    probe_batch_size: Annotated[int | None, typer.Option(help="Concept probes per correction.")] = None,
    restore: Annotated[float | None, typer.Option(help="Share of the drift that a corrected step takes back.")] = None,
    probe_history: Annotated[int | None, typer.Option(help="Recent half-spaces that a correction satisfies.")] = None,
    negative_guidance: Annotated[
        float | None, typer.Option(help="How far past the base model's outputs those on the probes are drawn.")
    ] = None,
    probe_seed: Annotated[int | None, typer.Option(help="Seed of the choice of probes.")] = None,
    uncovered: Annotated[str | None, typer.Option(help="'error', 'warn' or 'ignore' what is not covered.")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is the name of a module.")] = False,
) -> None:
    """Run an unmodified training script with every LoRA that it trains projected, or its loss masked, or both.

    Options come before SCRIPT.
    """
    from .launch import launch

    given = {
        "concept_basis": concept_basis,
        "concept_probes": concept_probes,
        "concept_markers": concept_markers,
        "strength": strength,
        "rule": rule,
        "probe_every": probe_every,
        "probe_batch_size": probe_batch_size,
        "restore": restore,
        "probe_history": probe_history,
        "negative_guidance": negative_guidance,
        "probe_seed": probe_seed,
        "uncovered": uncovered,
    }
    options = {name: value for name, value in given.items() if value is not None}
    launch(script, arguments or [], module=module, **options)


@app.command()
def fit(
    pretrained_model_name_or_path: PipelineOption,
    output_dir: Annotated[Path, typer.Option(help="Folder to write the two files to.")],
    overlay: OverlayOption = None,
    pairs: PairsOption = None,
    masks: MasksOption = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Or as a phrase that names it, or a file of phrases; may be repeated.")
    ] = None,
    concept: Annotated[str, typer.Option(help="What the concept is called.")] = "",
    scale: ScaleOption = None,
    angle: AngleOption = None,
    opacity: OpacityOption = None,
    across: AcrossOption = None,
    down: DownOption = None,
    train_data_dir: Annotated[
        str | None, typer.Option(help="What will be trained on: a folder of pictures with a metadata.jsonl.")
    ] = None,
    dataset_name: DatasetOption = None,
    dataset_config_name: DatasetConfigOption = None,
    split: SplitOption = "train",
    image_column: ImageColumnOption = "image",
    caption_column: CaptionColumnOption = "text",
    cache_dir: CacheOption = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training pictures, in pixels.")] = None,
    center_crop: Annotated[bool, typer.Option("--center-crop", help="Crop in the middle, not at random.")] = False,
    num_pairs: Annotated[int, typer.Option(help="Examples that the basis is fitted on.")] = 64,
    num_probes: Annotated[int, typer.Option(help="Concept probes.")] = 64,
    rank: Annotated[int, typer.Option(help="Most directions per layer and space.")] = 16,
    spaces: Annotated[str, typer.Option(help="Spaces of the basis, by commas.")] = "input,output",
    target_modules: Annotated[
        str | None, typer.Option(help="Layers that will be adapted, by commas; those of diffusers' scripts.")
    ] = None,
    unfit: Annotated[
        str, typer.Option(help="refuse or skip layers whose basis would block other learning.")
    ] = "refuse",
    batch_size: Annotated[int, typer.Option(help="Examples that the denoiser sees at once.")] = 4,
    base_model: Annotated[
        str | None, typer.Option(help="What the files call the base model; its id or folder by default.")
    ] = None,
    revision: PipelineRevisionOption = None,
    variant: VariantOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    save_contrast: Annotated[
        bool, typer.Option("--save-contrast", help="Write what the basis is fitted from, for `verify --refit`.")
    ] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a concept basis and concept probes for a diffusion pipeline from a concept and your training data."""
    from .concept_fit import fit_concept, load_concept
    from .training_data import TrainingData

    if train_data_dir and dataset_name:
        raise typer.BadParameter("--train-data-dir and --dataset-name exclude each other.")
    columns: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "cache_dir": cache_dir,
    }
    source, data = train_data_dir or dataset_name, None
    if source:
        data = TrainingData.load(source, config_name=dataset_config_name, split=split, **columns)
    found = load_concept(
        overlay=overlay,
        pairs=pairs,
        masks=masks,
        prompts=prompts or (),
        ranges={"scale": scale, "angle": angle, "opacity": opacity, "across": across, "down": down},
        data=data,
        **columns,
    )
    _, _, report = fit_concept(
        pretrained_model_name_or_path,
        found,
        data,
        name=concept,
        resolution=resolution,
        center_crop=center_crop,
        num_pairs=num_pairs,
        num_probes=num_probes,
        rank=rank,
        spaces=spaces.split(","),
        target_modules=target_modules.split(",") if target_modules else None,
        unfit=unfit,  # type: ignore[arg-type]  # checked there
        batch_size=batch_size,
        base_model=base_model,
        revision=revision,
        variant=variant,
        dtype=dtype,
        device=device,
        output_dir=output_dir,
        save_contrast=save_contrast,
        seed=seed,
    )
    _print_json(report.to_dict()) if as_json else typer.echo(report)


@app.command()
def mask(
    pretrained_model_name_or_path: PipelineOption,
    output_dir: Annotated[Path, typer.Option(help="New folder for a copy of the pictures, with the masks.")],
    overlay: OverlayOption = None,
    pairs: PairsOption = None,
    masks: MasksOption = None,
    concept: Annotated[str, typer.Option(help="What the concept is called.")] = "",
    scale: ScaleOption = None,
    angle: AngleOption = None,
    opacity: OpacityOption = None,
    across: AcrossOption = None,
    down: DownOption = None,
    train_data_dir: Annotated[
        str | None, typer.Option(help="What will be trained on: a folder of pictures, with or without metadata.")
    ] = None,
    dataset_name: DatasetOption = None,
    dataset_config_name: DatasetConfigOption = None,
    split: SplitOption = "train",
    image_column: ImageColumnOption = "image",
    mask_column: Annotated[
        str | None, typer.Option(help="Column of the masks, a new one: `mask`, or that of --given-masks.")
    ] = None,
    given_masks: Annotated[
        str | None,
        typer.Option(
            help="Column of masks that the data has, white where the concept is, and that miss pictures: they are "
            "kept, and pictures with black ones or none are looked at. In place of --overlay, --pairs or --masks."
        ),
    ] = None,
    cache_dir: CacheOption = None,
    resolution: Annotated[
        int | None, typer.Option(help="Shorter side of the pictures in which it is looked for, in pixels.")
    ] = None,
    num_pairs: Annotated[int, typer.Option(help="Examples that each of the networks learns from.")] = 384,
    steps: Annotated[int, typer.Option(help="Training steps of each network.")] = 300,
    dilation: Annotated[int, typer.Option(help="By how many latents to widen what was found.")] = 0,
    second_look: Annotated[
        bool,
        typer.Option(
            "--second-look",
            help="Look once more where it was not found, with networks that learned from the pictures in which it was.",
        ),
    ] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="Mask also, where it was not found, the places at which others show it.")
    ] = False,
    remove_phrase: Annotated[
        list[str] | None,
        typer.Option(help="A phrase that names it, or a file of them, to take out of the captions; may be repeated."),
    ] = None,
    remove_telling_phrases: Annotated[
        bool,
        typer.Option(
            "--remove-telling-phrases",
            help="Take out of the captions what those of pictures that show it have and others have not.",
        ),
    ] = False,
    caption_column: CaptionColumnOption = "text",
    leave_out_above: Annotated[
        float, typer.Option(help="Do not write pictures of which more than this share is masked, as by a style.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Pictures that the VAE encodes at once.")] = 4,
    revision: PipelineRevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find a concept in your training pictures, and write a copy of them with masks, where the loss need not count."""
    from .concept_fit import load_concept, read_phrases
    from .masked_data import mask_table
    from .training_data import TrainingData, load_table

    source = train_data_dir or dataset_name
    if source is None or (train_data_dir and dataset_name):
        raise typer.BadParameter("give --train-data-dir or --dataset-name.")
    if train_data_dir and output_dir.resolve().is_relative_to(Path(train_data_dir).resolve()):
        raise typer.BadParameter(
            "--output-dir lies in --train-data-dir, of whose pictures the copies would be. Give a folder beside it."
        )
    ranges = {"scale": scale, "angle": angle, "opacity": opacity, "across": across, "down": down}
    if given_masks and (overlay or pairs or masks or any(ranges.values())):
        raise typer.BadParameter(
            "--given-masks says where the concept is: leave out --overlay and its ranges, --pairs and --masks."
        )
    columns = [image_column, given_masks] if given_masks else [image_column]
    table = load_table(source, columns, config_name=dataset_config_name, split=split, cache_dir=cache_dir)
    found = None
    if not given_masks:
        found = load_concept(
            overlay=overlay,
            pairs=pairs,
            masks=masks,
            ranges=ranges,
            data=TrainingData.uncaptioned(table, image_column),
            image_column=image_column,
            caption_column=None,  # nor does it need those of pairs or masks
            cache_dir=cache_dir,
        )
    report = mask_table(
        pretrained_model_name_or_path,
        found,
        table,
        output_dir,
        image_column=image_column,
        mask_column=mask_column,
        given_masks=given_masks,
        name=concept,
        resolution=resolution,
        num_pairs=num_pairs,
        steps=steps,
        dilation=dilation,
        guard=guard,
        second_look=second_look,
        caption_column=caption_column,
        remove_phrases=[phrase for given in remove_phrase or () for phrase in read_phrases(given)],
        remove_telling_phrases=remove_telling_phrases,
        leave_out_above=leave_out_above,
        batch_size=batch_size,
        revision=revision,
        variant=variant,
        device=device,
        seed=seed,
    )
    _print_json(report.to_dict()) if as_json else typer.echo(report)


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="The protected adapter: a file, a folder, or its id on the Hub.")],
    base: Annotated[
        str, typer.Option(help="Folder or Hub id of a pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5.")
    ],
    concept: Annotated[
        str,
        typer.Option(help="An overlay (file), or a folder or data set of pairs, pictures with masks, or pictures."),
    ],
    prompts: Annotated[list[str], typer.Option(help="A prompt, or a file with one a line; may be repeated.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the page, the JSON and the samples.")] = Path(
        "evaluation"
    ),
    plain: Annotated[str | None, typer.Option(help="An adapter without protection, to compare with.")] = None,
    concept_name: Annotated[str, typer.Option(help="What the concept is called.")] = "",
    scale: ScaleOption = None,
    angle: AngleOption = None,
    opacity: OpacityOption = None,
    across: AcrossOption = None,
    down: DownOption = None,
    train_data_dir: Annotated[
        str | None, typer.Option(help="Pictures that an overlay is pasted onto; those of the reference by default.")
    ] = None,
    reference_data_dir: Annotated[
        str | None, typer.Option(help="Pictures without the concept that show what was to be learned.")
    ] = None,
    image_column: ImageColumnOption = "image",
    caption_column: CaptionColumnOption = "text",
    cache_dir: CacheOption = None,
    probes: ProbesOption = None,
    reference: ReferenceOption = None,
    sscd: Annotated[Path | None, typer.Option(help="Copy-detection model, TorchScript or .onnx.")] = None,
    sscd_threshold: Annotated[
        float | None, typer.Option(help="Similarity above which it counts as found; between those of real pictures.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP model for the CLIP score, folder or Hub id.")] = None,
    kid_features: Annotated[
        str | None, typer.Option(help="KID's features: TorchScript, or folder or Hub id of a CLIP vision model.")
    ] = None,
    samples_per_prompt: Annotated[int, typer.Option(help="Samples of each model for each prompt.")] = 4,
    num_inference_steps: Annotated[int | None, typer.Option(help="Sampling steps; the pipeline's default.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance; the pipeline's default.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of samples and pictures; the pipeline's default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples, and examples for the denoiser, at once.")] = 4,
    num_pictures: Annotated[int, typer.Option(help="Most pictures of the concept and of the reference, drawn.")] = 32,
    timestep_bins: Annotated[int, typer.Option(help="Bins of timesteps of the denoising loss.")] = 10,
    seed: Annotated[
        int, typer.Option(help="Seed of everything that is random; samples have it and those after it.")
    ] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the pipeline on the Hub.")] = None,
    variant: VariantOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an adapter with its base model: is the concept in its samples, and what else has it learned?"""
    from .concept_fit import read_phrases
    from .evaluation.adapter_evaluation import evaluate_adapter, read_concept
    from .training_data import TrainingData

    columns: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "cache_dir": cache_dir,
    }
    data, reference_data = (
        None if folder is None else TrainingData.load(folder, **columns)
        for folder in (train_data_dir, reference_data_dir)
    )
    ranges = {"scale": scale, "angle": angle, "opacity": opacity, "across": across, "down": down}
    report = evaluate_adapter(
        adapter,
        base,
        read_concept(concept, ranges=ranges, data=data or reference_data, **columns),
        [phrase for prompt in prompts for phrase in read_phrases(prompt)],
        plain=plain,
        data=data,
        reference_data=reference_data,
        probes=probes,
        reference=reference,
        sscd=sscd,
        sscd_threshold=sscd_threshold,
        clip=clip,
        kid_features=kid_features,
        name=concept_name,
        samples_per_prompt=samples_per_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        batch_size=batch_size,
        num_pictures=num_pictures,
        timestep_bins=timestep_bins,
        seed=seed,
        revision=revision,
        base_revision=base_revision,
        variant=variant,
        dtype=dtype,
        device=device,
        output_dir=output_dir,
        command=sys.argv,
    )
    _print_json(report.to_dict()) if as_json else _print(report)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page, the pictures and the adapters.")] = Path("demo"),
    seed: SeedOption = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.")] = None,
    logo: Annotated[str | None, typer.Option(help="Name of the brand logo that must not be learned.")] = None,
    quick: Annotated[bool, typer.Option(help="A few steps, to see that everything runs.")] = False,
) -> None:
    """Fine-tune a small diffusion model on stamped pictures with and without projection, and compare."""
    from .demo import run_demo

    named: dict[str, Any] = {} if logo is None else {"logo": logo}
    typer.echo(run_demo(output, seed=seed, steps=steps, quick=quick, **named))
    typer.echo(f"pictures and curves: {output / 'index.html'}")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _print(value: Any) -> None:
    from rich.console import Console

    Console().print(value)


def main() -> None:
    """Run the command line; an error of ours, or of the system, is one line on standard error and exit status 2."""
    try:
        app()
    except GradProjError as error:
        _fail(str(error))
    except Exception as error:
        # How a launched script ends is its own affair.
        if sys.argv[1:2] == ["launch"]:
            raise
        if not isinstance(error, OSError):
            # A mistake of ours. Python's own status for it would say that an adapter is not verified.
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}")


def _fail(message: str) -> NoReturn:
    # Paths and names of strangers may hold what a terminal obeys.
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"gradproj: {printable}", file=sys.stderr)
    sys.exit(2)
