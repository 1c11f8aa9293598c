"""The one way in which pages are made: templates of a package, and the style sheet that all pages share."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def template(package: str, name: str, **filters: Callable[..., str]) -> Template:
    """A template of the package, which may include those of this one. Values are escaped, unknown names an error."""
    packages = dict.fromkeys((package, "safe_rlhf_v.evaluation"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(p) for p in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
