from pathlib import Path

import pytest

from workers.embedded.gguf import read_header

MODELS = Path(__file__).parents[2] / "data" / "models"


def test_a_generative_model() -> None:
    header = read_header(MODELS / "wordnet-tiny-1m.Q8_0.gguf")
    assert (header.architecture, header.quantization, header.context_length) == ("llama", "Q8_0", 1024)
    assert header.parameters == 1_115_264
    assert not header.embedding_only
    assert header.info["tokenizer.ggml.eos_token_id"] == 3
    assert header.info["tokenizer.ggml.tokens"] is None
    assert "<|assistant|>" in header.info["tokenizer.chat_template"]


def test_an_embedding_model() -> None:
    header = read_header(MODELS / "tiny-bert.gguf")
    assert (header.architecture, header.parameters, header.embedding_only) == ("bert", 112_960, True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = (MODELS / "tiny-bert.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"not a model", whole[:200], whole[:8] + b"\xff" * 16 + whole[24:]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable GGUF file"):
            read_header(broken)
    with pytest.raises(OSError, match="nowhere"):
        read_header(tmp_path / "nowhere.gguf")
