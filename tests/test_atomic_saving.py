"""Whatever happens while an adapter is saved, whoever looks finds the former state or the new one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis, train, trainable
from peft import get_peft_model

from peft_gradproj import GradProjConfig, save_adapter, verify_adapter
from peft_gradproj import folder_swap as swap
from peft_gradproj.errors import AdapterFolderError, GradProjError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")

KILLS = int(os.environ.get("GRADPROJ_KILLS", "20"))
WEIGHTS = "adapter_model.safetensors"


def trained(seed: int, name: str = "default"):
    basis = small_net_basis(seed=seed)
    config = GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis)
    model = get_peft_model(SmallNet(), config, adapter_name=name)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 3, seed=seed)
    return model


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Two models, and the digests of their weights as files."""
    models = [trained(seed) for seed in range(2)]
    folders = [save_adapter(model, tmp_path_factory.mktemp("state") / "out") for model in models]
    assert digest(folders[0]) != digest(folders[1])
    return models, {digest(folder) for folder in folders}


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own, whose status is 1 if it raises; the process's id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def killed_while_saving(models, save: Callable[[object, Path], object], folder: Path, first: int, after: float) -> None:
    """Let a process of its own save the models by turns without end, beginning with `first`, and kill it.

    Args:
        after: When, from the end of the first save on, as a share of the time that this took. It is measured in that
            very process: a forked one takes much longer than this one, and the more so the busier the machine is.
    """
    reading, writing = os.pipe()

    def save_by_turns() -> None:
        for turn in count(first):
            os.write(writing, b".")
            save(models[turn % 2], folder)

    process = forked(save_by_turns)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as saves:
        saves.read(1)
        begun = time.monotonic()
        saves.read(1)
        time.sleep(after * (time.monotonic() - begun))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "the process ended by itself"


def test_a_kill_at_any_point_leaves_the_former_state_or_the_new_one(states, tmp_path):
    models, digests = states
    folder = tmp_path / "out"
    delays = random.Random(0)
    seen = set()
    for kill in range(KILLS):
        # Each process begins with the other model than the one before, so that both states are reached.
        killed_while_saving(models, save_adapter, folder, kill, delays.uniform(0, 1.2))
        assert verify_adapter(folder).ok
        assert digest(folder) in digests
        seen.add(digest(folder))
    assert seen == digests
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert left, "no save was killed before its end; the kills prove nothing"


