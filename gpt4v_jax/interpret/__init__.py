"""What a model looks at, from its named outputs; nothing hooks into it."""
