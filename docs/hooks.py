"""Fill in what the pages take from the package: the table of samplers."""

from __future__ import annotations

from nerfstudio_softmining.samplers import registry

PLACE = "<!-- table of samplers -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the place of the table by the registry's samplers."""
    return markdown.replace(PLACE, sampler_table()) if PLACE in markdown else markdown


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
