"""Fill in the pages: the table of samplers from the package, and equations as MathML, which needs no script."""

from __future__ import annotations

import re

from latex2mathml.converter import convert

from nerfstudio_softmining.samplers import registry

PLACE = "<!-- table of samplers -->"
EQUATION = re.compile(r"^\$\$\n(.*?)^\$\$$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the place of the table by the registry's samplers, and $$ blocks by MathML."""
    if PLACE in markdown:
        markdown = markdown.replace(PLACE, sampler_table())
    return EQUATION.sub(lambda match: convert(match[1].strip(), display="block"), markdown)


def sampler_table() -> str:
    """Return the table of all registered samplers: what each draws, for what, and whether its rays are weighted."""
    rows = ["| sampler | draws | for | rays weighted | settings |", "| --- | --- | --- | --- | --- |"]
    for name, spec in registry.samplers().items():
        scope = "photographs" if spec.sampler.needs_residual else "scenes, photographs"
        weighted = "-" if spec.sampler.is_uniform else "yes" if spec.config().importance_weighted else "no"
        path = f"{spec.config.__module__}.{spec.config.__name__}"
        summary = spec.summary.rstrip(".")
        rows.append(f"| [`{name}`](#{name}) | {summary} | {scope} | {weighted} | [{spec.config.__name__}][{path}] |")
    return "\n".join(rows)
