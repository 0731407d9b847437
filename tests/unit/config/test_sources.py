"""sources: which place wins, where the file is looked for, and whose file counts."""

import os
from pathlib import Path

import pytest

from pullthrough.config import paths
from pullthrough.config.sources import choices, config_places
from pullthrough.core.errors import SettingsError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's place of the file and the system's; neither is there yet."""
    found = (tmp_path / "user" / "config.toml", tmp_path / "system" / "config.toml")
    for path in found:
        path.parent.mkdir()
    monkeypatch.setattr(paths, "default_configs", lambda: found)
    return found


def test_order(places: tuple[Path, Path]) -> None:
    """The command line, the environment, the file, the default; each option says which."""
    places[0].write_text("max_size = '1GB'\nmin_free = '1GB'\nfinish = 'never'\n")
    made = choices({"max_size": "3GB"}, {"OLLAMA_CACHE_MAX_SIZE": "2GB", "OLLAMA_CACHE_MIN_FREE": "2GB"})
    settings = made.settings()
    assert (settings.max_size, settings.min_free, settings.finish) == (3 * 10**9, 2 * 10**9, "never")
    sources = {row["name"]: row["source"] for row in made.rows()}
    assert sources["max_size"] == "command line"
    assert sources["min_free"] == "environment"
    assert sources["finish"] == f"{places[0]}, line 3"
    assert sources["prefetch"] == "default"
    assert next(row["value"] for row in made.rows() if row["name"] == "config") == str(places[0])


def test_the_first_file_counts(tmp_path: Path, places: tuple[Path, Path]) -> None:
    """One that is named, else one beside a store that was chosen, else the user's, else the system's."""
    (tmp_path / "named.toml").write_text("pins = 'named'")
    (tmp_path / "config.toml").write_text("pins = 'beside'")
    for path in places:
        path.write_text(f"pins = '{path.parent.name}'")
    store = str(tmp_path / "store")
    assert choices({"dir": store, "config": str(tmp_path / "named.toml")}, {}).texts["pins"] == "named"
    assert choices({}, {"OLLAMA_CACHE_CONFIG": str(tmp_path / "named.toml")}).texts["pins"] == "named"
    assert choices({"dir": store}, {}).texts["pins"] == "beside"
    assert choices({}, {"OLLAMA_CACHE_DIR": store}).texts["pins"] == "beside"
    assert choices({}, {}).texts["pins"] == "user"
    places[0].unlink()
    assert choices({}, {}).texts["pins"] == "system"
    assert config_places(store) == (tmp_path / "config.toml", *places)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    """Else the start would go on without what it says."""
    with pytest.raises(SettingsError, match=r"gone\.toml: expected a configuration file, got: .*No such file"):
        choices({"config": str(tmp_path / "gone.toml")}, {})


def test_a_bad_value_says_where_it_is(places: tuple[Path, Path]) -> None:
    """The file's line."""
    places[1].write_text("\nfinish = 'later'\n")
    with pytest.raises(SettingsError, match=r"ollama_cache_finish: expected .*got 'later' \(.*config\.toml, line 2\)"):
        choices({}, {}).settings()


@pytest.mark.skipif(os.name != "posix", reason="file modes and owners are POSIX")
def test_a_file_that_others_can_write(places: tuple[Path, Path]) -> None:
    """It could make this cache listen anywhere and ask anybody."""
    places[0].touch(mode=0o600)
    places[0].chmod(0o666)
    with pytest.raises(SettingsError, match="expected a file that only its owner can write; run `chmod o-w"):
        choices({}, {})


def test_an_empty_value_is_chosen_by_nobody(places: tuple[Path, Path]) -> None:
    """The default is in force, and no line of the file is named for it."""
    places[1].write_text("registries = []\nmax_size = '1GB'\n")
    rows = {row["name"]: (row["value"], row["source"]) for row in choices({}, {}).rows()}
    assert rows["registries"] == ("registry.ollama.ai", "default")
    assert rows["max_size"] == ("1GB", f"{places[1]}, line 2")


def test_no_file_of_text(tmp_path: Path) -> None:
    """No byte of it is shown, and a home folder that is not known is no traceback."""
    (tmp_path / "config.toml").write_bytes(b"dir = '\xe9'")
    with pytest.raises(SettingsError, match=r"expected TOML in UTF-8, got something else at byte 7$"):
        choices({"config": str(tmp_path / "config.toml")}, {})
    for name in ("config", "dir"):
        with pytest.raises(SettingsError, match=r"expected a folder; .*a home that is not known here, got '~nobody-of"):
            choices({name: "~nobody-of-this-name/x"}, {})


@pytest.mark.skipif(os.name != "posix", reason="file modes and FIFOs are POSIX")
def test_what_is_read_beside_a_store(tmp_path: Path) -> None:
    """A FIFO keeps nobody waiting, and no name of a folder becomes a command of whoever copies the hint."""
    folder = tmp_path / "a;b"
    folder.mkdir()
    os.mkfifo(folder / "config.toml")
    with pytest.raises(SettingsError, match="got something that is no file"):
        choices({"dir": str(folder / "store")}, {})
    (folder / "config.toml").unlink()
    (folder / "config.toml").touch()
    (folder / "config.toml").chmod(0o666)
    with pytest.raises(SettingsError, match=r"run `chmod o-w '.*a;b/config.toml'`"):
        choices({"dir": str(folder / "store")}, {})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    """A store may lie where all can put files; one that is named on purpose counts."""
    path = tmp_path / "config.toml"
    path.write_text("pins = 'theirs'")
    os.chown(path, 12345, 12345)
    with pytest.raises(SettingsError, match=r"expected a file of this user or root, got one of user 12345; .*name it"):
        choices({"dir": str(tmp_path / "store")}, {})
    assert choices({"config": str(path)}, {}).texts["pins"] == "theirs"


def test_a_secret_is_not_told_by_rows() -> None:
    """What cannot be used is not shown either."""
    with pytest.raises(SettingsError) as refused:
        choices({"object_store": "s3://key:hunter2@bucket"}, {}).rows()
    assert "hunter2" not in str(refused.value)
