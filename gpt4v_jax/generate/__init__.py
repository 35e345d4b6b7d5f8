"""Text from a trained model: prefill + cached decode. `python -m gpt4v_jax.generate --help` is the command."""