def test_a_kill_of_pefts_own_save_never_leaves_a_torn_folder_that_verifies(states, tmp_path):
    models, digests = states
    folder = save_adapter(models[0], tmp_path / "out")

    def in_place(model, path: Path) -> None:
        model.save_pretrained(path)

    delays = random.Random(1)
    for kill in range(max(KILLS // 4, 5)):
        killed_while_saving(models, in_place, folder, kill, delays.uniform(0, 1.2))
        try:
            report = verify_adapter(folder)
        except GradProjError:
            continue
        assert not report.ok or digest(folder) in digests


def test_saves_at_the_same_time_do_not_mix(states, tmp_path):
    models, digests = states
    folder = save_adapter(models[0], tmp_path / "out")
    processes = [forked(lambda model=model: [save_adapter(model, folder) for _ in range(10)]) for model in models]
    looks = 0
    while (ended := os.waitpid(processes[0], os.WNOHANG)) == (0, 0):
        # A folder that is replaced while it is read may be refused, but is never taken for another.
        try:
            report = verify_adapter(folder)
            looks += report.ok
        except AdapterFolderError:
            continue
    assert looks
    assert ended[1] == os.waitpid(processes[1], 0)[1] == 0
    assert verify_adapter(folder).ok
    assert digest(folder) in digests
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "something was left over"


def test_an_error_leaves_the_former_state_and_nothing_else(states, tmp_path):
    models, _ = states
    folder = save_adapter(models[0], tmp_path / "out")
    before = digest(folder)

    def fails(stage: Path) -> None:
        models[1].save_pretrained(stage)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_adapter(models[1], folder, save=fails)
    assert digest(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_card_is_kept_and_a_signature_is_not(states, tmp_path):
    models, _ = states
    folder = save_adapter(models[0], tmp_path / "out")
    (folder / "README.md").write_text("# My adapter\n\nWhat I wrote.\n")
    (folder / "model.sig").write_text("{}")
    (folder / "images").mkdir()
    (folder / "images" / "cat.png").write_bytes(b"x")
    save_adapter(models[1], folder)
    assert "What I wrote." in (folder / "README.md").read_text()
    assert not (folder / "model.sig").exists()
    assert (folder / "images" / "cat.png").read_bytes() == b"x"


def test_a_folder_with_other_things_is_not_replaced(states, tmp_path):
    models, _ = states
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(AdapterFolderError, match="checkpoint-5; it would be replaced as a whole"):
        save_adapter(models[0], tmp_path / "out")


def test_an_adapter_of_another_name_and_a_model_of_diffusers(tmp_path):
    save_adapter(trained(0, name="logo"), tmp_path / "named", "logo")
    assert verify_adapter(tmp_path / "named").ok
    from tiny_models import UNET_TARGETS, basis_for, tiny_unet

    unet = tiny_unet()
    unet.add_adapter(GradProjConfig(r=2, target_modules=UNET_TARGETS, concept_basis=basis_for(unet, UNET_TARGETS, 2)))
    save_adapter(unet, tmp_path / "unet")
    assert verify_adapter(tmp_path / "unet").ok
    assert (tmp_path / "unet" / "pytorch_lora_weights.safetensors").exists()


def test_of_several_adapters_of_a_transformers_model_the_one_that_is_named_is_saved(tmp_path):
    """transformers itself saves the one that is active."""
    from tiny_models import FLOORS, LLAMA_TARGETS, basis_for, folder_leakage, tiny_llama

    llama = tiny_llama()
    bases = {name: basis_for(llama, LLAMA_TARGETS, seed=seed) for seed, name in enumerate(["one", "two"])}
    for name, basis in bases.items():
        llama.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis), name)
    for name, parameter in llama.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False).normal_()
    for active in (["two"], ["one", "two"]):
        llama.set_adapter(active)
        llama.model.layers[0].self_attn.q_proj.lora_A["two"].requires_grad_(False)
        before = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
        for name, basis in bases.items():
            folder = save_adapter(llama, tmp_path / f"{name}-{len(active)}", name)
            assert folder_leakage(folder, basis) <= FLOORS[torch.float32]
            assert verify_adapter(folder).ok
        assert llama.active_adapters() == active
        assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == before
        # What was saved, transformers' generation config beside it, is replaced by the next save.
        assert verify_adapter(save_adapter(llama, folder, "one")).ok
    with pytest.raises(AdapterFolderError, match="no adapter 'three'"):
        save_adapter(llama, tmp_path / "three", "three")


def test_where_nothing_can_be_exchanged_two_renames_do(states, tmp_path, monkeypatch):
    models, digests = states
    monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    folder = save_adapter(models[0], tmp_path / "out")
    former = digest(folder)
    save_adapter(models[1], folder)
    assert {former, digest(folder)} == digests
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # A kill between the two renames: nothing under the name, the former state beside it, and the next save mends it.
    monkeypatch.setattr(swap, "_moved_away", lambda path: os.rename(path, tmp_path / ".out.0.gradproj-swap") or exit())
    with pytest.raises(SystemExit):
        save_adapter(models[0], folder)
    assert not folder.exists()
    assert verify_adapter(tmp_path / ".out.0.gradproj-swap").ok
    monkeypatch.undo()
    save_adapter(models[0], folder)
    assert verify_adapter(folder).ok


