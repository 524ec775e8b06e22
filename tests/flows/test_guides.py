"""Every guide's commands and Python run, in order, as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_cli import start

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/guides"
GUIDES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
# What a command leaves behind.
_LEAVES = re.compile(r"--(?:out|html) (\S+)")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each block that is to be run."""
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_runs(
    name: str, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("infra", "kernels"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks((FOLDER / f"{name}.md").read_text())
    assert {language for language, _ in found} == {"sh", "python"}
    for language, code in found:
        if language == "python":
            exec(compile(code, f"{name}.md", "exec"), names)
            continue
        for command in filter(None, re.split(r"^(?=logitmill )", code, flags=re.MULTILINE)):
            program, *arguments = shlex.split(command)
            assert program == "logitmill"
            process = start(server_url, *arguments, out=tmp_path / "said", err=tmp_path / "errors")
            process.join(180)
            assert process.exitcode == 0, (command, Path("errors").read_text())
            for left in _LEAVES.findall(command):
                assert Path(left).exists(), command


def test_the_index_names_every_guide() -> None:
    index = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\S+)\.md\)", index)) == GUIDES


def test_links_lead_somewhere() -> None:
    for path in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\((?!https:)([^)#]+)\)", path.read_text()):
            assert (FOLDER / target).exists(), (path.name, target)
