"""What a section of settings is, and how one is made of the dataclass that uses it, so that no field stands twice."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, ClassVar, cast, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from safe_rlhf_v.fields import meaning


def _at_home(path: str) -> str:
    """`~/x` as a shell means it: nobody wants a folder called ~."""
    found = os.path.expanduser(path)
    if found == path and path.startswith("~"):
        raise ValueError("there is no user of that name; write ./~... for a folder whose name begins so")
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    return found


# A folder or file, or a hub id.
Location = Annotated[str, AfterValidator(_at_home)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise ValueError("true / false is not a value here")
        return value

    def unnamed(self) -> dict[str, Any]:
        """Fields that nobody named and that something else decides, as null, and those of the sections below."""
        below = {name: value.unnamed() for name, value in self if isinstance(value, Section)}
        return {name: tree for name, tree in below.items() if tree}

    def as_tree(self) -> dict[str, Any]:
        """Every setting as a file says it: JSON values, and null for what nobody named and something else decides."""
        return _laid(self.model_dump(mode="json"), self.unnamed())

    def __reduce__(self) -> Any:
        return type(self).model_validate, (self.as_tree(),)  # classes that are made of others cannot be pickled


def _laid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid on `below`, section by section."""
    return below | {k: _laid(below[k], v) if isinstance(v, dict) else v for k, v in above.items()}


class Declared(Section):
    """A section whose fields are those of the dataclass `of`; what that class refuses, the section refuses."""

    of: ClassVar[Any]

    @model_validator(mode="after")
    def _as_its_class_allows(self) -> Declared:
        self.made()
        return self

    def made(self, **shared: Any) -> Any:
        """One of the class. shared: fields that stand in another section; None, and those it does not have, are left."""
        known = {f.name for f in fields(self.of)}
        own = {name: value for name, value in self if name in known}
        return self.of(**own, **{k: v for k, v in shared.items() if k in known and v is not None})


def section_of(
    *kinds: type,
    name: str = "",
    base: type[Section] = Declared,
    without: Collection[str] = (),
    null: Mapping[str, str] | None = None,
) -> Any:
    """A section on `base` with the fields of these dataclasses: types, defaults and words are theirs.

    Of several the first that has a field gives it. without: fields that stand in another section. null: fields whose
    default is null, with what that takes.
    """
    found: dict[str, Any] = {}
    for kind in kinds:
        types = get_type_hints(kind, include_extras=True)
        for f in fields(kind):
            if f.name in {*found, *without, *base.model_fields}:
                continue
            wanted, words = types[f.name], meaning(types[f.name])
            if null and f.name in null:
                found[f.name] = (
                    wanted | None,
                    Field(None, description=f"{str(words).rstrip('.')}; null takes {null[f.name]}."),
                )
            elif f.default_factory is not MISSING:
                found[f.name] = (wanted, Field(default_factory=f.default_factory, description=words))
            else:
                found[f.name] = (wanted, Field(f.default, description=words))
    made = cast(Any, create_model(name or kinds[0].__name__, __base__=base, __doc__=kinds[0].__doc__, **found))
    made.of = kinds[0]
    return made


def nested(base: type[Section], sections: Mapping[str, type[Section]], used_by: str) -> Any:
    """A section on `base` with these sections below it. used_by: the setting whose value says which of them is read."""
    below: dict[str, Any] = {
        name: (own, Field(own(), description=f"Used by {used_by}: {name}.")) for name, own in sections.items()
    }
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **below)


def default_of(kind: type, name: str) -> Any:
    """The default of a dataclass's field; None where it has no such field."""
    return next((f.default for f in fields(kind) if f.name == name), None)
