"""Signatures: whose key, over which files, and what is said of each that is not in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from published_folders import BASIS, CONFIG, MANIFEST, WEIGHTS, edit_json, flip_bit, honest_folder, reseal, with_text

from peft_gradproj import push_adapter_to_hub, sign_adapter, verify_adapter
from peft_gradproj.cli import app
from peft_gradproj.errors import AdapterFolderError, SignatureError

SIGNATURE = "model.sig"


def write_keys(folder: Path, name: str, key=None, password: bytes | None = None) -> tuple[Path, Path]:
    """Private and public key as PEM files."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def signed(tmp_path):
    """A signed adapter, and the public key."""
    private, public = write_keys(tmp_path, "key")
    honest_folder(tmp_path / "adapter")
    sign_adapter(tmp_path / "adapter", private)
    return tmp_path / "adapter", public


def failed(report) -> list[tuple[str, str]]:
    return [(check.group, check.name) for check in report.failures]


def test_a_signed_adapter_is_verified_and_the_standard_tool_agrees(signed):
    folder, public = signed
    report = verify_adapter(folder, public_key=public)
    assert report.ok, report.render()
    assert [check.name for check in report.checks if check.group == "signature"] == ["signature"]
    from model_signing import verifying

    # The model card may change after signing.
    (folder / "README.md").write_text("hello")
    assert verify_adapter(folder, public_key=public).ok
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / SIGNATURE)
    flip_bit(folder / WEIGHTS, -1)
    with pytest.raises(ValueError, match="Signature mismatch"):
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / SIGNATURE)


def test_without_a_key_the_signature_is_no_evidence(signed):
    folder, _ = signed
    report = verify_adapter(folder)
    assert report.ok
    assert not any(check.group == "signature" for check in report.checks)
    assert any("nothing says whose" in note for note in report.notes)


def test_a_signature_by_another_key_fails(signed, tmp_path):
    folder, _ = signed
    _, other = write_keys(tmp_path, "other")
    report = verify_adapter(folder, public_key=other)
    assert failed(report) == [("signature", "signing key")]


def _claim_the_key(folder: Path, public: Path) -> None:
    """Another key's signature that names the expected key."""
    import hashlib

    def change(bundle):
        bundle["verificationMaterial"]["publicKey"]["hint"] = hashlib.sha256(public.read_bytes()).hexdigest()

    edit_json(folder, SIGNATURE, change)


def test_a_signature_that_only_names_the_key_fails(signed, tmp_path):
    folder, _ = signed
    _, other = write_keys(tmp_path, "other")
    _claim_the_key(folder, other)
    assert failed(verify_adapter(folder, public_key=other)) == [("signature", "signing key")]


@pytest.mark.parametrize("hint", [True, False])
def test_a_signature_over_other_files_fails(signed, tmp_path, capsys, hint):
    folder, public = signed
    with_text(CONFIG, '"lora_alpha": 8', '"lora_alpha": 9')(folder)
    reseal(folder)
    if not hint:
        edit_json(folder, SIGNATURE, lambda bundle: bundle["verificationMaterial"]["publicKey"].pop("hint"))
    report = verify_adapter(folder, public_key=public)
    assert failed(report) == [("signature", "signed files")]
    assert CONFIG in report.failures[0].detail
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, BASIS, MANIFEST])
def test_a_signature_that_leaves_a_file_out_fails(tmp_path, name):
    """The signer's own tool is told to pass the file over: a valid signature, over too little."""
    from model_signing import hashing, signing

    private, public = write_keys(tmp_path, "key")
    folder = tmp_path / "adapter"
    honest_folder(folder)
    config = hashing.Config().set_ignored_paths(paths=[name])
    signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(config).sign(
        folder, folder / SIGNATURE
    )
    assert failed(verify_adapter(folder, public_key=public)) == [("signature", "signed files")]


def test_a_missing_signature_fails_if_a_key_is_given(signed):
    folder, public = signed
    (folder / SIGNATURE).unlink()
    assert failed(verify_adapter(folder, public_key=public)) == [("signature", "signature")]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", b'{"a": ' + b"[" * 10**5, b" " * (9 * 2**20),
                                    b'{"verificationMaterial": {}, "mediaType": 1}'], ids=range(7))  # fmt: skip