def test_what_killed_saves_left_is_removed_when_it_is_old(states, tmp_path):
    models, _ = states
    for name in (".out.1.gradproj-swap", ".out.2.gradproj-swap", ".other.1.gradproj-swap"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0) if "2" not in name else None)
    # Also of a folder that is saved for the first time.
    save_adapter(models[0], tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out.2.gradproj-swap", ".other.1.gradproj-swap"}


_BIND = """
mount --bind "$1" "$2" || exit 77
"$3" - "$2" <<'END'
import sys
from pathlib import Path
from peft_gradproj.folder_swap import replaced_folder
with replaced_folder(Path(sys.argv[1])) as stage:
    (stage / "new").write_text("new")
END
"""


def test_a_mount_point_keeps_its_place(tmp_path):
    for name in ("volume", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "volume" / "old").write_text("old")
    command = ["unshare", "-Urm", "sh", "-c", _BIND, "sh", tmp_path / "volume", tmp_path / "out", sys.executable]
    try:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip("may not mount here")
    assert result.returncode == 0, result.stderr
    assert [path.read_text() for path in (tmp_path / "volume").iterdir()] == ["new"]


@pytest.mark.parametrize("links", [False, True])
def test_the_working_directory_keeps_its_place(states, tmp_path, monkeypatch, links):
    models, digests = states
    folder = save_adapter(models[0], tmp_path / "out")
    former = digest(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    save_adapter(models[1], tmp_path / "link" if links else ".")
    assert os.getcwd() == str(folder)
    assert {former, digest(Path())} == digests
    assert verify_adapter(".").ok
    assert not any(path.name.endswith("-swap") for path in [*folder.iterdir(), *tmp_path.iterdir()])


def test_where_the_folder_has_to_stay_its_contents_are_replaced(states, tmp_path, monkeypatch):
    models, digests = states
    folder = save_adapter(models[0], tmp_path / "out")
    former, place = digest(folder), folder.stat().st_ino
    (folder / "README.md").write_text("# My adapter")
    # What an older kill left is no reason to refuse, and goes.
    for name, age in ((".out.1.gradproj-swap", 0), (".out.2.gradproj-swap", None)):
        (folder / name).mkdir()
        os.utime(folder / name, None if age is None else (age, age))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    save_adapter(models[1], folder)
    assert {former, digest(folder)} == digests
    assert folder.stat().st_ino == place
    assert "# My adapter" in (folder / "README.md").read_text()
    (folder / ".out.2.gradproj-swap").rmdir()
    assert verify_adapter(folder).ok
    assert not any(path.name.endswith("-swap") for path in [*folder.iterdir(), *tmp_path.iterdir()])

    # Where an entry cannot be moved, all is as it was, and what was saved is told.
    before, rename, faults = digest(folder), os.rename, [OSError(5, "Input/output error")]

    def fails(source, target):
        if Path(source).name == WEIGHTS and Path(target).parent == folder and faults:
            raise faults.pop()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="what was to be there is in") as caught:
        save_adapter(models[0], folder)
    assert digest(folder) == before
    stage = next(folder.glob(".out.*-swap"))
    assert str(stage) in str(caught.value)
    assert {digest(stage), before} == digests


def test_what_cannot_be_put_in_place_is_kept(states, tmp_path, monkeypatch):
    models, digests = states
    folder = save_adapter(models[0], tmp_path / "out")
    before = digest(folder)
    monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    monkeypatch.setattr(swap, "_moved_away", lambda path: os.rename(path, path / "within"))
    with pytest.raises(OSError, match=r"what was to be there is in .*out.*gradproj-swap"):
        save_adapter(models[1], folder)
    assert digest(folder) == before
    assert {digest(next(tmp_path.glob(".out.*-swap"))), before} == digests


def test_a_folder_keeps_its_mode(states, tmp_path):
    models, _ = states
    folder = save_adapter(models[0], tmp_path / "out")
    folder.chmod(0o2770)
    save_adapter(models[1], folder)
    assert oct(folder.stat().st_mode & 0o7777) == "0o2770"


def test_exchanging_what_is_not_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "a", tmp_path / "b")
