"""The known families: {model_type: Family}. A new one is a table in one of these files, and a line here."""

from gpt4v_jax.interop.families import bert, decoders, seq2seq, towers, vit

FAMILIES = {
    family.model_type: family
    for family in (*decoders.FAMILIES, *vit.FAMILIES, *towers.FAMILIES, *bert.FAMILIES, *seq2seq.FAMILIES)
}
