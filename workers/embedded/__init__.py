"""The embedded engine: an HTTP server that speaks Ollama's API without being Ollama.

For machines without Ollama (real inference through llama.cpp) and for tests and benchmarks (a simulation whose every
token is known beforehand). The parts, from the inside out:

    wire.py           Ollama's requests and answers: parsing, wording, encoding (pure)
    engine.py         what a backend has to offer
    residency.py      which models are loaded, who holds a slot, who waits (shared by both backends)
    simulated.py      backend: deterministic words at a set speed, with faults on demand
    llama.py          backend: one llama.cpp process per loaded model (llama_process.py), described by gguf.py
    dialect.py        how one call is read and its answer written, natively
    openai.py         the same in OpenAI's words, anthropic.py in Anthropic's
    server.py         the HTTP surface over any backend
"""
