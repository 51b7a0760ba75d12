"""What the server, the zygote and the engine process say to each other; ``child.py`` says how."""

import msgspec

from minivllm.config import Config
from minivllm.records import EngineOutput
from minivllm.types import EngineInfo, GenerateRequest

# ----------------------------------------------------------------------------------------------------------------------
# Server -> zygote. It answers nothing: what becomes of an engine is seen on the engine's own socket.
# ----------------------------------------------------------------------------------------------------------------------


class Prepare(msgspec.Struct, frozen=True, gc=False, tag="prepare"):
    """First word to the zygote: get ready for this model."""

    config: Config


class Hatch(msgspec.Struct, frozen=True, gc=False, tag="hatch"):
    """Fork an engine; its socket comes beside this message."""


class Kill(msgspec.Struct, frozen=True, gc=False, tag="kill"):
    """End the engine, which answers no more; first let it write where each of its threads is."""


ToZygote = Prepare | Hatch | Kill

# ----------------------------------------------------------------------------------------------------------------------
# Server <-> engine
# ----------------------------------------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, gc=False, tag="start"):
    """First word to the engine: run this."""

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


class Launching(msgspec.Struct, frozen=True, gc=False, tag="launching"):
    """A step is about to begin, and it is one to know of before it has ended: requests are in it that were in none before,
    or it takes long. Should the engine end now, the server knows who was there; should it be silent, for how long it may."""

    ids: tuple[str, ...]  # requests that join the batch
    expected_s: float


class Beat(msgspec.Struct, frozen=True, gc=False, tag="beat"):
    """The engine is at work that is no step (it loads, it compiles, it makes a grammar), and it gets on."""


ToEngine = Start | Add | Abort | Pause | Resume | Stop
FromEngine = EngineInfo | EngineOutput | Failed | Launching | Beat
