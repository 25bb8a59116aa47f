"""LlamaIndex' integrations of Ollama, set up by `base_url`. Prints one line of JSON: what they saw, by scenario.

Runs in an environment of its own, see requirements-frameworks.txt.
"""

import asyncio
import json
import os
from importlib.metadata import version
from typing import Any

from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found]
from llama_index.embeddings.ollama import OllamaEmbedding  # type: ignore[import-not-found]
from llama_index.llms.ollama import Ollama  # type: ignore[import-not-found]
from ollama import ResponseError

PROMPT = "Why is the sky blue?"
URL = f"{os.environ['WEFTLINE_URL']}/k/{os.environ['WEFTLINE_KEY']}"
OPTIONS = {"num_predict": 20, "seed": 3}
llm = Ollama(model="llama2", base_url=URL, request_timeout=60, additional_kwargs=OPTIONS)
embeddings = OllamaEmbedding(model_name="simulated-embed", base_url=URL)
messages = [ChatMessage(role="user", content=PROMPT)]


async def asynchronously() -> dict[str, Any]:
    parts = await llm.astream_chat(messages)
    return {
        "whole": (await llm.achat(messages)).message.content,
        "parts": [part.delta async for part in parts],
        "embeddings": await embeddings.aget_text_embedding_batch(["a", "b"]),
    }


def missing() -> dict[str, Any]:
    try:
        Ollama(model="none", base_url=URL).complete(PROMPT)
    except ResponseError as error:
        return {"status": error.status_code, "error": error.error}
    raise AssertionError("nothing was raised")


seen = {
    "versions": {name: version(name) for name in ("llama-index-llms-ollama", "llama-index-embeddings-ollama")},
    "complete": {
        "whole": llm.complete(PROMPT).text,
        "parts": [part.delta for part in llm.stream_complete(PROMPT)],
    },
    "chat": {
        "whole": llm.chat(messages).message.content,
        "parts": [part.delta for part in llm.stream_chat(messages)],
    },
    "embeddings": {
        "query": embeddings.get_query_embedding("a"),
        "batch": embeddings.get_text_embedding_batch(["a", "b"]),
    },
    "asynchronously": asyncio.run(asynchronously()),
    "missing": missing(),
}
print(json.dumps(seen))
