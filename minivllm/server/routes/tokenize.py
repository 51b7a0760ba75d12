"""/tokenize and /detokenize: the served model's tokenizer, as the generating routes use it."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minivllm.errors import InvalidRequest
from minivllm.server.messages import chat_of
from minivllm.server.protocol import DETOKENIZE, TOKENIZE, TokenizeBody
from minivllm.server.replies import Tokens, json_response
from minivllm.server.serving import Serving, read_json, serving, written
from minivllm.server.tools import offer_of

MAX_DETOKENIZED = 2**18

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat route would send it to the model."""
    s = serving(request)
    body = await read_json(request, TOKENIZE)
    s.model_name(body.model)
    ids = await _ids(s, body)
    name = s.llm.tokenizer.token_text

    def write() -> Response:
        strings = tuple(map(name, ids)) if body.return_token_strs else None
        return json_response(Tokens(len(ids), s.llm.info.max_model_len, tuple(ids), strings))

    return await written(len(ids), write)


async def _ids(s: Serving, body: TokenizeBody) -> list[int]:
    """Exactly one of ``prompt`` and ``messages`` as ids."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", "prompt")
    if body.messages is not None:
        values = {
            "tools": list(offer_of(body.tools, None, None).described),
            "chat_template_kwargs": body.chat_template_kwargs,
        }
        reads = s.llm.tokenizer.template().reads
        chat = chat_of(body.messages, reads, body.add_generation_prompt, body.continue_final_message, values)
        return (await s.encode_chat(chat, bool(body.add_special_tokens)))[1]
    for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise InvalidRequest(f"{name} belongs to messages; leave it out with prompt.", name)
    return await s.encode(body.prompt or "", _or(body.add_special_tokens, True))


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included. Of many it is made beside the event loop: a million take seconds."""
    s = serving(request)
    body = await read_json(request, DETOKENIZE)
    s.model_name(body.model)
    size, tokens = s.llm.info.vocab_size, body.tokens
    if len(tokens) > MAX_DETOKENIZED:
        problem = f"One request takes at most {MAX_DETOKENIZED} tokens, got {len(tokens)}; send them in parts."
        raise InvalidRequest(problem, "tokens")
    if tokens and not (min(tokens) >= 0 and max(tokens) < size):
        raise InvalidRequest(f"tokens holds an id outside 0 to {size - 1}, which this model does not have.", "tokens")
    text = await written(len(tokens), lambda: s.llm.tokenizer.decode(tokens, skip_special_tokens=False))
    return json_response({"prompt": text})
