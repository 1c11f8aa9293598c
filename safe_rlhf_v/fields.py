"""Types of settings: what a number may be. A setting is a field of a dataclass that says what it means,

    clip: Annotated[Rate, "Clip range of the policy ratio."] = 0.2

so that the file that uses it is the one that declares it: `config.sections.section_of` makes a section of such a class,
which refuses what is out of range with the setting's name, and the table of settings takes the words from here.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Above1 = Annotated[float, Gt(1)]
ShareBelow1 = Annotated[float, Ge(0), Lt(1)]


def meaning(annotation: Any) -> str | None:
    """What an annotation says in words: the last text among its marks, so that the outermost one holds."""
    return next((mark for mark in reversed(getattr(annotation, "__metadata__", ())) if isinstance(mark, str)), None)
