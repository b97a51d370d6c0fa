"""Publishing an adapter on the Hub: what was checked goes up, in one commit, and nothing else.

The published files are copied out of the user's folder first. The copy is verified, gets its model card, and is what
is uploaded, so that what goes up is what was checked whatever happens to the folder meanwhile; the folder stays as it
is. Everything is made and judged before the first request that changes anything, and one commit holds it all: a
failure leaves the repository as it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ._version import __version__
from .adapter_folder import (
    BASIS_NAME,
    MANIFEST_NAME,
    PUBLISHED_FILES,
    SIGNATURE_NAME,
    WEIGHT_NAMES,
    read_adapter_folder,
    rival_weights,
    size_limit,
)
from .errors import AdapterFolderError, HubError
from .hub_errors import hub_errors
from .model_card import CARD_NAME, is_unfilled, read_model_card, with_metadata, write_model_card
from .signing import sign_adapter
from .untrusted import MAX_FILE_BYTES, printable, read_file
from .verification import VerificationReport, verify_adapter

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelInfo
    from torch import nn

    from .probes import ConceptProbes

__all__ = ["PublishResult", "push_adapter_to_hub"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_MESSAGE = "Upload a LoRA adapter with peft-gradproj"

_NOTHING_DONE = "Nothing was published."
_ALL_OR_NOTHING = (
    "All of it was committed, or nothing: publish again to be sure, which commits nothing that is there already."
)


@dataclass(frozen=True)
class PublishResult:
    """What was published, or would be."""

    repo_id: str
    files: dict[str, int]
    """Size in bytes of each file, by its path in the repository."""

    report: VerificationReport
    """What verification found in the files before they went up."""

    commit: str | None = None
    """The commit that holds them; `None` for a dry run."""

    url: str | None = None
    """Where the commit, or the pull request, can be seen."""

    removed: tuple[str, ...] = ()
    """Files of the former publication that the commit removes."""

    @property
    def dry_run(self) -> bool:
        """Whether nothing was published."""
        return self.commit is None

    def to_dict(self) -> dict[str, Any]:
        """The result, JSON-able."""
        return {
            "repo_id": self.repo_id,
            "dry_run": self.dry_run,
            "commit": self.commit,
            "url": self.url,
            "files": self.files,
            "removed": list(self.removed),
            "report": self.report.to_dict(),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("file", "bytes", title_justify="left")
        for name, size in self.files.items():
            table.add_row(Text(printable(name)), Text(f"{size:,}", justify="right"))
        for name in self.removed:
            table.add_row(Text(printable(name)), Text("removed", justify="right"))
        done = f"published: {self.url}" if not self.dry_run else f"dry run: {self.repo_id} was left as it is"
        return Group(table, Text(f"checks: {self.report.status}"), Text(printable(done)))


def push_adapter_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    basis: Literal["full", "digest"] = "full",
    dry_run: bool = False,
    card: bool = True,
    license: str | None = None,
    images: Sequence[tuple[str, str | os.PathLike[str]]] = (),
    allow_unverified: bool = False,
    private_key: str | os.PathLike[str] | None = None,
    base_model: nn.Module | str | os.PathLike[str] | None = None,
    variant: str | None = None,
    probes: ConceptProbes | str | os.PathLike[str] | None = None,
    reference: ConceptProbes | str | os.PathLike[str] | None = None,
) -> PublishResult:
    """Publish a saved adapter: verify it, write its model card, and commit exactly the published files.

    Files of an earlier publication that do not belong to this one, such as a basis that is withheld from now on, are
    removed by the same commit; they stay in the repository's history. Publishing the same adapter again commits
    nothing.

    Args:
        folder: The adapter with its manifest, in PEFT's or diffusers' layout. It is not changed.
        repo_id: `user/name`; made if it does not exist.
        private: Whether the repository is to be private; as the account has it by default if `None`.
        revision: Branch to commit to, made if it does not exist; `main` if `None`.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Title of the commit.
        token: A token of the Hub; the one that is logged in with if `None`.
        basis: `digest` withholds the concept basis, of which the manifest then holds the digest. A verifier brings
            his own.
        dry_run: Do all but publish. No request is made, so that a model card on the Hub is not looked at.
        card: Whether to write the model card. The text of a card in the folder is kept; where there is none, or an
            empty template, that of the card on the Hub.
        license: Identifier of the licence for the card.
        images: Pairs of a prompt and the file of a picture that was sampled with it, to be published with the card.
        allow_unverified: Publish although a check failed; the card says so.
        private_key: PEM file of the key to sign with what is published; one without password.
        base_model: The base model, to measure behaviour for the card; like the next three as in :func:`verify_adapter`.
        variant: Of its weights.
        probes: Concept probes.
        reference: Probes that are free of the concept.

    Returns:
        The files, the report, and the commit unless it was a dry run.

    Raises:
        AdapterFolderError: If the folder is no published adapter, or a check fails.
        HubError: If the Hub refuses, or cannot be reached.
        SignatureError: If the key cannot be used.
        BehaviourError: If behaviour cannot be measured.
        ConceptDataError: If there are no such probes.
    """
    if basis not in ("full", "digest"):
        raise AdapterFolderError(f"basis is {basis!r}; expected 'full' or 'digest'.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise HubError(f"{repo_id!r} is no name of a repository; expected 'user/name'.")
    with TemporaryDirectory(prefix="gradproj-") as temporary:
        stage = Path(temporary)
        names = [name for name in PUBLISHED_FILES if private_key is None or name != SIGNATURE_NAME]
        report = _stage(
            *(Path(folder), stage, names),
            withhold=basis == "digest",
            allow_unverified=allow_unverified,
            behaviour={"base_model": base_model, "variant": variant, "probes": probes, "reference": reference},
        )
        if private_key is not None:
            sign_adapter(stage, private_key)
        own_card = read_model_card(stage)
        details: dict[str, Any] = {"repo_id": repo_id, "license": license, "images": _stage_images(images, stage)}
        if card:
            write_model_card(stage, report, **details)
        staged = _sizes(stage)
        if dry_run:
            return PublishResult(repo_id, staged, report)
        api, there = _prepare_repository(repo_id, token, private, revision, create_pr, staged)
        stale = _stale(staged, there)
        if card and is_unfilled(own_card):
            _write_onto_card(stage, report, own_card, _card_on_hub(api, repo_id, there), **details)
        commit = _commit(api, stage, repo_id, there, stale, revision, create_pr, commit_message or DEFAULT_MESSAGE)
        url = str(commit.pr_url or commit.commit_url)
        return PublishResult(repo_id, _sizes(stage), report, commit.oid, url, tuple(stale))


# The stage: a copy of what is published


def _stage(
    folder: Path,
    stage: Path,
    names: Sequence[str],
    *,
    withhold: bool,
    allow_unverified: bool,
    behaviour: Mapping[str, Any],
) -> VerificationReport:
    """Copy the files `names`, verify the copy, and withhold the basis if so asked."""
    if not folder.is_dir():
        raise AdapterFolderError(f"{folder} is not a folder; expected the folder of a saved adapter.")
    for name in names:
        if os.path.lexists(folder / name):
            (stage / name).write_bytes(read_file(folder, name, limit=size_limit(name)).data)
    try:
        report = replace(verify_adapter(stage, **behaviour), source=str(folder))
    except AdapterFolderError as error:
        raise AdapterFolderError(str(error).replace(str(stage), str(folder))) from error
    if report.failures and not allow_unverified:
        raise AdapterFolderError(_refusal(folder, report))
    if withhold:
        _withhold_basis(folder, stage)
    return report


def _refusal(folder: Path, report: VerificationReport) -> str:
    found = [f"{check.name}{f' ({check.layer})' if check.layer else ''}: {check.detail}" for check in report.failures]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return (
        f"{folder} does not verify, so it is not published. What failed: {'; '.join(found[:5])}{more}. Mend it and "
        "save again, or publish it all the same with allow_unverified, which the model card will say."
    )


def _withhold_basis(folder: Path, stage: Path) -> None:
    """Take the basis out of the staged files, and leave its digest in the manifest."""
    manifest = read_adapter_folder(stage).manifest
    if manifest["basis"]["published"] != "full":
        return
    if (stage / SIGNATURE_NAME).exists():
        raise AdapterFolderError(
            f"{folder} is signed with its concept basis, and withholding it would break the signature. Remove "
            f"{SIGNATURE_NAME} and publish, or give the private key to sign anew."
        )
    (stage / BASIS_NAME).unlink()
    manifest["files"].pop(BASIS_NAME)
    manifest["basis"]["published"] = "digest"
    (stage / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _stage_images(images: Sequence[tuple[str, str | os.PathLike[str]]], stage: Path) -> list[tuple[str, str]]:
    """Copy the pictures; their prompts and paths in the repository."""
    result = []
    for prompt, path in images:
        source = Path(path).resolve()
        if source.suffix.lower() not in IMAGE_SUFFIXES:
            raise AdapterFolderError(f"{path} is no picture; expected a file {', '.join(IMAGE_SUFFIXES)}.")
        target = stage / "images" / source.name
        if target.exists():
            raise AdapterFolderError(f"two pictures are called {source.name}; rename one.")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(read_file(source.parent, source.name, limit=MAX_FILE_BYTES).data)
        result.append((prompt, f"images/{source.name}"))
    return result


def _sizes(stage: Path) -> dict[str, int]:
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    return {path.relative_to(stage).as_posix(): path.stat().st_size for path in files}


# The Hub


def _prepare_repository(
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    staged: Collection[str],
) -> tuple[HfApi, ModelInfo]:
    """Make the repository and the branch where they are missing; what is there now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    with hub_errors(repo_id, "preparing", consequence=_NOTHING_DONE):
        api = HfApi(token=token, library_name="peft-gradproj", library_version=__version__)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and bool(api.model_info(repo_id).private) != private:
            raise HubError(
                f"{repo_id} exists and is {'public' if private else 'private'}, so it was left as it is. Change that "
                "in its settings on the Hub first, or publish without saying which it is to be."
            )
        try:
            there = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if create_pr or revision is None or revision.startswith("refs/"):
                raise
            # Nothing is made before it is known that the publication can be: the branch starts with what main holds.
            _refuse_rivals(repo_id, api.model_info(repo_id), staged)
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = api.model_info(repo_id, revision=revision)
    _refuse_rivals(repo_id, there, staged)
    return api, there


