"""The known families: {model_type: Family}. A new one is a table in one of these files, and a line here."""

from typing import Any

from gpt4v_jax import config
from gpt4v_jax.interop import table
from gpt4v_jax.interop.families import bert, decoders, seq2seq, towers, vit

FAMILIES = {
    family.model_type: family
    for family in (*decoders.FAMILIES, *vit.FAMILIES, *towers.FAMILIES, *bert.FAMILIES, *seq2seq.FAMILIES)
}


def family_of(theirs: dict[str, Any], where: str = "config.json") -> table.Family:
    """-> the family of a config.json, by its model_type."""
    known, name = tuple(FAMILIES), str(theirs.get("model_type"))
    if name not in FAMILIES:
        near = config.nearest(name, known)
        raise config.InputError(f"{where}: model_type={name!r} is none of {', '.join(known)}{near}")
    return FAMILIES[name]


def read_config(theirs: dict[str, Any], where: str = "config.json"):
    """A config.json's values -> our config: config.Model, config.Image or config.Towers."""
    return table.to_config(family_of(theirs, where), theirs, where)
