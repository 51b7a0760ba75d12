"""The ladder: small programs that serve the same requests, each with one more idea, and the engine's own steps above them."""
