"""The HTTP face of generate: `python -m gpt4v_jax.serve`. Needs the extra `serve`. docs/serve.md is for users.

    the engine       requests (the contract), engine (the thread), rows and slots (who has which, and what is in them),
                     prefix (prompts in chunks)
    a request in     gate (keys, sizes), protocol (slow clients, SIGTERM), schema (fields), chat (messages, media),
                     guards and fetch (media's bytes), moderation and folding
    an answer out    follow (from the engine), stream (whole, or events), shapes (logprobs, usage), wire, errors
    endpoints        api (the app, models, health), completions, vectors, speech, tokens, metrics, look (page, maps)
    what they share  server
"""
