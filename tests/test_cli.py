"""The command line: what programs and people get, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from distributed_case import small_probes
from published_folders import BASIS, CONFIG, MANIFEST, edit_json, honest_folder, random_basis

from peft_gradproj._version import __version__
from peft_gradproj.cli import main
from peft_gradproj.config import own_settings


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; gives exit status, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradproj", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return ended.value.code or 0, output.out, output.err

    return call


def test_a_verified_adapter(run, tmp_path):
    honest_folder(tmp_path)
    status, out, err = run("verify", tmp_path)
    assert (status, err) == (0, "")
    assert "pass" in out
    assert out.splitlines()[-1] == "verified"
    status, out, err = run("verify", tmp_path, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["status"] == "verified"


def test_an_adapter_that_is_not(run, tmp_path):
    honest_folder(tmp_path)
    edit_json(tmp_path, CONFIG, lambda config: config.update(use_dora=True))
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert "FAIL" in out
    status, out, _ = run("verify", tmp_path, "--json")
    assert status == 1
    assert {c["name"] for c in json.loads(out)["checks"] if c["passed"] is False} == {"digests", "config"}


def test_sarif_holds_what_did_not_pass(run, tmp_path):
    honest_folder(tmp_path / "adapter")
    verify = ("verify", tmp_path / "adapter", "--sarif", tmp_path / "out.sarif")
    assert run(*verify)[0] == 0
    assert json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"] == []
    assert run("verify", tmp_path / "nothing", "--sarif", tmp_path / "out.sarif")[0] == 2
    (invocation,) = json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["invocations"]
    assert invocation["executionSuccessful"] is False
    assert "does not exist" in invocation["toolExecutionNotifications"][0]["message"]["text"]
    assert run("verify", tmp_path / "adapter", "--sarif", tmp_path / "no" / "out.sarif")[0] == 2
    edit_json(tmp_path / "adapter", MANIFEST, lambda manifest: manifest["leakage"].pop("down.conv"))
    assert run(*verify)[0] == 1
    (found,) = json.loads((tmp_path / "out.sarif").read_text())["runs"]
    assert [rule["id"] for rule in found["tool"]["driver"]["rules"]] == ["orthogonality/claims"]
    assert {result["level"] for result in found["results"]} == {"error"}
    (location,) = found["results"][0]["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == (tmp_path / "adapter" / MANIFEST).as_uri()
    assert all("down.conv" in result["message"]["text"] for result in found["results"])


def test_sarif_of_a_folder_whose_name_is_no_text(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    honest_folder(Path("\udcff"), strength=0.5)
    assert run("verify", "\udcff", "--sarif", "out.sarif")[0] == 1
    (result,) = json.loads(Path("out.sarif").read_text())["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "%FF/gradproj.json"


def test_what_the_system_refuses_is_one_line_and_no_answer(run, tmp_path):
    honest_folder(tmp_path / "adapter")
    (tmp_path / "no file").mkdir()
    status, out, err = run("verify", tmp_path / "adapter", "--sarif", tmp_path / "no file")
    assert (status, out) == (2, "")
    assert err.startswith("gradproj: IsADirectoryError: ")
    assert err.count("\n") == 1


def test_a_mistake_of_ours_is_no_answer_either(run, tmp_path, monkeypatch):
    def mistaken(*given: object, **options: object) -> None:
        raise RuntimeError("no idea")

    monkeypatch.setattr("peft_gradproj.verification.verify_adapter", mistaken)
    status, out, err = run("verify", tmp_path)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "gradproj: RuntimeError: no idea"
    assert "Traceback" in err


def test_every_setting_of_an_adapter_can_be_given_to_launch(run, tmp_path):
    settings = {"strength": 0.5, "rule": "half-space", "probe_every": 3, "probe_batch_size": 4, "restore": 0.25}
    settings |= {"probe_history": 2, "negative_guidance": 0.3, "probe_seed": 7, "uncovered": "ignore"}
    assert settings.keys() == own_settings().keys()
    given = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    probes = small_probes().save(tmp_path / "probes.safetensors")
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from distributed_case import base_net\n"
        "from peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(base_net(), LoraConfig(r=2, target_modules=['query']))\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    status, _, err = run("launch", "--concept-probes", probes, *given, tmp_path / "script.py", tmp_path / "out")
    assert status == 0, err
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["settings"] == settings


def test_how_a_launched_script_ends_is_its_own_affair(monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text("open('not there')")
    launched = ["gradproj", "launch", "--uncovered", "ignore", str(tmp_path / "script.py")]
    monkeypatch.setattr(sys, "argv", launched)
    with pytest.raises(FileNotFoundError, match="not there"):
        main()


def test_an_adapter_that_could_not_be_checked(run, tmp_path):
    honest_folder(tmp_path)
    (tmp_path / MANIFEST).unlink()
    status, out, err = run("verify", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("gradproj: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    status, out, _ = run("verify", tmp_path, "--json")
    assert status == 2
    assert json.loads(out)["status"] == "could not be checked"
    assert MANIFEST in json.loads(out)["error"]


def test_probes_only_could_not_be_checked(run, tmp_path):
    honest_folder(tmp_path, published_basis=None)
    assert run("verify", tmp_path)[0] == 2


def test_ones_own_basis(run, tmp_path):
    basis = honest_folder(tmp_path / "adapter")
    basis.save(tmp_path / "own.safetensors")
    random_basis(seed=5).save(tmp_path / "other.safetensors")
    assert run("verify", tmp_path / "adapter", "--basis", tmp_path / "own.safetensors")[0] == 0
    other = ("verify", tmp_path / "adapter", "--basis", tmp_path / "other.safetensors")
    assert run(*other)[0] == 1
    assert run(*other, "--basis-tolerance", "1")[0] == 0
    status, _, err = run("verify", tmp_path / "adapter", "--basis", tmp_path / "nothing.safetensors")
    assert status == 2
    assert "does not exist" in err


def test_inspect_shows_what_is_there_without_judging(run, tmp_path):
    honest_folder(tmp_path)
    edit_json(tmp_path, CONFIG, lambda config: config.update(use_dora=True))
    status, out, _ = run("inspect", tmp_path)
    assert status == 0
    assert "down.attn.to_q" in out
    assert "logo" in out
    layers = json.loads(run("inspect", tmp_path, "--json")[1])["layers"]
    assert layers["down.conv"] == {"rank": 4, "d_in": 27, "d_out": 8, "dtype": "float32"}
    status, out, _ = run("inspect", tmp_path / BASIS)
    assert status == 0
    assert "Concept basis of 'logo'" in out
    assert json.loads(run("inspect", tmp_path / BASIS, "--json")[1])["layers"]["down.conv"]["input"] == [27, 2]


def test_inspect_of_nothing_is_one_line(run, tmp_path):
    status, out, err = run("inspect", tmp_path / "nothing")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_demo_passes_on_what_is_asked_for_and_says_what_it_found(run, monkeypatch):
    calls = []

    def run_demo(output, **options):
        calls.append((output, options))
        return "what was found"

    monkeypatch.setitem(sys.modules, "peft_gradproj.demo", types.SimpleNamespace(run_demo=run_demo))
    status, out, _ = run("demo", "--output", "out", "--seed", 7, "--logo", "adobe", "--quick")
    assert status == 0
    assert calls == [(Path("out"), {"seed": 7, "steps": None, "quick": True, "logo": "adobe"})]
    assert out == f"what was found\npictures and curves: {Path('out', 'index.html')}\n"


def test_version(run):
    assert run("--version")[:2] == (0, f"gradproj {__version__}\n")


def test_the_command_as_people_call_it(tmp_path):
    honest_folder(tmp_path / "tampered")
    edit_json(tmp_path / "tampered", MANIFEST, lambda manifest: manifest.update(leakage={}))
    (tmp_path / "empty").mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-m", "peft_gradproj", "verify", name], cwd=tmp_path, stdout=-1, stderr=-1)
        for name in ("tampered", "empty")
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert outputs[0][0].decode().strip().endswith("not verified")
    assert outputs[1][1].decode().count("\n") == 1


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from peft_gradproj.cli import app; app(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0
