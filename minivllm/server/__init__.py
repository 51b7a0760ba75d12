"""HTTP: routes, limits, streaming. Holds text and connections, never a tensor.

``uvicorn minivllm.server:app`` serves the bundled model (or MINIVLLM_MODEL) for development. Importing this package makes
nothing: the app is made when it is asked for.
"""


def __getattr__(name: str) -> object:
    """``app``: an application that brings its own engine."""
    if name == "app":
        from minivllm.server.development import DevelopmentApp

        return DevelopmentApp()
    raise AttributeError(f"module 'minivllm.server' has no attribute {name!r}")
