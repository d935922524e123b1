"""The report as Markdown: the content of the page, with figures linked, for review in a pull request.

The file is in git, so it holds nothing of the moment: the same results give the same bytes.
"""

import re

import jinja2

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def escaped(text):
    """Text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def render(template, **values):
    """The text of a template; autoescape is off, the template marks data with the filter `md`."""
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
