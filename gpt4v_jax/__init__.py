"""gpt4v_jax: one causal transformer over text and pictures, in JAX and Flax. Start with model/gpt4v.py."""
