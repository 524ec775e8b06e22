"""The README's Python runs as it stands, and its commands name options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from logitmill.flows import score_corpus

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone in which one corpus has been scored."""
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "page.py").write_text("# A page\n\nx = 'some text to score'\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "argparse.py").write_text("import sys\n\nprint(sys.argv)\n")
    monkeypatch.chdir(tmp_path)
    score_corpus(
        model="infra/demo/model", corpus="code/*.py", out="runs", tiers=["tokens", "logits"]
    )
    return tmp_path


@pytest.mark.usefixtures("clone")
def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    vocab_size = names["pipe"].vocab_size  # type: ignore[attr-defined]
    assert names["logits"].shape[1] == vocab_size  # type: ignore[attr-defined]
    assert list(names["df"]["doc_id"]) == ["argparse.py"]  # type: ignore[index]
    assert Path(str(names["uri"]), "manifest.json").is_file()
    assert capsys.readouterr().out


def test_commands_name_options_that_exist() -> None:
    import typer
    from logitmill.flows.cli import app

    group = typer.main.get_command(app)
    lines = [
        line
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("logitmill ")
    ]
    assert len(lines) >= 5
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


def test_a_link_leads_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "infra/demo/README.md"):
        text = (ROOT / page).read_text()
        targets = re.findall(r"\]\(([^)#\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for target in targets:
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), (page, target)


def test_files_that_contributing_names_exist() -> None:
    named = re.findall(
        r"`((?:engine|flows|kernels|tests|infra)/[^`]+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_family_is_named() -> None:
    from logitmill.engine.families import FAMILIES

    missing = [architecture for architecture in FAMILIES if f"`{architecture}`" not in README]
    assert not missing
