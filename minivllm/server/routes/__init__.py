"""One file an API; each exports a router."""
