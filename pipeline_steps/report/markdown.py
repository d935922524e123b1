"""The report as Markdown with linked figures, for review in a pull request.

The file is in git, so equal results must give equal bytes: it contains no dates and no commit.
"""

import re

import jinja2

from pipeline_steps.common.markdown import escaped


def render(template, **values):
    """The rendered template. Autoescape is off; the template escapes data with the filter `md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = escaped
    text = environment.get_template(template.name).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
