"""The templates of this directory: the model card and the report."""

from pathlib import Path
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """Return a template filled in; HTML is escaped. File names need not be valid Unicode."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(name).render(values)
    return text.encode("utf-8", "replace").decode()
