"""Flags > environment > file > defaults, and the key that is used when none is named."""

import os
from pathlib import Path

import pytest

from cli.main import main
from cli.settings import ClientSettings
from common.errors import UsageError


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weftline.toml"
    file.write_text('[client]\nurl = "ws://file"\nmodel = "file"\nbroker = "tcp://file:1"\n')
    environment = {"WEFTLINE_CLIENT_URL": "ws://environment", "WEFTLINE_CLIENT_MODEL": "environment"}
    settings = ClientSettings.load({"url": "ws://flag", "model": None}, config=file, environment=environment)
    assert (settings.url, settings.model, settings.broker) == ("ws://flag", "environment", "tcp://file:1")
    assert ClientSettings.load(environment={}).broker == "tcp://127.0.0.1:5570"


def test_a_wrong_setting_is_named_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weftline.toml"
    file.write_text('[client]\nmodle = "llama2"\n')
    assert main(["hosts", "--config", str(file)]) == 2
    assert "[client] has no setting 'modle'; did you mean 'model'?" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--config", str(tmp_path / "none.toml")]) == 2
    assert "cannot read the configuration file" in capsys.readouterr().err


def test_several_engines_in_one_variable() -> None:
    settings = ClientSettings.load(environment={"WEFTLINE_CLIENT_OLLAMA": "127.0.0.1:1, 127.0.0.1:2"})
    assert settings.ollama == ("127.0.0.1:1", "127.0.0.1:2")


def test_the_key_is_the_one_named_or_the_newest_that_up_made(tmp_path: Path) -> None:
    settings = ClientSettings(data_dir=tmp_path)
    keys = tmp_path / "keys"
    assert settings.key_file == keys / "local_config.json"
    keys.mkdir()
    for seconds, name in enumerate(("local_config.json", "other_config.json", "local-2_config.json")):
        (keys / name).touch()
        os.utime(keys / name, (seconds, seconds))
    assert settings.key_file == keys / "local-2_config.json"
    assert ClientSettings(data_dir=tmp_path, key=Path("mine")).key_file == Path("mine")


def test_an_ill_typed_setting_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="WEFTLINE_CLIENT_LOG_LEVEL"):
        ClientSettings.load(environment={"WEFTLINE_CLIENT_LOG_LEVEL": "loud"})
