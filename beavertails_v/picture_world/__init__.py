"""A small drawn world whose true helpfulness and harm are known exactly: the default that needs no download."""

from beavertails_v.picture_world.dataset import PicturesError, generate, picture_styles, write
from beavertails_v.picture_world.language import vocabulary
from beavertails_v.picture_world.oracle import (
    NotOfThisWorld,
    Oracle,
    Rating,
    facts_of,
    intent_of,
    invites_harm,
    slices_of,
)

__all__ = [
    "NotOfThisWorld",
    "Oracle",
    "PicturesError",
    "Rating",
    "facts_of",
    "generate",
    "intent_of",
    "invites_harm",
    "picture_styles",
    "slices_of",
    "vocabulary",
    "write",
]
