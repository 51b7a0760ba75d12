"""HTTP: routes, limits, streaming. Holds text and connections, never a tensor.

``uvicorn minivllm.server:app`` serves the bundled model (or MINIVLLM_MODEL) for development. Importing this package makes
nothing: the app is made when it is first asked for, which must be before anybody imports the sub-module of the same name.
"""


def __getattr__(name: str) -> object:
    """``app``, kept under that name because uvicorn asks twice, and making it has imported the sub-module ``app``."""
    if name == "app":
        from minivllm.server.development import DevelopmentApp

        made = globals()["app"] = DevelopmentApp()
        return made
    raise AttributeError(f"module 'minivllm.server' has no attribute {name!r}")