def test_a_damaged_signature_fails(signed, damage):
    folder, public = signed
    (folder / SIGNATURE).write_bytes(damage)
    report = verify_adapter(folder, public_key=public)
    assert failed(report) == [("signature", "signature")]
    assert len(report.failures[0].detail) < 500


def test_a_bit_flip_anywhere_in_the_signature_fails(signed):
    folder, public = signed
    sound = (folder / SIGNATURE).read_bytes()
    bundle = json.loads(sound)
    payload = bundle["dsseEnvelope"]["payload"]
    for position in range(0, len(payload), len(payload) // 8):
        bundle["dsseEnvelope"]["payload"] = (
            payload[:position] + ("B" if payload[position] == "A" else "A") + payload[position + 1 :]
        )
        (folder / SIGNATURE).write_text(json.dumps(bundle))
        assert [group for group, _ in failed(verify_adapter(folder, public_key=public))] == ["signature"]


def test_a_link_for_the_signature_is_not_followed_out_of_the_folder(signed, tmp_path):
    folder, public = signed
    (folder / SIGNATURE).rename(tmp_path / SIGNATURE)
    (folder / SIGNATURE).symlink_to(tmp_path / SIGNATURE)
    report = verify_adapter(folder, public_key=public)
    assert failed(report) == [("signature", "signature")]
    assert "link out of the folder" in report.failures[0].detail


def test_a_snapshot_of_the_hub_verifies(signed, tmp_path):
    folder, public = signed
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "commit", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    assert verify_adapter(snapshot, public_key=public).ok


def test_what_is_torn_is_not_signed(tmp_path):
    private, _ = write_keys(tmp_path, "key")
    honest_folder(tmp_path / "adapter")
    flip_bit(tmp_path / "adapter" / WEIGHTS, -1)
    with pytest.raises(AdapterFolderError, match="other files than its manifest binds"):
        sign_adapter(tmp_path / "adapter", private)
    assert not (tmp_path / "adapter" / SIGNATURE).exists()


def test_keys_that_cannot_be_used_are_our_error(signed, tmp_path):
    folder, public = signed
    unknown = rsa.generate_private_key(65537, 2048)
    private, rsa_public = write_keys(tmp_path, "rsa", unknown)
    for key in (private, public, tmp_path / "nothing.pem"):
        with pytest.raises(SignatureError, match="no usable private key"):
            sign_adapter(folder, key)
    for key in (rsa_public, private, tmp_path / "nothing.pub"):
        with pytest.raises(SignatureError, match="no usable public key"):
            verify_adapter(folder, public_key=key)


def test_a_key_with_a_password(signed, tmp_path):
    folder, _ = signed
    private, public = write_keys(tmp_path, "locked", password=b"secret")
    with pytest.raises(SignatureError, match="no usable private key"):
        sign_adapter(folder, private, password="guess")
    sign_adapter(folder, private, password="secret")
    assert verify_adapter(folder, public_key=public).ok


def test_without_the_extra_the_error_says_what_to_install(signed, monkeypatch):
    folder, public = signed
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(SignatureError, match=r"pip install 'peft-gradproj\[signing\]'"):
        verify_adapter(folder, public_key=public)


def test_on_the_command_line(signed, tmp_path):
    from typer.testing import CliRunner

    folder, public = signed
    private, other = write_keys(tmp_path, "other")
    run = CliRunner().invoke
    assert run(app, ["verify", str(folder), "--public-key", str(public)]).exit_code == 0
    assert run(app, ["verify", str(folder), "--public-key", str(other)]).exit_code == 1
    assert run(app, ["sign", str(folder), "--private-key", str(private)]).exit_code == 0
    assert run(app, ["verify", str(folder), "--public-key", str(other)]).exit_code == 0


@pytest.mark.parametrize("basis", ["full", "digest"])
def test_publishing_signs_what_goes_up(signed, tmp_path, monkeypatch, basis):
    folder, _ = signed
    private, public = write_keys(tmp_path, "publisher")
    seen = []

    def keep(stage: Path) -> dict[str, int]:
        seen.append(verify_adapter(stage, public_key=public))
        return {path.name: path.stat().st_size for path in stage.iterdir()}

    monkeypatch.setattr("peft_gradproj.hub._sizes", keep)
    result = push_adapter_to_hub(folder, "someone/logo", dry_run=True, basis=basis, private_key=private)
    assert SIGNATURE in result.files
    assert not seen[0].failures
    assert (BASIS in result.files) == (basis == "full")
