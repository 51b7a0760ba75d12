"""/tokenize and /detokenize: the served model's tokenizer, as the generating routes use it."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import InvalidRequest
from minivllm.server.protocol import DETOKENIZE, TOKENIZE, TokenizeBody, messages_of
from minivllm.server.replies import Tokens, json_response
from minivllm.server.serving import Serving, read_json, serving

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat route would send it to the model."""
    s = serving(request)
    body = await read_json(request, TOKENIZE)
    s.model_name(body.model)
    ids = await _ids(s, body)
    strings = tuple(map(s.llm.tokenizer.token_text, ids)) if body.return_token_strs else None
    return json_response(Tokens(len(ids), s.llm.info.max_model_len, tuple(ids), strings))


async def _ids(s: Serving, body: TokenizeBody) -> list[int]:
    """Exactly one of ``prompt`` and ``messages`` as ids."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", "prompt")
    if body.messages is not None:
        text = s.llm.tokenizer.render_chat(
            messages_of(body.messages),
            add_generation_prompt=_or(body.add_generation_prompt, not body.continue_final_message),
            continue_final_message=_or(body.continue_final_message, False),
        )
        return await s.encode(text, _or(body.add_special_tokens, False))
    if body.add_generation_prompt is not None or body.continue_final_message is not None:
        raise InvalidRequest("add_generation_prompt and continue_final_message belong to messages.", "messages")
    return await s.encode(body.prompt or "", _or(body.add_special_tokens, True))


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    s = serving(request)
    body = await read_json(request, DETOKENIZE)
    s.model_name(body.model)
    size = s.llm.info.vocab_size
    if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < size):
        raise InvalidRequest(f"tokens holds an id outside 0 to {size - 1}, which this model does not have.", "tokens")
    return json_response({"prompt": s.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)})
