"""The HTTP face of generate: requests in, tokens out. Needs the extra `serve`."""
