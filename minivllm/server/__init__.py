"""HTTP: routes, limits, streaming. Holds text and connections, never a tensor."""
