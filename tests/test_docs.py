"""The pages name what there is: samplers, settings, files and commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nerfstudio_softmining.images.config import FitConfig
from nerfstudio_softmining.images.fit import make_settings
from nerfstudio_softmining.plugin import methods
from nerfstudio_softmining.samplers import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "research" / "log.md", *sorted(DOCS.glob("*.md"))]
MAX_PICTURE_BYTES = 60_000
COMPARISON = re.compile(r"^ *((?:softmining (?:bench|image)|python research/figure4.py) (?:.*\\\n)*.*)", re.MULTILINE)
FREE = {"--samplers", "--seeds", "--scenes", "--batches"}
"""Flags that runs of one folder may differ in."""


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", registry.samplers())
def test_every_sampler_has_a_section_and_a_picture(name):
    page = text(DOCS / "samplers.md")
    assert f"\n### {name}\n" in page
    assert f"](pictures/{name}.jpg)" in page
    assert (DOCS / "pictures" / f"{name}.jpg").is_file()


def test_pictures_are_small_and_all_shown():
    pages = "".join(map(text, PAGES))
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < MAX_PICTURE_BYTES, picture
        assert f"pictures/{picture.name}" in pages, picture


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    """mkdocs checks those of the site; the README and the log are read elsewhere."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_training_exist(page):
    for flag in re.findall(r"--pipeline\.[\w.-]+", text(page)):
        owner = methods.softmining_nerfacto.config
        for name in flag.removeprefix("--").rstrip(".").replace("-", "_").split("."):
            assert hasattr(owner, name), flag
            owner = getattr(owner, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_samplers_of_commands_on_photographs_exist(page):
    for command in re.findall(r"softmining image (?:.*\\\n)*.*", text(page)):
        for sampler in re.findall(r"--samplers ([^#`]*?)(?: --|#|$)", command.replace("\\\n", " ")):
            for name in sampler.split():
                make_settings(name, 0, 1, FitConfig())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_commands_exist(page):
    for path in re.findall(r"(?:python|softmining bench) ((?:research|configs)/\S+?\.(?:py|yaml))", text(page)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_commands_of_a_page_can_run_one_after_the_other(page):
    """A folder of results takes no runs of other settings."""
    settings = {}
    for command in COMPARISON.findall(text(page)):
        flags, name = {}, ""
        for word in shlex.split(command.replace("\\\n", " "), comments=True):
            name = word if word.startswith("--") else name
            flags.setdefault(name, []).append(word)
        command_name, subject = flags[""][:2], Path(flags[""][2]).stem
        default = command_name if "python" in command_name else [*command_name, subject]
        output = tuple(flags.pop("--output", default))
        rest = {name: words for name, words in flags.items() if name not in FREE}
        assert settings.setdefault(output, rest) == rest, command


def test_the_readme_has_the_table_of_the_site_and_the_commands_of_the_tests():
    readme = text(ROOT / "README.md")
    table = re.search(r"^\| you train.*?\n\n", readme, re.MULTILINE | re.DOTALL)
    assert table and table[0] in text(DOCS / "index.md") and table[0] in text(DOCS / "results.md")
    for command in ("pip install . && softmining demo", 'pip install ".[test]" && pytest'):
        assert f"\n{command}\n" in readme
