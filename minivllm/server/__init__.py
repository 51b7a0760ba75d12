"""HTTP: routes, limits, streaming. Holds text and connections, never a tensor.

``uvicorn minivllm.server:app`` serves the bundled model (or MINIVLLM_MODEL) for development; the app is made when asked for.
"""


def __getattr__(name: str) -> object:
    """``app``, made at each access: nothing is made by importing."""
    if name == "app":
        from minivllm.server.development import DevelopmentApp

        return DevelopmentApp()
    raise AttributeError(f"module 'minivllm.server' has no attribute {name!r}")
