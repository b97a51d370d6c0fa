"""Signatures of published adapters, in the format of OpenSSF model-signing, by an elliptic-curve key.

`model.sig` covers the manifest and the files that it binds. The model card is left out, since the Hub lets owners edit
it. What is signed and what is checked are digests of bytes that were read once, and not files that are read again.
The signature says who vouches for the files; it says nothing about what is in them.

Needs the extra: `pip install 'peft-gradproj[signing]'`.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from .adapter_folder import MANIFEST_NAME, SIGNATURE_NAME, AdapterFolder, read_adapter_folder, staged_file
from .errors import AdapterFolderError, SignatureError
from .untrusted import MAX_JSON_BYTES, parse_json, printable, read_file

__all__ = ["check_signature", "sign_adapter"]

_UNSIGNED = ("README.md", "images", SIGNATURE_NAME, ".git", ".gitattributes", ".cache")
"""What `model_signing verify` is told to pass over in the folder."""


def sign_adapter(
    folder: str | os.PathLike[str], private_key: str | os.PathLike[str], *, password: str | None = None
) -> Path:
    """Sign a published adapter; `model.sig` appears complete or not at all.

    Args:
        folder: The adapter with its manifest.
        private_key: PEM file of an elliptic-curve key, best P-256: `openssl ecparam -name prime256v1 -genkey -noout`.
        password: The password of the key, if it has one.

    Returns:
        The signature's path.

    Raises:
        AdapterFolderError: If the folder is no published adapter, or its files are not the ones that its manifest
            binds.
        SignatureError: If the key cannot be used, or the extra is not installed.
    """
    signing, _ = _model_signing()
    read = read_adapter_folder(folder)
    if read.files != read.claimed_files:
        raise AdapterFolderError(f"{folder} holds other files than its manifest binds; save it again, then sign.")
    secret = None if password is None else password.encode()
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
    except Exception as error:
        raise SignatureError(f"{private_key} is no usable private key: {_reason(error)}. {_EXPECTED}") from error
    with staged_file(read.path, SIGNATURE_NAME) as staged:
        config.set_hashing_config(_ReadDigests(read)).sign(read.path, staged)
        os.replace(staged, read.path / SIGNATURE_NAME)
    return read.path / SIGNATURE_NAME


_EXPECTED = "Expected the PEM file of an elliptic-curve key (P-256, P-384 or P-521)."


def check_signature(folder: AdapterFolder, public_key: str | os.PathLike[str]) -> tuple[str, bool, str]:
    """Check `model.sig` against the bytes of `folder` that were read.

    Returns:
        The name of the check that decided, whether it passed, and what was found: `signature` for one that is there
        and sound, `signing key` for one by another key, `signed files` for one over other files.

    Raises:
        SignatureError: If the public key cannot be used, or the extra is not installed.
    """
    _, verifying = _model_signing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SignatureError(f"{public_key} is no usable public key: {_reason(error)}. {_EXPECTED}") from error
    if not os.path.lexists(folder.path / SIGNATURE_NAME):
        return "signature", False, f"there is no {SIGNATURE_NAME}, though a public key was given"
    with TemporaryDirectory(prefix="gradproj-") as temporary:
        signature = Path(temporary, SIGNATURE_NAME)
        try:
            source = read_file(folder.path, SIGNATURE_NAME, limit=MAX_JSON_BYTES)
            parse_json(source.data, SIGNATURE_NAME)
        except AdapterFolderError as error:
            return "signature", False, str(error)
        signature.write_bytes(source.data)
        return _judged(config.set_hashing_config(_ReadDigests(folder)), folder, signature)


def _judged(config: Any, folder: AdapterFolder, signature: Path) -> tuple[str, bool, str]:
    """What model-signing says. It raises many things on damaged signatures, all of which mean the same."""
    from cryptography.exceptions import InvalidSignature

    try:
        # It warns of old formats on standard output, where `--json` goes.
        with redirect_stdout(io.StringIO()):
            config.verify(folder.path, signature)
    except InvalidSignature:
        return "signing key", False, "the signature was not made with the private key of your public key"
    except Exception as error:
        reason = _reason(error)
        if reason.startswith("Key mismatch"):
            return "signing key", False, "the signature was made with another key than yours"
        if reason.startswith("Signature mismatch"):
            return "signed files", False, f"the signature is over other files: {reason[20:300]}"
        return "signature", False, f"the signature is malformed ({reason[:200]})"
    return "signature", True, f"your key signed the manifest and {len(folder.files)} files"


class _ReadDigests:
    """Stands in for `model_signing.hashing.Config`: the digests of bytes that were read already, of no other files."""

    def __init__(self, folder: AdapterFolder) -> None:
        self._digests = {name: file.sha256 for name, file in folder.files.items()}
        self._digests[MANIFEST_NAME] = folder.manifest_file.sha256

    def add_ignored_paths(self, **ignored: Any) -> None:
        """What a signature wants to be ignored is not: it could name the weights."""

    def hash(self, model_path: Any, files_to_hash: Any = None) -> Any:
        """The manifest of model-signing."""
        from model_signing import manifest

        items = [
            manifest.FileManifestItem(
                path=PurePosixPath(name), digest=manifest.hashing.Digest("sha256", bytes.fromhex(digest))
            )
            for name, digest in self._digests.items()
        ]
        how: dict[str, Any] = {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": list(_UNSIGNED),
        }
        return manifest.Manifest(Path(model_path).resolve().name, items, manifest.SerializationType.from_args(how))


def _model_signing() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise SignatureError(
            f"signatures need model-signing and pyOpenSSL ({error}); pip install 'peft-gradproj[signing]'."
        ) from error
    return signing, verifying


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)
