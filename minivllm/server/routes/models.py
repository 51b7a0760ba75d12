"""GET /v1/models: under which names the model is served."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import UnknownModel
from minivllm.server.replies import ModelCard, ModelList, ModelPermission, json_response
from minivllm.server.serving import Serving, serving

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every served name."""
    s = serving(request)
    return json_response(ModelList(tuple(_card(s, name) for name in s.config.served_names)))


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One served name. Raises ``UnknownModel``."""
    s = serving(request)
    if name not in s.config.served_names:
        raise UnknownModel(name, s.config.served_names)
    return json_response(_card(s, name))


def _card(s: Serving, name: str) -> ModelCard:
    permission = ModelPermission(id=f"modelperm-{name}", created=s.created)
    return ModelCard(
        id=name,
        created=s.created,
        root=s.config.served_names[0],
        max_model_len=s.llm.info.max_model_len,
        permission=(permission,),
    )
