"""One file per architecture family: its spec and its checkpoint names."""