def _refuse_rivals(repo_id: str, there: ModelInfo, staged: Collection[str]) -> None:
    """Refuse a repository with weights that a loader may take for these, and that are no former publication's."""
    rivals = rival_weights([*staged, *(name for name in _names(there) if name not in PUBLISHED_FILES)])
    if rivals:
        raise HubError(
            f"{repo_id} also holds {', '.join(rivals[:5])}, which a loader may take for the adapter, so that it would "
            f"not verify there. Remove it, or publish to another repository. {_NOTHING_DONE}"
        )
    weights = [name for name in _stale(staged, there) if name in WEIGHT_NAMES]
    if weights and MANIFEST_NAME not in _names(there):
        raise HubError(
            f"{repo_id} holds {', '.join(weights)} of an adapter that was not published with peft-gradproj, which a "
            f"loader may take for this one. Remove it, or publish to another repository. {_NOTHING_DONE}"
        )


def _stale(staged: Collection[str], there: ModelInfo) -> list[str]:
    """The files of the former publication that do not belong to this one."""
    return sorted({*_names(there)} & {*PUBLISHED_FILES} - {CARD_NAME, *staged})


def _write_onto_card(stage: Path, report: VerificationReport, own: str, theirs: str, **details: Any) -> None:
    """Write our section onto the text of the card on the Hub, if it has one, with the metadata of the folder's own."""
    if not theirs:
        write_model_card(stage, report, existing=own, **details)
        return
    try:
        write_model_card(stage, report, existing=with_metadata(theirs, own), **details)
    except AdapterFolderError as error:
        raise HubError(f"of {details['repo_id']} on the Hub, {error} {_NOTHING_DONE}") from error


def _card_on_hub(api: HfApi, repo_id: str, there: ModelInfo) -> str:
    """The text of the repository's card, empty if it has none."""
    if CARD_NAME not in _names(there):
        return ""
    with hub_errors(repo_id, "reading the model card of", consequence=_NOTHING_DONE):
        path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=there.sha))
    return read_model_card(path.parent)


def _names(there: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in there.siblings or ()]


def _commit(
    api: HfApi,
    stage: Path,
    repo_id: str,
    there: ModelInfo,
    stale: Iterable[str],
    revision: str | None,
    create_pr: bool,
    message: str,
) -> CommitInfo:
    """Upload the staged files, then commit them and the removal of stale ones, on top of what was looked at."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, stage / name) for name in _sizes(stage)]
    removals = [CommitOperationDelete(name) for name in stale]
    with hub_errors(repo_id, "uploading to", consequence=_NOTHING_DONE):
        api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=create_pr, free_memory=False)
    with hub_errors(repo_id, "committing to", consequence=_NOTHING_DONE, unsure=_ALL_OR_NOTHING):
        return api.create_commit(
            repo_id,
            [*additions, *removals],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )
