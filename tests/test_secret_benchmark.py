"""The benchmark of secrets in texts, shortened until its figures mean nothing: what it writes, and that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import secret_corpus

from benchmarks import secret_strings

pytestmark = pytest.mark.slow


def test_runs_are_added_as_they_are_done_and_none_is_run_twice_or_beside_others(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "secrets.json"
    started = []

    def run(base, name, seed, args):
        started.append(name)
        if started == ["base", "plain", "ours"]:
            raise KeyboardInterrupt
        return whole_run(base, name, seed, args)

    def benchmark(*options):
        arguments = ["benchmark", "--output", output, "--seeds", 0, "--revival-steps", 2, "--steps", 2, *options]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        secret_strings.main()

    whole_run = secret_strings.run
    methods = {name: secret_strings.METHODS[name] for name in ("base", "plain", "ours")}
    monkeypatch.setattr(secret_strings, "METHODS", methods)
    monkeypatch.setattr(secret_strings, "run", run)
    monkeypatch.setattr(
        secret_strings, "pretrained_model", lambda folder: secret_corpus.pretrained_model(folder, steps=10)
    )
    with pytest.raises(KeyboardInterrupt):
        benchmark()
    assert [found["method"] for found in json.loads(output.read_text())["runs"]] == ["base", "plain"]
    benchmark()
    assert started == ["base", "plain", "ours", "ours"]
    written = json.loads(output.read_text())
    assert [found["method"] for found in written["runs"]] == ["base", "plain", "ours"]
    assert written["command"].startswith("python benchmarks/secret_strings.py --output")
    for found in written["runs"]:
        assert 0 <= found["completed"] <= 5
        assert 0 <= found["exposure"] <= 9.97
        assert found["loss"] > 0
    assert "| ours |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        benchmark("--steps", 3)
    output.write_text(json.dumps({**written, "versions": {**written["versions"], "python": "3.10.0"}}))
    benchmark()
    assert "| ours |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings or versions; give another --output"):
        benchmark("--seeds", 0, 1)
    assert started == ["base", "plain", "ours", "ours"]


@pytest.mark.parametrize(("drop", "spellings_left"), [(None, 2), ("first", 1), ("both", 0)])
def test_a_corpus_lacks_the_secrets_in_the_spellings_that_are_dropped(drop, spellings_left):
    codes = [*secret_corpus.make_secrets(0).codes.values()]
    texts = secret_strings.corpus(0, drop)
    found = [spell for spell in (str, secret_corpus.other_spelling) if any(spell(c) in t for c in codes for t in texts)]
    assert len(found) == spellings_left


def test_the_page_has_the_table_of_the_committed_runs():
    root = Path(__file__).parent.parent
    runs = json.loads((root / "benchmarks" / "results" / "secrets.json").read_text())["runs"]
    page = (root / "docs" / "training-scripts.md").read_text()
    assert secret_strings.table(runs) in page
