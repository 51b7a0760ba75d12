"""What the server and the engine process say to each other; ``child.py`` says how."""

import msgspec

from minivllm.config import Config
from minivllm.types import EngineInfo, EngineOutput, GenerateRequest


class Start(msgspec.Struct, frozen=True, gc=False, tag="start"):
    """First word to the engine: load this."""

    config: Config


class Add(msgspec.Struct, frozen=True, gc=False, tag="add"):
    """A new request."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, gc=False, tag="abort"):
    """These requests are not wanted any more."""

    ids: tuple[str, ...]


class Pause(msgspec.Struct, frozen=True, gc=False, tag="pause"):
    """Nobody reads what these requests say; they are to hold no memory of the device until ``Resume``."""

    ids: tuple[str, ...]


class Resume(msgspec.Struct, frozen=True, gc=False, tag="resume"):
    """Paused requests go on."""

    ids: tuple[str, ...]


class Stop(msgspec.Struct, frozen=True, gc=False, tag="stop"):
    """End now."""


class Failed(msgspec.Struct, frozen=True, gc=False, tag="failed"):
    """The engine could not start; ``kind`` names the class in ``errors.py``."""

    kind: str
    message: str


ToEngine = Start | Add | Abort | Pause | Resume | Stop
FromEngine = EngineInfo | EngineOutput | Failed
