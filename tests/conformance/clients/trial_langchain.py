"""LangChain's integration of Ollama, set up by OLLAMA_HOST alone. Prints one line of JSON: what it saw, by scenario.

Runs in an environment of its own, see requirements-frameworks.txt.
"""

import asyncio
import json
import os
from importlib.metadata import version
from typing import Any

from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM  # type: ignore[import-not-found]
from ollama import ResponseError

PROMPT = "Why is the sky blue?"
chat = ChatOllama(model="llama2", num_predict=20, seed=3, validate_model_on_init=True)
llm = OllamaLLM(model="llama2", num_predict=20, seed=3)
embeddings = OllamaEmbeddings(model="simulated-embed")


async def asynchronously() -> dict[str, Any]:
    return {
        "whole": (await chat.ainvoke(PROMPT)).content,
        "parts": [part.content async for part in chat.astream(PROMPT)],
        "batch": [message.content for message in await chat.abatch([PROMPT] * 4)],
        "embeddings": await embeddings.aembed_documents(["a", "b"]),
    }


def missing() -> dict[str, Any]:
    try:
        ChatOllama(model="none").invoke(PROMPT)
    except ResponseError as error:
        return {"status": error.status_code, "error": error.error}
    raise AssertionError("nothing was raised")


def with_a_header() -> str:
    """As those do it who keep the key out of the URL."""
    headers = {"Authorization": f"Bearer {os.environ['WEFTLINE_KEY']}"}
    other = ChatOllama(
        model="llama2",
        num_predict=20,
        seed=3,
        base_url=os.environ["WEFTLINE_URL"],
        client_kwargs={"headers": headers},
    )
    return str(other.invoke(PROMPT).content)


whole = chat.invoke([("system", "Be brief."), ("user", PROMPT)])
seen = {
    "version": version("langchain-ollama"),
    "chat": {
        "whole": chat.invoke(PROMPT).content,
        "parts": [part.content for part in chat.stream(PROMPT)],
        "usage": whole.usage_metadata,
        "reason": whole.response_metadata["done_reason"],
    },
    "llm": {"whole": llm.invoke(PROMPT), "parts": list(llm.stream(PROMPT))},
    "embeddings": {"query": embeddings.embed_query("a"), "documents": embeddings.embed_documents(["a", "b"])},
    "asynchronously": asyncio.run(asynchronously()),
    "missing": missing(),
    "header": with_a_header(),
}
print(json.dumps(seen))
